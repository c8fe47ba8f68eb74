"""The dashboard of whoever scales: processes, slots, queues, and how long work waits for them."""

from __future__ import annotations

from typing import Final

from tidegate.projection.dashboards.panels import BARS, SERIES, STAT, TABLE, Dashboard, Panel

EXECUTORS: Final = Dashboard(
    "executors",
    "executors and queues",
    "Who is there, how busy they are, what waits for them, and what was lost with them.",
    (
        Panel(
            "Slots",
            STAT,
            """
SELECT sum(i.slots) AS slots, sum(i.slots - i.free_slots) AS busy, if(slots = 0, 0, busy / slots) AS used
FROM ${database}.instances AS i
WHERE service = 'executor' AND state = 'ready' AND heartbeat_at > now() - INTERVAL 1 MINUTE
""",
            "Of the executors that reported within the last minute, whatever time is looked at.",
            height=4,
            units={"used": "percentunit"},
        ),
        Panel(
            "Waiting for an executor",
            STAT,
            """
SELECT count() AS attempts, if(count() = 0, 0, dateDiff('second', min(since), now())) AS "oldest"
FROM ${database}.waits
WHERE waits_for = 'executor'
""",
            "Attempts that were let through and have no slot, now. If executors serve their queue, it is slots that lack.",
            height=4,
            units={"oldest": "s"},
        ),
        Panel(
            "Queues",
            TABLE,
            """
SELECT
    queue, executors, slots, busy, waiting, oldest, queued_per_s AS "had to wait", placed_per_s AS placed,
    if(waiting > 0 AND executors = 0, 'nobody serves it', '') AS trouble
FROM ${database}.queues
ORDER BY waiting DESC, queue
""",
            "Each queue with who serves it and what the gate has waiting in it, over all partitions of the ledger, now; and how "
            "many attempts a second had to wait and were placed over the last minute.",
            width=24,
        ),
        Panel(
            "Processes",
            TABLE,
            """
SELECT
    service, instance_id, state, queue, slots, slots - free_slots AS busy, host, pid, version, incarnation, started_at,
    dateDiff('second', heartbeat_at, now()) AS "silent for"
FROM ${database}.instances
ORDER BY service, instance_id
LIMIT 500
""",
            "Every process that is registered. Heartbeats come every second; a long silence is a death.",
            width=24,
            units={"silent for": "s"},
        ),
        Panel(
            "Attempts placed",
            SERIES,
            """
SELECT $__timeInterval(at) AS time, instance_id, count() AS attempts
FROM ${database}.decisions
WHERE $__timeFilter(at) AND decision = 'allow' AND :scope
GROUP BY time, instance_id
ORDER BY time, instance_id
""",
            "Work by executor over time.",
            stacked=True,
        ),
        Panel(
            "Wait for a slot",
            SERIES,
            """
SELECT
    $__timeInterval(at) AS time,
    quantileExact(0.5)(ms) AS p50,
    quantileExact(0.95)(ms) AS p95,
    max(ms) AS longest
FROM (
    SELECT d.at AS at, greatest(0, dateDiff('millisecond', a.requested_at, d.at)) AS ms
    FROM (
        SELECT at, run_id, step_id, attempt
        FROM ${database}.decisions
        WHERE decision = 'allow' AND $__timeFilter(at) AND :scope
    ) AS d
    INNER JOIN ${database}.attempts AS a ON a.run_id = d.run_id AND a.step_id = d.step_id AND a.attempt = d.attempt
)
GROUP BY time
ORDER BY time
""",
            "From the request of an attempt to its placement: the gate, an approval if one was needed, and the queue for a slot.",
            units={"": "ms"},
        ),
        Panel(
            "Work by executor",
            TABLE,
            """
SELECT
    instance_id,
    count() AS attempts,
    countIf(outcome = 'succeeded') AS succeeded,
    countIf(outcome = 'lost') AS lost,
    sum(dateDiff('millisecond', entered_at, left_at)) / 1000 AS "seconds in functions"
FROM ${database}.attempts
WHERE $__timeFilter(ended_at) AND instance_id != '' AND :scope
GROUP BY instance_id
ORDER BY attempts DESC, instance_id
LIMIT 200
""",
            "Attempts that ended in this time. Seconds in functions: of attempts whose end told their times.",
        ),
        Panel(
            "Retries",
            BARS,
            """
SELECT s.function AS function, count() AS retries
FROM (
    SELECT run_id, step_id
    FROM ${database}.attempts
    WHERE $__timeFilter(requested_at) AND attempt > 1 AND :scope
) AS a
INNER JOIN ${database}.steps AS s ON s.run_id = a.run_id AND s.step_id = a.step_id
GROUP BY function
ORDER BY retries DESC, function
LIMIT 30
""",
            "Attempts after the first, by function.",
        ),
        Panel(
            "Attempts that did not succeed",
            TABLE,
            """
SELECT ended_at, run_id, step_id, attempt, outcome, instance_id, error_class, error_message
FROM ${database}.attempts
WHERE $__timeFilter(ended_at) AND outcome IN ('failed', 'timed_out', 'lost', 'busy', 'released') AND :scope
ORDER BY ended_at DESC, run_id, step_id
LIMIT 200
""",
            "Failed, timed out, lost with their executor, or handed back; newest first.",
            width=24,
        ),
    ),
    since="now-6h",
)
