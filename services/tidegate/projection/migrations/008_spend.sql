-- Money by what it was spent on. `spend` had one row per account and run; those rows are `budgets` now, and `spend` has one per
-- day, run and function, from which sums by account, workflow, model or tool follow. Both are computed over deduplicated facts.

-- Per run: set aside and not yet ended, spent, and how much of that was beyond what had been set aside.
CREATE VIEW IF NOT EXISTS budgets AS
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
WHERE run_id != '' AND NOT startsWith(type, 'Budget') AND NOT startsWith(type, 'Lease')
GROUP BY account, run_id;

-- Money by day, run and function. `model` is what the step's call names, if it names one.
CREATE OR REPLACE VIEW spend AS
SELECT
    toDate(l.at) AS day,
    l.account AS account,
    if(
        position(r.workflow, '@') = 0,
        r.workflow,
        substring(r.workflow, 1, length(r.workflow) - position(reverse(r.workflow), '@'))
    ) AS workflow,
    s.kind AS kind,
    s.function AS function,
    if(s.kind = 'tool', s.function, '') AS tool,
    s.model AS model,
    l.run_id AS run_id,
    sum(l.actual_micros) AS settled_micros,
    sum(l.overshoot_micros) AS overshoot_micros,
    count() AS settlements
FROM (
    SELECT at, account, run_id, step_id, actual_micros, overshoot_micros
    FROM ledger_facts FINAL
    WHERE type = 'AttemptSettled'
) AS l
LEFT ANY JOIN (
    SELECT
        run_id,
        step_id,
        JSONExtractString(call, 'kind') AS kind,
        JSONExtractString(call, 'function') AS function,
        JSONExtractString(call, 'model') AS model
    FROM step_state FINAL
) AS s ON s.run_id = l.run_id AND s.step_id = l.step_id
LEFT ANY JOIN (SELECT run_id, workflow FROM run_state FINAL) AS r ON r.run_id = l.run_id
GROUP BY day, account, workflow, kind, function, tool, model, run_id;

-- Budgets of accounts, one row per bucket: a budget, an account path and a window (or a run). Money only; tokens, calls and time are in
-- the bodies of the ledger's events. A bucket that is closed is over, and nothing is set aside in it.
CREATE VIEW IF NOT EXISTS account_budgets AS
SELECT
    JSONExtractString(body, 'bucket') AS bucket,
    max(f.account) AS account,
    argMaxIf(JSONExtractString(body, 'budget'), f.seq, type = 'BudgetSet') AS budget,
    argMaxIf(JSONExtractString(body, 'version'), f.seq, type = 'BudgetSet') AS version,
    argMaxIf(JSONExtract(body, 'limits', 'micros', 'Nullable(Int64)'), f.seq, type = 'BudgetSet') AS limit_micros,
    sumIf(JSONExtractInt(body, 'amounts', 'micros'), type = 'BudgetReserved')
        - sumIf(JSONExtractInt(body, 'reserved', 'micros'), type = 'BudgetSettled') AS reserved_micros,
    sumIf(JSONExtractInt(body, 'used', 'micros'), type = 'BudgetSettled') AS spent_micros,
    argMaxIf(JSONExtractString(body, 'on_exceed'), f.seq, type = 'BudgetSet') AS on_exceed,
    maxIf(fromUnixTimestamp64Milli(JSONExtractInt(body, 'from_ms'), 'UTC'), type = 'BudgetSet') AS from_at,
    maxIf(fromUnixTimestamp64Milli(JSONExtractInt(body, 'until_ms'), 'UTC'), type = 'BudgetSet' AND JSONExtractInt(body, 'until_ms') > 0)
        AS until_at,
    countIf(type = 'BudgetClosed') > 0 AS is_closed,
    max(at) AS last_at
FROM ledger_facts AS f FINAL
WHERE type IN ('BudgetSet', 'BudgetReserved', 'BudgetSettled', 'BudgetClosed')
GROUP BY bucket;
