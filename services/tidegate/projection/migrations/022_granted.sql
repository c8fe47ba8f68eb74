-- An attempt that is let through at once is reserved and placed by one event, AttemptGranted: it counts wherever one of the two did.

CREATE OR REPLACE VIEW budgets AS
SELECT
    account,
    run_id,
    max(f.budget_micros) AS budget_micros,
    sumIf(f.reserved_micros, type IN ('AttemptGranted', 'AttemptReserved'))
        - sumIf(f.reserved_micros, type IN ('AttemptSettled', 'AttemptReleased')) AS reserved_micros,
    sumIf(f.actual_micros, type = 'AttemptSettled') AS settled_micros,
    sumIf(f.overshoot_micros, type = 'AttemptSettled') AS overshoot_micros,
    countIf(type = 'AttemptSettled') AS settlements,
    min(at) AS first_at,
    max(at) AS last_at
FROM ledger_facts AS f FINAL
WHERE run_id != '' AND NOT startsWith(type, 'Budget') AND NOT startsWith(type, 'Lease')
GROUP BY account, run_id;

CREATE OR REPLACE VIEW decisions AS
SELECT
    run_id,
    step_id,
    attempt,
    multiIf(
        type IN ('AttemptGranted', 'AttemptPlaced'), 'allow',
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
WHERE type IN (
    'AttemptGranted', 'AttemptPlaced', 'AttemptRefused', 'ApprovalHeld', 'AttemptThrottled', 'AttemptPaused', 'ApprovalLapsed'
);

CREATE OR REPLACE VIEW queues AS
SELECT
    queue,
    sum(q.waiting) AS waiting,
    uniqExactIf(q.ledger, q.waiting > 0) AS partitions,
    min(q.since) AS oldest,
    sum(q.executors) AS executors,
    sum(q.slots) AS slots,
    sum(q.busy) AS busy,
    sum(q.queued) / 60 AS queued_per_s,
    sum(q.placed) / 60 AS placed_per_s
FROM (
    SELECT
        w.queue AS queue, 1 AS waiting, l.ledger AS ledger, toNullable(w.since) AS since,
        0 AS executors, 0 AS slots, 0 AS busy, 0 AS queued, 0 AS placed
    FROM (SELECT * FROM waits WHERE waits_for = 'executor') AS w
    LEFT ANY JOIN (SELECT run_id, ledger FROM ledger_facts WHERE type = 'RunOpened') AS l ON l.run_id = w.run_id
    UNION ALL
    SELECT queue, 0, 0, NULL, 1, i.slots, i.slots - i.free_slots, 0, 0
    FROM instances AS i
    WHERE service = 'executor' AND state = 'ready' AND heartbeat_at > now() - INTERVAL 1 MINUTE
    UNION ALL
    SELECT JSONExtractString(body, 'call', 'queue'), 0, 0, NULL, 0, 0, 0, type = 'AttemptQueued', type != 'AttemptQueued'
    FROM ledger_facts FINAL
    WHERE type IN ('AttemptGranted', 'AttemptQueued', 'AttemptPlaced') AND at > now() - INTERVAL 1 MINUTE
) AS q
GROUP BY queue;

CREATE OR REPLACE VIEW account_budgets AS
SELECT
    bucket,
    argMaxIf(b.account, b.seq, type = 'BudgetSet') AS account,
    argMaxIf(JSONExtractString(said, 'budget'), b.seq, type = 'BudgetSet') AS budget,
    argMaxIf(JSONExtractString(said, 'version'), b.seq, type = 'BudgetSet') AS version,
    argMaxIf(JSONExtract(said, 'limits', 'micros', 'Nullable(Int64)'), b.seq, type = 'BudgetSet') AS limit_micros,
    sumIf(b.amounts.amounts.micros, type IN ('AttemptGranted', 'AttemptReserved', 'BudgetReserved'))
        - sumIf(b.amounts.amounts.micros, type = 'BudgetsReleased')
        - sumIf(b.amounts.set_aside.micros, type = 'AttemptSettled')
        - sumIf(b.amounts.reserved.micros, type = 'BudgetSettled') AS reserved_micros,
    sumIf(actual_micros, type = 'AttemptSettled') + sumIf(b.amounts.used.micros, type = 'BudgetSettled') AS spent_micros,
    argMaxIf(JSONExtractString(said, 'on_exceed'), b.seq, type = 'BudgetSet') AS on_exceed,
    maxIf(fromUnixTimestamp64Milli(JSONExtractInt(said, 'from_ms'), 'UTC'), type = 'BudgetSet') AS from_at,
    maxIf(
        toNullable(fromUnixTimestamp64Milli(JSONExtractInt(said, 'until_ms'), 'UTC')),
        type = 'BudgetSet' AND JSONExtractInt(said, 'until_ms') > 0
    ) AS until_at,
    countIf(type = 'BudgetClosed') > 0 AS is_closed,
    max(at) AS last_at
FROM (
    SELECT
        type, account, seq, at, actual_micros,
        JSONExtract(
            body,
            'Tuple(bucket String, buckets Array(String), counts Bool, amounts Tuple(micros Int64), set_aside Tuple(micros Int64), '
            || 'reserved Tuple(micros Int64), used Tuple(micros Int64))'
        ) AS amounts,
        arrayJoin(
            multiIf(
                type = 'AttemptReserved', if(amounts.counts, amounts.buckets, []),
                type IN ('AttemptGranted', 'AttemptSettled', 'BudgetsReleased'), amounts.buckets,
                [amounts.bucket]
            )
        ) AS bucket,
        if(type = 'BudgetSet', body, '') AS said
    FROM ledger_facts FINAL
    WHERE type IN (
        'AttemptGranted', 'AttemptReserved', 'AttemptSettled', 'BudgetsReleased', 'BudgetSet', 'BudgetReserved', 'BudgetSettled',
        'BudgetClosed'
    )
) AS b
GROUP BY bucket;
