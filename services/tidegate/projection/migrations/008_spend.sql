-- Money by what it was spent on. `spend` had one row per account and run; those rows are `budgets` now, and `spend` has one per
-- day, run and function, from which sums by account, workflow, model or tool follow. Both are computed over deduplicated facts.

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
WHERE run_id != ''
GROUP BY account, run_id;

-- `model` is what the step's call names, if it names one.
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
