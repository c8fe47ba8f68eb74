-- The views over what 010 has added.

-- One row per step of a run, waits and runs that are steps included. `kind`: step, agent, tool, wait_event, wait_until, sleep, ask,
-- workflow.
CREATE OR REPLACE VIEW steps AS
SELECT
    s.run_id AS run_id,
    s.step_id AS step_id,
    s.node_id AS node_id,
    s.wave AS wave,
    if(s.call = '', JSONExtractString(s.wait, 'kind'), JSONExtractString(s.call, 'kind')) AS kind,
    if(s.call = '', JSONExtractString(s.wait, 'function'), JSONExtractString(s.call, 'function')) AS function,
    substring(s.status, 20) AS status,
    s.attempts AS attempts,
    arraySum(mapValues(s.costs)) AS spent_micros,
    s.ready_at AS ready_at,
    s.finished_at AS finished_at,
    s.updated_at AS updated_at,
    multiIf(
        r.is_redacted, if(r.arguments = '', '(redacted)', r.arguments),
        s.call = '', JSONExtractString(s.wait, 'input'),
        JSONExtractString(s.call, 'arguments')
    ) AS arguments,
    s.output AS output,
    s.code AS code,
    s.reason AS reason,
    JSONExtractString(s.call, 'queue') AS queue,
    s.account AS account,
    JSONExtractString(s.call, 'model') AS model
FROM step_state AS s FINAL
LEFT ANY JOIN (
    SELECT run_id, step_id, max(r.arguments) AS arguments, true AS is_redacted
    FROM redaction_state AS r
    GROUP BY run_id, step_id
) AS r ON r.run_id = s.run_id AND r.step_id = s.step_id
WHERE s.status != '';

-- Questions to humans about attempts: open until somebody answers, it lapses, or its step needs no answer any more.
CREATE OR REPLACE VIEW approvals AS
SELECT
    a.run_id AS run_id,
    a.step_id AS step_id,
    a.attempt AS attempt,
    a.why AS why,
    multiIf(
        a.approved = true, 'approved',
        a.approved = false, 'rejected',
        a.expired_at IS NOT NULL, 'expired',
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
    a.account AS account,
    if(a.expires_ms > 0, fromUnixTimestamp64Milli(a.expires_ms, 'UTC'), NULL) AS expires_at
FROM approval_state AS a FINAL
LEFT JOIN
(
    SELECT run_id, step_id, status, attempts, function, arguments
    FROM steps
    WHERE (run_id, step_id) IN (SELECT run_id, step_id FROM approval_state)
) AS s ON s.run_id = a.run_id AND s.step_id = a.step_id;

-- One row per run. A run that is not over is `waiting` while a question is open or a step waits for an event, a time or an answer.
-- A run id that only ever saw refused commands is no run.
CREATE OR REPLACE VIEW runs AS
SELECT
    run_id,
    if(
        substring(r.status, 20) = 'running' AND run_id IN (
            SELECT run_id FROM step_state FINAL WHERE substring(step_state.status, 20) IN ('awaiting_approval', 'waiting')
        ),
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
    log_partition,
    substring(r.pause, 20) AS paused,
    parent_run_id
FROM run_state AS r FINAL
WHERE substring(r.status, 20) != '';

-- What every unfinished step waits for, and since when: approval, answer, event, time, retry, resume (its run or queue is paused),
-- budget, limit, executor (a free slot), function (it runs), run (another run does it), or gate (its decision). An attempt that the
-- gate queued is told nothing until a slot is free: whether it stands in a queue is the ledger's to say.
CREATE VIEW IF NOT EXISTS waits AS
SELECT
    s.run_id AS run_id,
    s.step_id AS step_id,
    s.attempts AS attempt,
    multiIf(
        s.name = 'awaiting_approval', 'approval',
        s.name = 'waiting', multiIf(s.kind = 'ask', 'answer', s.kind = 'wait_event', 'event', 'time'),
        s.name = 'backing_off', 'retry',
        s.name = 'held', 'resume',
        s.name = 'in_child', 'run',
        s.name = 'dispatched', 'function',
        s.is_held, s.held_for,
        q.queued > 0, 'executor',
        'gate'
    ) AS waits_for,
    if(s.call = '', JSONExtractString(s.wait, 'function'), JSONExtractString(s.call, 'function')) AS function,
    JSONExtractString(s.call, 'queue') AS queue,
    s.updated_at AS since,
    multiIf(
        s.name = 'waiting', fromUnixTimestamp64Milli(
            coalesce(JSONExtract(s.wait, 'due_ms', 'Nullable(Int64)'), JSONExtract(s.wait, 'timeout_at_ms', 'Nullable(Int64)')), 'UTC'
        ),
        s.name = 'requested' AND s.is_held AND s.held_ms > 0, fromUnixTimestamp64Milli(s.held_ms, 'UTC'),
        s.name = 'awaiting_approval', a.expires_at,
        e.due_at
    ) AS due_at,
    s.account AS account,
    multiIf(
        s.name = 'waiting', coalesce(
            nullIf(JSONExtractString(s.wait, 'prompt'), ''), concat(JSONExtractString(s.wait, 'event'), ' ', JSONExtractString(s.wait, 'key'))
        ),
        s.name = 'requested' AND s.is_held, s.held_reason,
        s.name = 'awaiting_approval', a.question,
        ''
    ) AS detail
FROM (
    SELECT
        run_id,
        step_id,
        attempts,
        substring(w.status, 20) AS name,
        JSONExtractString(w.wait, 'kind') AS kind,
        w.held_by > w.status AS is_held,
        toInt64OrZero(substring(w.held_by, 20, 19)) AS held_ms,
        substringIndex(substring(w.held_by, 39), '|', 1) AS held_for,
        substring(w.held_by, 40 + length(held_for)) AS held_reason,
        wait,
        call,
        updated_at,
        account
    FROM step_state AS w FINAL
    WHERE name IN ('requested', 'dispatched', 'awaiting_approval', 'backing_off', 'waiting', 'held', 'in_child')
) AS s
LEFT ANY JOIN (
    SELECT run_id, step_id, attempt, count() AS queued
    FROM ledger_facts FINAL
    WHERE type = 'AttemptQueued'
    GROUP BY run_id, step_id, attempt
) AS q ON q.run_id = s.run_id AND q.step_id = s.step_id AND q.attempt = s.attempts
LEFT ANY JOIN (
    SELECT
        run_id,
        step_id,
        attempt,
        max(fromUnixTimestamp64Milli(JSONExtract(body, 'retry_at_ms', 'Nullable(Int64)'), 'UTC')) AS due_at
    FROM event_facts FINAL
    WHERE type = 'AttemptEnded'
    GROUP BY run_id, step_id, attempt
) AS e ON e.run_id = s.run_id AND e.step_id = s.step_id AND e.attempt = s.attempts AND s.name = 'backing_off'
LEFT ANY JOIN (
    SELECT
        run_id, step_id, attempt, max(d.question) AS question,
        if(max(d.expires_ms) > 0, fromUnixTimestamp64Milli(max(d.expires_ms), 'UTC'), NULL) AS expires_at
    FROM approval_state AS d
    GROUP BY run_id, step_id, attempt
) AS a ON a.run_id = s.run_id AND a.step_id = s.step_id AND a.attempt = s.attempts;

-- What the gate answered: allow (placed), deny, require_approval, throttle (a limit lets it wait), pause (a budget does), lapse (nobody
-- answered in time).
CREATE OR REPLACE VIEW decisions AS
SELECT
    run_id,
    step_id,
    attempt,
    multiIf(
        type = 'AttemptPlaced', 'allow',
        type = 'AttemptRefused', 'deny',
        type = 'ApprovalHeld', 'require_approval',
        type = 'AttemptThrottled', 'throttle',
        type = 'AttemptPaused', 'pause',
        'lapse'
    ) AS decision,
    if(type = 'AttemptThrottled', JSONExtractString(body, 'limit'), JSONExtractString(body, 'rule')) AS rule,
    JSONExtractString(body, 'policy') AS policy,
    JSONExtractString(body, 'reason') AS reason,
    JSONExtractString(body, 'instance_id') AS instance_id,
    JSONExtract(body, 'incarnation', 'Nullable(Int64)') AS incarnation,
    reserved_micros,
    at,
    account,
    ledger,
    seq
FROM ledger_facts FINAL
WHERE type IN ('AttemptPlaced', 'AttemptRefused', 'ApprovalHeld', 'AttemptThrottled', 'AttemptPaused', 'ApprovalLapsed');
