-- What every unfinished step waits for, and since when: a human, an executor, the end of a back-off, the gate, or its own function.
-- `due_at` is when a back-off ends. An attempt that the gate queued is told nothing until a slot is free, so its run knows no more
-- than that it was asked for: whether it stands in the queue is the ledger's to say.

CREATE VIEW IF NOT EXISTS waits AS
SELECT
    s.run_id AS run_id,
    s.step_id AS step_id,
    s.attempts AS attempt,
    multiIf(
        s.status = 'awaiting_approval', 'approval',
        s.status = 'backing_off', 'retry',
        s.status = 'dispatched', 'function',
        q.queued > 0, 'executor',
        'gate'
    ) AS waits_for,
    s.function AS function,
    s.queue AS queue,
    s.updated_at AS since,
    e.due_at AS due_at,
    s.account AS account
FROM (
    SELECT run_id, step_id, attempts, status, function, queue, updated_at, account
    FROM steps
    WHERE status IN ('requested', 'dispatched', 'awaiting_approval', 'backing_off')
) AS s
LEFT ANY JOIN (
    SELECT run_id, step_id, attempt, count() AS queued
    FROM ledger_facts FINAL
    WHERE type = 'AttemptQueued'
    GROUP BY run_id, step_id, attempt
) AS q ON q.run_id = s.run_id AND q.step_id = s.step_id AND q.attempt = s.attempts
LEFT ANY JOIN (
    SELECT
        run_id,
        step_id,
        attempt,
        max(fromUnixTimestamp64Milli(JSONExtract(body, 'retry_at_ms', 'Nullable(Int64)'), 'UTC')) AS due_at
    FROM event_facts FINAL
    WHERE type = 'AttemptEnded'
    GROUP BY run_id, step_id, attempt
) AS e ON e.run_id = s.run_id AND e.step_id = s.step_id AND e.attempt = s.attempts AND s.status = 'backing_off';
