"""The dashboard of whoever keeps the system running: what goes in, what comes out, what fails, what hangs."""

from __future__ import annotations

from typing import Final

from tidegate.projection.dashboards.panels import BARS, SERIES, STAT, TABLE, Dashboard, Panel

OPERATIONS: Final = Dashboard(
    "operations",
    "operations",
    "Runs in and out, throughput, errors, durations, and what needs somebody to look at it.",
    (
        Panel(
            "Runs by status",
            BARS,
            """
SELECT status, count() AS runs
FROM ${database}.runs
WHERE $__timeFilter(started_at) AND :scope
GROUP BY status
ORDER BY runs DESC, status
""",
            "Runs that were started (or refused) in this time, by how they stand now.",
            width=8,
        ),
        Panel(
            "Runs started and finished",
            SERIES,
            """
SELECT $__timeInterval(at) AS time, countIf(type = 'RunStarted') AS started, countIf(type = 'RunFinished') AS finished
FROM ${database}.events
WHERE $__timeFilter(at) AND type IN ('RunStarted', 'RunFinished') AND :scope
GROUP BY time
ORDER BY time
""",
            "Started faster than finished for long: a backlog grows.",
            width=8,
        ),
        Panel(
            "Failed runs, share",
            SERIES,
            """
SELECT $__timeInterval(finished_at) AS time, countIf(status = 'failed') / count() AS failed
FROM ${database}.runs
WHERE $__timeFilter(finished_at) AND status IN ('succeeded', 'failed', 'cancelled') AND :scope
GROUP BY time
ORDER BY time
""",
            "Of the runs that ended, how many failed.",
            width=8,
            units={"": "percentunit"},
        ),
        Panel(
            "Steps finished",
            SERIES,
            """
SELECT
    $__timeInterval(at) AS time,
    countIf(type = 'StepSucceeded') AS succeeded,
    countIf(type = 'StepFailed') AS failed,
    countIf(type = 'StepCancelled') AS cancelled
FROM ${database}.events
WHERE $__timeFilter(at) AND type IN ('StepSucceeded', 'StepFailed', 'StepCancelled') AND :scope
GROUP BY time
ORDER BY time
""",
            "Throughput in steps.",
            stacked=True,
        ),
        Panel(
            "Duration of runs",
            SERIES,
            """
SELECT
    $__timeInterval(finished_at) AS time,
    quantileExact(0.5)(ms) AS p50,
    quantileExact(0.95)(ms) AS p95,
    quantileExact(0.99)(ms) AS p99
FROM (
    SELECT finished_at, account, dateDiff('millisecond', started_at, finished_at) AS ms
    FROM ${database}.runs
    WHERE status = 'succeeded'
)
WHERE $__timeFilter(finished_at) AND :scope
GROUP BY time
ORDER BY time
""",
            "From the run's first event to its last, waiting for humans included; runs that succeeded.",
            units={"": "ms"},
        ),
        Panel(
            "Why runs failed",
            TABLE,
            """
SELECT workflow, code, count() AS runs, any(reason) AS "a reason", max(finished_at) AS latest, argMax(run_id, finished_at) AS run_id
FROM ${database}.runs
WHERE $__timeFilter(finished_at) AND status IN ('failed', 'refused') AND :scope
GROUP BY workflow, code
ORDER BY runs DESC, workflow, code
LIMIT 100
""",
            "Failed and refused runs by workflow and code, with the latest of each.",
            width=24,
        ),
        Panel(
            "Attempts by outcome",
            BARS,
            """
SELECT if(late_outcome != '', concat(outcome, ', later ', late_outcome), outcome) AS outcome, count() AS attempts
FROM ${database}.attempts
WHERE $__timeFilter(requested_at) AND :scope
GROUP BY outcome
ORDER BY attempts DESC, outcome
""",
            "How attempts ended. Lost ones had an executor that died; a late outcome came when nobody waited for it any more.",
        ),
        Panel(
            "Accounts",
            TABLE,
            """
SELECT
    account,
    countIf(outcome IN ('succeeded', 'failed', 'timed_out', 'lost')) AS attempts,
    countIf(outcome IN ('failed', 'timed_out', 'lost')) AS errors,
    if(attempts = 0, 0, errors / attempts) AS "error rate",
    countIf(outcome = 'denied') AS denied,
    sum(actual_micros) / 1000000 AS spent
FROM ${database}.attempts
WHERE $__timeFilter(requested_at) AND :scope
GROUP BY account
ORDER BY errors DESC, attempts DESC, account
LIMIT 100
""",
            "What accounts did, those with most errors first: attempts that ended in success or as an error (failed, timed out, "
            "lost). `tidegate figures accounts` shows the same of the last minutes, from the live view.",
            units={"error rate": "percentunit", "spent": "currencyUSD"},
        ),
        Panel(
            "Slowest functions",
            TABLE,
            """
SELECT
    s.function AS function,
    s.kind AS kind,
    count() AS attempts,
    quantileExact(0.5)(dateDiff('millisecond', a.entered_at, a.left_at)) AS p50,
    quantileExact(0.95)(dateDiff('millisecond', a.entered_at, a.left_at)) AS p95,
    max(dateDiff('millisecond', a.entered_at, a.left_at)) AS longest
FROM (
    SELECT run_id, step_id, account, entered_at, left_at
    FROM ${database}.attempts
    WHERE outcome = 'succeeded' AND $__timeFilter(left_at) AND :scope
) AS a
INNER JOIN ${database}.steps AS s ON s.run_id = a.run_id AND s.step_id = a.step_id
GROUP BY function, kind
ORDER BY p95 DESC, function
LIMIT 50
""",
            "How long functions took, from entry to return, where they succeeded.",
            units={"p50": "ms", "p95": "ms", "longest": "ms"},
        ),
        Panel(
            "Not over, quiet the longest",
            TABLE,
            """
SELECT run_id, status, workflow, account, started_at, dateDiff('second', updated_at, now()) AS "quiet for"
FROM ${database}.runs
WHERE status IN ('running', 'waiting') AND :scope
ORDER BY updated_at
LIMIT 50
""",
            "Runs that are not over, by when anything last happened to them, whatever time is looked at. `waiting`: for a human.",
            units={"quiet for": "s"},
        ),
        Panel(
            "What everything waits for",
            TABLE,
            """
SELECT waits_for AS "for", queue, count() AS steps, uniqExact(run_id) AS runs, min(since) AS oldest
FROM ${database}.waits
WHERE :scope
GROUP BY waits_for, queue
ORDER BY steps DESC, waits_for, queue
""",
            "Steps of runs that are not over, by what they wait for now, whatever time is looked at. An answer: of a human, or of "
            "whoever does the tool outside.",
        ),
        Panel(
            "Dead letters",
            TABLE,
            """
SELECT topic, code, count() AS letters, max(at) AS latest, argMax(reason, at) AS "latest reason"
FROM ${database}.dead_letters
WHERE $__timeFilter(at)
GROUP BY topic, code
ORDER BY letters DESC, topic, code
""",
            "What could not be used, of all accounts. `tidegate dead-letters` shows the originals, and sends requests again.",
        ),
        Panel(
            "Records the projection could not read",
            STAT,
            """
SELECT count() AS records, uniqExact(topic) AS topics
FROM ${database}.unreadable
""",
            "Records of our own topics that gave no rows, of all time. More than 0 is a defect, or something of somebody else's in "
            "our topics: `select * from unreadable` names them.",
            width=6,
            height=4,
        ),
        Panel(
            "Latest runs",
            TABLE,
            """
SELECT run_id, status, workflow, version, account, started_at, finished_at, spent_micros / 1000000 AS spent
FROM ${database}.runs
WHERE $__timeFilter(started_at) AND :scope
ORDER BY started_at DESC, run_id
LIMIT 100
""",
            "The newest runs of this time. The id leads to the run.",
            width=24,
            units={"spent": "currencyUSD"},
        ),
    ),
)
