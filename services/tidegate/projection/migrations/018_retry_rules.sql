-- Which retry rule, and of which document, counted the end of an attempt; and calls of tools that somebody outside does are attempts.

ALTER TABLE attempt_state ADD COLUMN IF NOT EXISTS retry_rule SimpleAggregateFunction(max, String);
ALTER TABLE attempt_state ADD COLUMN IF NOT EXISTS retry_document SimpleAggregateFunction(max, String);

CREATE MATERIALIZED VIEW IF NOT EXISTS attempt_retries_of_events TO attempt_state AS
SELECT
    run_id,
    step_id,
    attempt,
    max(f.account) AS account,
    max(at) AS updated_at,
    max(JSONExtractString(body, 'retry_rule')) AS retry_rule,
    max(JSONExtractString(body, 'retry_document')) AS retry_document
FROM event_facts AS f
WHERE type = 'AttemptEnded' AND (JSONExtractString(body, 'retry_rule') != '' OR JSONExtractString(body, 'retry_document') != '')
GROUP BY run_id, step_id, attempt;

INSERT INTO attempt_state (run_id, step_id, attempt, account, updated_at, retry_rule, retry_document)
SELECT
    run_id, step_id, attempt, max(f.account), max(at), max(JSONExtractString(body, 'retry_rule')), max(JSONExtractString(body, 'retry_document'))
FROM event_facts AS f
WHERE type = 'AttemptEnded' AND (JSONExtractString(body, 'retry_rule') != '' OR JSONExtractString(body, 'retry_document') != '')
GROUP BY run_id, step_id, attempt;

CREATE OR REPLACE VIEW attempts AS
SELECT
    run_id,
    step_id,
    attempt,
    substring(a.outcome, 20) AS outcome,
    late_outcome,
    substring(a.placement, 20) AS instance_id,
    if(a.placement = '', NULL, toInt64(substring(a.placement, 1, 19))) AS incarnation,
    reserved_micros,
    actual_micros,
    JSONExtract(a.usage, 'Map(String, Int64)') AS usage,
    requested_at,
    dispatched_at,
    if(started_ms > 0, fromUnixTimestamp64Milli(started_ms, 'UTC'), NULL) AS entered_at,
    if(finished_ms > 0, fromUnixTimestamp64Milli(finished_ms, 'UTC'), NULL) AS left_at,
    ended_at,
    error_class,
    error_message,
    rule,
    policy,
    account,
    retry_rule,
    retry_document
FROM attempt_state AS a FINAL
WHERE outcome != '';

-- As in 011; a call of a tool without a queue is done outside, also while the gate is asked about it.
CREATE OR REPLACE VIEW steps AS
SELECT
    s.run_id AS run_id,
    s.step_id AS step_id,
    s.node_id AS node_id,
    s.wave AS wave,
    multiIf(
        s.call = '', JSONExtractString(s.wait, 'kind'),
        JSONExtractString(s.call, 'kind') = 'tool' AND JSONExtractString(s.call, 'queue') = '', 'outside',
        JSONExtractString(s.call, 'kind')
    ) AS kind,
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
