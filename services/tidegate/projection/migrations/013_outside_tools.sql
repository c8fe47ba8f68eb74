-- Calls of tools that somebody outside does are waits for an answer.

-- What every unfinished step waits for, and since when: approval, answer, event, time, retry, resume (its run or queue is paused),
-- budget, limit, executor (a free slot), function (it runs), run (another run does it), or gate (its decision). An attempt that the
-- gate queued is told nothing until a slot is free: whether it stands in a queue is the ledger's to say.
CREATE OR REPLACE VIEW waits AS
SELECT
    s.run_id AS run_id,
    s.step_id AS step_id,
    s.attempts AS attempt,
    multiIf(
        s.name = 'awaiting_approval', 'approval',
        s.name = 'waiting', multiIf(s.kind IN ('ask', 'outside'), 'answer', s.kind = 'wait_event', 'event', 'time'),
        s.name = 'backing_off', 'retry',
        s.name = 'held', 'resume',
        s.name = 'in_child', 'run',
        s.name = 'dispatched', 'function',
        s.is_held, s.held_for,
        q.queued > 0, 'executor',
        'gate'
    ) AS waits_for,
    if(s.call = '', JSONExtractString(s.wait, 'function'), JSONExtractString(s.call, 'function')) AS function,
    JSONExtractString(s.call, 'queue') AS queue,
    s.updated_at AS since,
    multiIf(
        s.name = 'waiting', fromUnixTimestamp64Milli(
            coalesce(JSONExtract(s.wait, 'due_ms', 'Nullable(Int64)'), JSONExtract(s.wait, 'timeout_at_ms', 'Nullable(Int64)')), 'UTC'
        ),
        s.name = 'requested' AND s.is_held AND s.held_ms > 0, fromUnixTimestamp64Milli(s.held_ms, 'UTC'),
        s.name = 'awaiting_approval', a.expires_at,
        e.due_at
    ) AS due_at,
    s.account AS account,
    multiIf(
        s.name = 'waiting', coalesce(
            nullIf(JSONExtractString(s.wait, 'prompt'), ''), concat(JSONExtractString(s.wait, 'event'), ' ', JSONExtractString(s.wait, 'key'))
        ),
        s.name = 'requested' AND s.is_held, s.held_reason,
        s.name = 'awaiting_approval', a.question,
        ''
    ) AS detail
FROM (
    SELECT
        run_id,
        step_id,
        attempts,
        substring(w.status, 20) AS name,
        JSONExtractString(w.wait, 'kind') AS kind,
        w.held_by > w.status AS is_held,
        toInt64OrZero(substring(w.held_by, 20, 19)) AS held_ms,
        substringIndex(substring(w.held_by, 39), '|', 1) AS held_for,
        substring(w.held_by, 40 + length(held_for)) AS held_reason,
        wait,
        call,
        updated_at,
        account
    FROM step_state AS w FINAL
    WHERE name IN ('requested', 'dispatched', 'awaiting_approval', 'backing_off', 'waiting', 'held', 'in_child')
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
) AS e ON e.run_id = s.run_id AND e.step_id = s.step_id AND e.attempt = s.attempts AND s.name = 'backing_off'
LEFT ANY JOIN (
    SELECT
        run_id, step_id, attempt, max(d.question) AS question,
        if(max(d.expires_ms) > 0, fromUnixTimestamp64Milli(max(d.expires_ms), 'UTC'), NULL) AS expires_at
    FROM approval_state AS d
    GROUP BY run_id, step_id, attempt
) AS a ON a.run_id = s.run_id AND a.step_id = s.step_id AND a.attempt = s.attempts;
