-- Steps and attempts, merged like runs. The names of statuses are those of the scheduler's own tables (`domain/states.py`).
-- `status` and `outcome` begin with 19 digits of the seq, `placement` with 19 digits of the incarnation: see 002.

CREATE TABLE IF NOT EXISTS step_state
(
    run_id String,
    step_id String,
    account SimpleAggregateFunction(max, String),
    updated_at SimpleAggregateFunction(max, DateTime64(3, 'UTC')),
    status SimpleAggregateFunction(max, String),
    attempts SimpleAggregateFunction(max, Int64),
    node_id SimpleAggregateFunction(max, String),
    wave SimpleAggregateFunction(max, Int64),
    call SimpleAggregateFunction(max, String),
    output SimpleAggregateFunction(max, String),
    code SimpleAggregateFunction(max, String),
    reason SimpleAggregateFunction(max, String),
    ready_at SimpleAggregateFunction(min, Nullable(DateTime64(3, 'UTC'))),
    finished_at SimpleAggregateFunction(max, Nullable(DateTime64(3, 'UTC'))),
    costs SimpleAggregateFunction(maxMap, Map(Int64, Int64))
)
ENGINE = AggregatingMergeTree
ORDER BY (run_id, step_id);

CREATE MATERIALIZED VIEW IF NOT EXISTS step_state_of_events TO step_state AS
SELECT
    run_id,
    step_id,
    max(f.account) AS account,
    max(at) AS updated_at,
    max(if((multiIf(
        type IN ('StepReady', 'AttemptRequested'), 'requested',
        type = 'AttemptDispatched', 'dispatched',
        type = 'StepSucceeded', 'succeeded',
        type = 'StepFailed', 'failed',
        type = 'StepCancelled', 'cancelled',
        type = 'AttemptEnded', if(JSONExtract(body, 'retry_at_ms', 'Nullable(Int64)') IS NULL, 'ended', 'backing_off'),
        type = 'ApprovalRequested', 'awaiting_approval',
        type = 'ApprovalResolved',
            if(JSONExtractBool(body, 'approved') AND JSONExtractString(body, 'why') = 'policy', 'requested', 'ended'),
        ''
    ) AS name) = '', '', concat(leftPad(toString(seq), 19, '0'), name))) AS status,
    max(if(type = 'StepReady', 1, f.attempt)) AS attempts,
    max(if(type = 'StepReady', JSONExtractString(body, 'node_id'), '')) AS node_id,
    max(if(type = 'StepReady', JSONExtractInt(body, 'wave'), 0)) AS wave,
    max(if(type = 'StepReady', JSONExtractRaw(body, 'call'), '')) AS call,
    max(if(type = 'StepSucceeded', JSONExtractString(body, 'output'), '')) AS output,
    max(if(type = 'StepFailed', JSONExtractString(body, 'code'), '')) AS code,
    max(if(type = 'StepFailed', JSONExtractString(body, 'reason'), '')) AS reason,
    minIf(toNullable(at), type = 'StepReady') AS ready_at,
    maxIf(toNullable(at), type IN ('StepSucceeded', 'StepFailed', 'StepCancelled')) AS finished_at,
    maxMap(if(f.actual_micros = 0, CAST(map(), 'Map(Int64, Int64)'), map(f.attempt, f.actual_micros))) AS costs
FROM event_facts AS f
WHERE step_id != ''
GROUP BY run_id, step_id;

CREATE TABLE IF NOT EXISTS attempt_state
(
    run_id String,
    step_id String,
    attempt Int64,
    account SimpleAggregateFunction(max, String),
    updated_at SimpleAggregateFunction(max, DateTime64(3, 'UTC')),
    outcome SimpleAggregateFunction(max, String),
    placement SimpleAggregateFunction(max, String),
    rule SimpleAggregateFunction(max, String),
    policy SimpleAggregateFunction(max, String),
    reserved_micros SimpleAggregateFunction(max, Int64),
    actual_micros SimpleAggregateFunction(max, Int64),
    usage SimpleAggregateFunction(max, String),
    error_class SimpleAggregateFunction(max, String),
    error_message SimpleAggregateFunction(max, String),
    late_outcome SimpleAggregateFunction(max, String),
    requested_at SimpleAggregateFunction(min, Nullable(DateTime64(3, 'UTC'))),
    dispatched_at SimpleAggregateFunction(min, Nullable(DateTime64(3, 'UTC'))),
    ended_at SimpleAggregateFunction(max, Nullable(DateTime64(3, 'UTC'))),
    started_ms SimpleAggregateFunction(max, Int64),
    finished_ms SimpleAggregateFunction(max, Int64)
)
ENGINE = AggregatingMergeTree
ORDER BY (run_id, step_id, attempt);

-- A step's cancellation names attempt 0 if none is out: that is no attempt. A first attempt is implied by `StepReady`.
CREATE MATERIALIZED VIEW IF NOT EXISTS attempt_state_of_events TO attempt_state AS
SELECT
    run_id,
    step_id,
    if(type = 'StepReady', 1, f.attempt) AS attempt,
    max(f.account) AS account,
    max(at) AS updated_at,
    max(if((multiIf(
        type IN ('StepReady', 'AttemptRequested'), 'requested',
        type = 'AttemptDispatched', 'dispatched',
        type = 'StepSucceeded', 'succeeded',
        type = 'AttemptEnded', JSONExtractString(body, 'outcome'),
        type = 'StepCancelled', 'cancelled',
        type = 'ApprovalRequested' AND JSONExtractString(body, 'why') = 'policy', 'awaiting_approval',
        type = 'ApprovalResolved' AND JSONExtractString(body, 'why') = 'policy',
            if(JSONExtractBool(body, 'approved'), 'requested', 'rejected'),
        ''
    ) AS name) = '', '', concat(leftPad(toString(seq), 19, '0'), name))) AS outcome,
    max(if(
        type IN ('AttemptDispatched', 'AttemptEnded', 'StepSucceeded', 'ResultIgnored'),
        if(
            JSONExtractInt(body, 'incarnation') < 0, '',
            concat(leftPad(toString(JSONExtractInt(body, 'incarnation')), 19, '0'), JSONExtractString(body, 'instance_id'))
        ),
        ''
    )) AS placement,
    max(if(type = 'AttemptDispatched', JSONExtractString(body, 'rule'), '')) AS rule,
    max(if(type = 'AttemptDispatched', JSONExtractString(body, 'policy'), '')) AS policy,
    max(if(type = 'AttemptDispatched', JSONExtractInt(body, 'reserved_micros'), 0)) AS reserved_micros,
    max(f.actual_micros) AS actual_micros,
    max(if(type IN ('AttemptEnded', 'StepSucceeded'), JSONExtractRaw(body, 'usage'), '')) AS usage,
    max(if(type = 'AttemptEnded', JSONExtractString(body, 'error_class'), '')) AS error_class,
    max(if(type = 'AttemptEnded', JSONExtractString(body, 'error_message'), '')) AS error_message,
    max(if(type = 'ResultIgnored', JSONExtractString(body, 'outcome'), '')) AS late_outcome,
    minIf(toNullable(at), type IN ('StepReady', 'AttemptRequested')) AS requested_at,
    minIf(toNullable(at), type = 'AttemptDispatched') AS dispatched_at,
    maxIf(toNullable(at), type IN ('AttemptEnded', 'StepSucceeded', 'StepCancelled')) AS ended_at,
    max(if(type = 'StepSucceeded', JSONExtractInt(body, 'started_ms'), 0)) AS started_ms,
    max(if(type = 'StepSucceeded', JSONExtractInt(body, 'finished_ms'), 0)) AS finished_ms
FROM event_facts AS f
WHERE step_id != '' AND (f.attempt > 0 OR type = 'StepReady')
GROUP BY run_id, step_id, attempt;

CREATE VIEW IF NOT EXISTS steps AS
SELECT
    run_id,
    step_id,
    s.node_id AS node_id,
    s.wave AS wave,
    JSONExtractString(call, 'kind') AS kind,
    JSONExtractString(call, 'function') AS function,
    substring(s.status, 20) AS status,
    s.attempts AS attempts,
    arraySum(mapValues(costs)) AS spent_micros,
    ready_at,
    finished_at,
    updated_at,
    JSONExtractString(call, 'arguments') AS arguments,
    output,
    code,
    reason,
    JSONExtractString(call, 'queue') AS queue,
    account
FROM step_state AS s FINAL
WHERE status != '';

CREATE VIEW IF NOT EXISTS attempts AS
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
    account
FROM attempt_state AS a FINAL
WHERE outcome != '';
