-- Questions to humans, one row per attempt and cause. A question that nobody answered is open as long as its step waits for it;
-- a step that was cancelled, or whose lost result turned up after all, has withdrawn it.

CREATE TABLE IF NOT EXISTS approval_state
(
    run_id String,
    step_id String,
    attempt Int64,
    why LowCardinality(String),
    account SimpleAggregateFunction(max, String),
    rule SimpleAggregateFunction(max, String),
    policy SimpleAggregateFunction(max, String),
    question SimpleAggregateFunction(max, String),
    arguments_hash SimpleAggregateFunction(max, String),
    requested_at SimpleAggregateFunction(min, Nullable(DateTime64(3, 'UTC'))),
    resolved_at SimpleAggregateFunction(min, Nullable(DateTime64(3, 'UTC'))),
    approved SimpleAggregateFunction(max, Nullable(Bool)),
    answered_by SimpleAggregateFunction(max, String),
    answer SimpleAggregateFunction(max, String)
)
ENGINE = AggregatingMergeTree
ORDER BY (run_id, step_id, attempt, why);

CREATE MATERIALIZED VIEW IF NOT EXISTS approval_state_of_events TO approval_state AS
SELECT
    run_id,
    step_id,
    f.attempt AS attempt,
    JSONExtractString(body, 'why') AS why,
    max(f.account) AS account,
    max(JSONExtractString(body, 'rule')) AS rule,
    max(JSONExtractString(body, 'policy')) AS policy,
    max(if(type = 'ApprovalRequested', JSONExtractString(body, 'reason'), '')) AS question,
    max(JSONExtractString(body, 'arguments_hash')) AS arguments_hash,
    minIf(toNullable(at), type = 'ApprovalRequested') AS requested_at,
    minIf(toNullable(at), type = 'ApprovalResolved') AS resolved_at,
    maxIf(toNullable(CAST(JSONExtractBool(body, 'approved'), 'Bool')), type = 'ApprovalResolved') AS approved,
    max(if(type = 'ApprovalResolved', JSONExtractString(body, 'by'), '')) AS answered_by,
    max(if(type = 'ApprovalResolved', JSONExtractString(body, 'reason'), '')) AS answer
FROM event_facts AS f
WHERE type IN ('ApprovalRequested', 'ApprovalResolved')
GROUP BY run_id, step_id, attempt, why;

CREATE VIEW IF NOT EXISTS approvals AS
SELECT
    a.run_id AS run_id,
    a.step_id AS step_id,
    a.attempt AS attempt,
    a.why AS why,
    multiIf(
        a.approved = true, 'approved',
        a.approved = false, 'rejected',
        s.status = 'awaiting_approval' AND s.attempts = a.attempt, 'open',
        'withdrawn'
    ) AS status,
    s.function AS function,
    s.arguments AS arguments,
    a.arguments_hash AS arguments_hash,
    a.question AS question,
    a.rule AS rule,
    a.policy AS policy,
    a.requested_at AS requested_at,
    a.resolved_at AS resolved_at,
    a.answered_by AS answered_by,
    a.answer AS answer,
    a.account AS account
FROM approval_state AS a FINAL
LEFT JOIN
(
    SELECT run_id, step_id, status, attempts, function, arguments
    FROM steps
    WHERE (run_id, step_id) IN (SELECT run_id, step_id FROM approval_state)
) AS s ON s.run_id = a.run_id AND s.step_id = a.step_id;

-- A run that is not over waits as long as one of its questions is open. A run id that only ever saw refused commands is no run.
CREATE VIEW IF NOT EXISTS runs AS
SELECT
    run_id,
    if(
        substring(r.status, 20) = 'running' AND run_id IN (SELECT run_id FROM approvals WHERE status = 'open'),
        'waiting',
        substring(r.status, 20)
    ) AS status,
    if(
        position(r.workflow, '@') = 0,
        r.workflow,
        substring(r.workflow, 1, length(r.workflow) - position(reverse(r.workflow), '@'))
    ) AS workflow,
    if(position(r.workflow, '@') = 0, '', substringIndex(r.workflow, '@', -1)) AS version,
    account,
    started_at,
    finished_at,
    updated_at,
    arraySum(mapValues(costs)) AS spent_micros,
    budget_micros,
    input,
    output,
    code,
    reason,
    cancelled_by,
    JSONExtract(r.tags, 'Map(String, String)') AS tags,
    definition_hash,
    fingerprint,
    last_seq,
    log_partition
FROM run_state AS r FINAL
WHERE substring(r.status, 20) != '';
