-- What events say of an attempt is merged by one view: each view costs some milliseconds of every insert, whether it finds something or not.
-- In between both say the same of an event, which changes nothing.

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
    max(if(type IN ('AttemptEnded', 'StepSucceeded'), JSONExtractInt(body, 'finished_ms'), 0)) AS finished_ms,
    max(if(type = 'AttemptEnded', JSONExtractString(body, 'retry_rule'), '')) AS retry_rule,
    max(if(type = 'AttemptEnded', JSONExtractString(body, 'retry_document'), '')) AS retry_document,
    max(if(type IN ('AttemptEnded', 'StepSucceeded'), JSONExtractString(body, 'code_version'), '')) AS code_version
FROM event_facts AS f
WHERE step_id != '' AND type != 'AttemptHeld' AND (f.attempt > 0 OR (type = 'StepReady' AND NOT JSONExtractBool(body, 'held')))
GROUP BY run_id, step_id, attempt;

DROP VIEW IF EXISTS attempt_retries_of_events;

DROP VIEW IF EXISTS attempt_code_of_events;
