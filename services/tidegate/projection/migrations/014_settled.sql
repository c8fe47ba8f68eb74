-- What an attempt cost is what the ledger settled: where a function reports tokens and no amount, only the gate knows it, by the price
-- table. So the ledger's settlements are merged into the same maps of costs as the results of the run's own log, which come first: of
-- both the larger counts, and they differ only where a result named no amount. What is stored already is merged by the last
-- statements, as often as one likes.

CREATE MATERIALIZED VIEW IF NOT EXISTS run_state_of_ledger TO run_state AS
SELECT
    run_id,
    max(l.account) AS account,
    max(at) AS updated_at,
    maxMap(map(cityHash64(step_id, attempt), l.actual_micros)) AS costs
FROM ledger_facts AS l
WHERE type = 'AttemptSettled' AND l.actual_micros > 0
GROUP BY run_id;

CREATE MATERIALIZED VIEW IF NOT EXISTS step_state_of_ledger TO step_state AS
SELECT
    run_id,
    step_id,
    max(l.account) AS account,
    max(at) AS updated_at,
    maxMap(map(l.attempt, l.actual_micros)) AS costs
FROM ledger_facts AS l
WHERE type = 'AttemptSettled' AND l.actual_micros > 0
GROUP BY run_id, step_id;

CREATE MATERIALIZED VIEW IF NOT EXISTS attempt_state_of_ledger TO attempt_state AS
SELECT
    run_id,
    step_id,
    attempt,
    max(l.account) AS account,
    max(at) AS updated_at,
    max(l.actual_micros) AS actual_micros
FROM ledger_facts AS l
WHERE type = 'AttemptSettled' AND l.actual_micros > 0
GROUP BY run_id, step_id, attempt;

INSERT INTO run_state (run_id, account, updated_at, costs)
SELECT run_id, max(l.account), max(at), maxMap(map(cityHash64(step_id, attempt), l.actual_micros))
FROM ledger_facts AS l WHERE type = 'AttemptSettled' AND l.actual_micros > 0 GROUP BY run_id;

INSERT INTO step_state (run_id, step_id, account, updated_at, costs)
SELECT run_id, step_id, max(l.account), max(at), maxMap(map(l.attempt, l.actual_micros))
FROM ledger_facts AS l WHERE type = 'AttemptSettled' AND l.actual_micros > 0 GROUP BY run_id, step_id;

INSERT INTO attempt_state (run_id, step_id, attempt, account, updated_at, actual_micros)
SELECT run_id, step_id, attempt, max(l.account), max(at), max(l.actual_micros)
FROM ledger_facts AS l WHERE type = 'AttemptSettled' AND l.actual_micros > 0 GROUP BY run_id, step_id, attempt;
