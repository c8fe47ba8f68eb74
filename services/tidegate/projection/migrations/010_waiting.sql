-- Events that came after the first release: waits for events, times and answers, pauses, limits and budgets that let an attempt wait,
-- questions that lapse, runs that are steps of others. What older projections stored of them is merged by the last statement;
-- only a step that was held while such a projection read of it stays `requested` until it is asked for, or until a rebuild.
-- `held_by` is what the latest attempt waits for at the gate: 19 digits of the seq, 19 of the time until which (ms), kind, |, reason.

ALTER TABLE run_state ADD COLUMN IF NOT EXISTS pause SimpleAggregateFunction(max, String);
ALTER TABLE run_state ADD COLUMN IF NOT EXISTS parent_run_id SimpleAggregateFunction(max, String);

ALTER TABLE run_state_of_events MODIFY QUERY SELECT
    run_id,
    max(f.account) AS account,
    max(`partition`) AS log_partition,
    max(seq) AS last_seq,
    max(at) AS updated_at,
    max(if((multiIf(
        type = 'RunStarted', 'running',
        type = 'RunRefused', 'refused',
        type = 'RunFinished', JSONExtractString(body, 'status'),
        ''
    ) AS name) = '', '', concat(leftPad(toString(seq), 19, '0'), name))) AS status,
    max(if(type = 'RunStarted', JSONExtractString(body, 'workflow'), '')) AS workflow,
    max(if(type = 'RunStarted', JSONExtractString(body, 'definition_hash'), '')) AS definition_hash,
    max(if(type = 'RunStarted', JSONExtractString(body, 'input'), '')) AS input,
    max(if(type = 'RunStarted', JSONExtract(body, 'budget_micros', 'Nullable(Int64)'), NULL)) AS budget_micros,
    max(if(type = 'RunStarted', JSONExtractRaw(body, 'tags'), '')) AS tags,
    max(if(type = 'RunFinished', JSONExtractString(body, 'output'), '')) AS output,
    max(if(type IN ('RunFinished', 'RunRefused'), JSONExtractString(body, 'code'), '')) AS code,
    max(if(type IN ('RunFinished', 'RunRefused'), JSONExtractString(body, 'reason'), '')) AS reason,
    max(if(type = 'RunFinished', JSONExtractString(body, 'fingerprint'), '')) AS fingerprint,
    max(if(type = 'RunCancelRequested', JSONExtractString(body, 'by'), '')) AS cancelled_by,
    minIf(toNullable(at), type IN ('RunStarted', 'RunRefused')) AS started_at,
    maxIf(toNullable(at), type IN ('RunFinished', 'RunRefused')) AS finished_at,
    maxMap(if(f.actual_micros = 0, CAST(map(), 'Map(UInt64, Int64)'), map(cityHash64(step_id, attempt), f.actual_micros))) AS costs,
    max(multiIf(
        type = 'RunPaused', concat(leftPad(toString(seq), 19, '0'), 'paused by ', JSONExtractString(body, 'by')),
        type IN ('RunResumed', 'RunFinished'), leftPad(toString(seq), 19, '0'),
        ''
    )) AS pause,
    max(if(type = 'RunStarted', JSONExtractString(body, 'parent_run_id'), '')) AS parent_run_id
FROM event_facts AS f
GROUP BY run_id;

ALTER TABLE step_state ADD COLUMN IF NOT EXISTS wait SimpleAggregateFunction(max, String);
ALTER TABLE step_state ADD COLUMN IF NOT EXISTS held_by SimpleAggregateFunction(max, String);

ALTER TABLE step_state_of_events MODIFY QUERY SELECT
    run_id,
    step_id,
    max(f.account) AS account,
    max(at) AS updated_at,
    max(if((multiIf(
        type = 'StepReady', if(JSONExtractBool(body, 'held'), 'held', 'requested'),
        type = 'AttemptRequested', 'requested',
        type = 'AttemptDispatched', 'dispatched',
        type = 'StepSucceeded', 'succeeded',
        type = 'StepFailed', 'failed',
        type = 'StepCancelled', 'cancelled',
        type = 'AttemptEnded', if(JSONExtract(body, 'retry_at_ms', 'Nullable(Int64)') IS NULL, 'ended', 'backing_off'),
        type = 'ApprovalRequested', 'awaiting_approval',
        type = 'ApprovalResolved',
            if(JSONExtractBool(body, 'approved') AND JSONExtractString(body, 'why') = 'policy', 'requested', 'ended'),
        type IN ('ApprovalExpired', 'WaitEnded'), 'ended',
        type = 'WaitStarted', 'waiting',
        type = 'AttemptHeld', 'held',
        type = 'ChildStarted', 'in_child',
        type = 'ChildEnded', if(JSONExtractString(body, 'status') = 'succeeded', 'succeeded', 'failed'),
        ''
    ) AS name) = '', '', concat(leftPad(toString(seq), 19, '0'), name))) AS status,
    max(multiIf(
        type = 'StepReady', if(JSONExtractBool(body, 'held'), 0, 1),
        type = 'ChildStarted', 1,
        type = 'AttemptHeld', 0,
        f.attempt
    )) AS attempts,
    max(if(type IN ('StepReady', 'WaitStarted', 'ChildStarted'), JSONExtractString(body, 'node_id'), '')) AS node_id,
    max(if(type IN ('StepReady', 'WaitStarted', 'ChildStarted'), JSONExtractInt(body, 'wave'), 0)) AS wave,
    max(if(type = 'StepReady', JSONExtractRaw(body, 'call'), '')) AS call,
    max(if(type IN ('StepSucceeded', 'ChildEnded'), JSONExtractString(body, 'output'), '')) AS output,
    max(if(type IN ('StepFailed', 'ChildEnded'), JSONExtractString(body, 'code'), '')) AS code,
    max(if(type IN ('StepFailed', 'ChildEnded'), JSONExtractString(body, 'reason'), '')) AS reason,
    minIf(toNullable(at), type IN ('StepReady', 'WaitStarted', 'ChildStarted')) AS ready_at,
    maxIf(toNullable(at), type IN ('StepSucceeded', 'StepFailed', 'StepCancelled', 'ChildEnded')) AS finished_at,
    maxMap(if(f.actual_micros = 0, CAST(map(), 'Map(Int64, Int64)'), map(f.attempt, f.actual_micros))) AS costs,
    max(multiIf(
        type = 'WaitStarted', body,
        type = 'ChildStarted', concat(
            '{"kind":"workflow","function":', JSONExtractRaw(body, 'workflow'), ',"input":', JSONExtractRaw(body, 'input'), '}'
        ),
        ''
    )) AS wait,
    max(multiIf(
        type = 'AttemptAwaitsBudget', concat(
            leftPad(toString(seq), 19, '0'), leftPad(toString(JSONExtractInt(body, 'until_ms')), 19, '0'),
            'budget|', JSONExtractString(body, 'reason')
        ),
        type = 'StepThrottled', concat(
            leftPad(toString(seq), 19, '0'), leftPad(toString(JSONExtractInt(body, 'retry_at_ms')), 19, '0'),
            if(JSONExtractString(body, 'cause') IN ('queue', 'no_executor'), 'executor', 'limit'), '|',
            JSONExtractString(body, 'reason')
        ),
        ''
    )) AS held_by
FROM event_facts AS f
WHERE step_id != ''
GROUP BY run_id, step_id;

ALTER TABLE attempt_state_of_events MODIFY QUERY SELECT
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
        type = 'ApprovalExpired', 'expired',
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
    max(if(type IN ('AttemptEnded', 'StepSucceeded'), JSONExtractInt(body, 'started_ms'), 0)) AS started_ms,
    max(if(type IN ('AttemptEnded', 'StepSucceeded'), JSONExtractInt(body, 'finished_ms'), 0)) AS finished_ms
FROM event_facts AS f
WHERE step_id != '' AND type != 'AttemptHeld' AND (f.attempt > 0 OR (type = 'StepReady' AND NOT JSONExtractBool(body, 'held')))
GROUP BY run_id, step_id, attempt;

ALTER TABLE approval_state ADD COLUMN IF NOT EXISTS expired_at SimpleAggregateFunction(min, Nullable(DateTime64(3, 'UTC')));
ALTER TABLE approval_state ADD COLUMN IF NOT EXISTS expires_ms SimpleAggregateFunction(max, Int64);

ALTER TABLE approval_state_of_events MODIFY QUERY SELECT
    run_id,
    step_id,
    f.attempt AS attempt,
    if(type = 'ApprovalExpired', 'policy', JSONExtractString(body, 'why')) AS why,
    max(f.account) AS account,
    max(JSONExtractString(body, 'rule')) AS rule,
    max(JSONExtractString(body, 'policy')) AS policy,
    max(if(type = 'ApprovalRequested', JSONExtractString(body, 'reason'), '')) AS question,
    max(JSONExtractString(body, 'arguments_hash')) AS arguments_hash,
    minIf(toNullable(at), type = 'ApprovalRequested') AS requested_at,
    minIf(toNullable(at), type = 'ApprovalResolved') AS resolved_at,
    maxIf(toNullable(CAST(JSONExtractBool(body, 'approved'), 'Bool')), type = 'ApprovalResolved') AS approved,
    max(if(type = 'ApprovalResolved', JSONExtractString(body, 'by'), '')) AS answered_by,
    max(if(type = 'ApprovalResolved', JSONExtractString(body, 'reason'), '')) AS answer,
    minIf(toNullable(at), type = 'ApprovalExpired') AS expired_at,
    max(if(type = 'ApprovalRequested', JSONExtractInt(body, 'expires_at_ms'), 0)) AS expires_ms
FROM event_facts AS f
WHERE type IN ('ApprovalRequested', 'ApprovalResolved', 'ApprovalExpired')
GROUP BY run_id, step_id, attempt, why;

-- Once more into the same table: doubles are merged away, and what is made of them is made as above.
INSERT INTO event_facts (run_id, seq, `partition`, `offset`, epoch, at, account, type, step_id, attempt, actual_micros, cause, body)
SELECT run_id, seq, `partition`, `offset`, epoch, at, account, type, step_id, attempt, actual_micros, cause, body
FROM event_facts FINAL
WHERE type NOT IN (
    'RunRefused', 'CommandRefused', 'AttemptRequested', 'AttemptDispatched', 'ApprovalRequested', 'ApprovalResolved',
    'AttemptEnded', 'StepSucceeded', 'StepFailed', 'StepCancelled', 'ResultIgnored', 'RunCancelRequested', 'RunFinished',
    'RunStarted', 'StepReady'
)
OR (type = 'ApprovalRequested' AND JSONHas(body, 'expires_at_ms'))
OR (type = 'AttemptEnded' AND JSONHas(body, 'started_ms'))
OR (type = 'RunStarted' AND JSONHas(body, 'parent_run_id'));
