-- Which version of its code an attempt was entered with

ALTER TABLE attempt_state ADD COLUMN IF NOT EXISTS code_version SimpleAggregateFunction(max, String);

CREATE MATERIALIZED VIEW IF NOT EXISTS attempt_code_of_events TO attempt_state AS
SELECT
    run_id,
    step_id,
    attempt,
    max(f.account) AS account,
    max(at) AS updated_at,
    max(JSONExtractString(body, 'code_version')) AS code_version
FROM event_facts AS f
WHERE type IN ('StepSucceeded', 'AttemptEnded') AND JSONExtractString(body, 'code_version') != ''
GROUP BY run_id, step_id, attempt;

INSERT INTO attempt_state (run_id, step_id, attempt, account, updated_at, code_version)
SELECT run_id, step_id, attempt, max(f.account), max(at), max(JSONExtractString(body, 'code_version'))
FROM event_facts AS f
WHERE type IN ('StepSucceeded', 'AttemptEnded') AND JSONExtractString(body, 'code_version') != ''
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
    retry_document,
    code_version
FROM attempt_state AS a FINAL
WHERE outcome != '';
