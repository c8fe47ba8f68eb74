-- What the gate decided, and the money. Both are computed over deduplicated facts at the time of the query.

CREATE VIEW IF NOT EXISTS decisions AS
SELECT
    run_id,
    step_id,
    attempt,
    multiIf(type = 'AttemptPlaced', 'allow', type = 'AttemptRefused', 'deny', 'require_approval') AS decision,
    JSONExtractString(body, 'rule') AS rule,
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
WHERE type IN ('AttemptPlaced', 'AttemptRefused', 'ApprovalHeld');

-- Per run: set aside and not yet ended, spent, and how much of that was beyond what had been set aside.
CREATE VIEW IF NOT EXISTS spend AS
SELECT
    account,
    run_id,
    max(f.budget_micros) AS budget_micros,
    sumIf(f.reserved_micros, type = 'AttemptReserved')
        - sumIf(f.reserved_micros, type IN ('AttemptSettled', 'AttemptReleased')) AS reserved_micros,
    sumIf(f.actual_micros, type = 'AttemptSettled') AS settled_micros,
    sumIf(f.overshoot_micros, type = 'AttemptSettled') AS overshoot_micros,
    countIf(type = 'AttemptSettled') AS settlements,
    min(at) AS first_at,
    max(at) AS last_at
FROM ledger_facts AS f FINAL
GROUP BY account, run_id;
