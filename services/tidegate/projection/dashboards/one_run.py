"""The dashboard of one run: what happened when, what it cost, who decided."""

from __future__ import annotations

from typing import Final

from tidegate.projection.dashboards.panels import BARS, STAT, TABLE, TIMELINE, Dashboard, Panel

ONE_RUN: Final = Dashboard(
    "run",
    "one run",
    "Everything about one run: its time line, steps, attempts, money, decisions and events. Set the time to when it ran.",
    (
        Panel(
            "The run",
            TABLE,
            """
SELECT
    run_id, status, workflow, version, account, started_at, finished_at,
    dateDiff('millisecond', started_at, coalesce(finished_at, now64(3))) AS duration,
    spent_micros / 1000000 AS spent, budget_micros / 1000000 AS budget, code, reason, cancelled_by, tags, input, output
FROM ${database}.runs
WHERE run_id = ${run_id:singlequote}
""",
            "How it stands.",
            width=24,
            height=5,
            units={"duration": "ms", "spent": "currencyUSD", "budget": "currencyUSD"},
        ),
        Panel(
            "Time line",
            TIMELINE,
            """
SELECT
    at AS time,
    concat(step_id, if(attempt > 0, concat(' #', toString(attempt)), '')) AS step,
    multiIf(
        type IN ('StepReady', 'AttemptRequested'), 'asked for',
        type = 'AttemptDispatched', 'running',
        type = 'ApprovalRequested', 'asks a human',
        type = 'ApprovalResolved', 'answered',
        type = 'AttemptEnded', 'ended',
        type = 'StepSucceeded', 'succeeded',
        type = 'StepFailed', 'failed',
        type = 'StepCancelled', 'cancelled',
        type
    ) AS state
FROM (
    SELECT at, seq, type, step_id, if(type = 'StepReady', 1, attempt) AS attempt
    FROM ${database}.events
    WHERE run_id = ${run_id:singlequote} AND step_id != ''
)
ORDER BY seq
""",
            "Every attempt of every step, from the moment it was asked for.",
            width=24,
            height=10,
        ),
        Panel(
            "Steps",
            TABLE,
            """
SELECT
    step_id, kind, function, status, attempts, spent_micros / 1000000 AS spent, ready_at,
    dateDiff('millisecond', ready_at, finished_at) AS duration, code, reason, arguments, output
FROM ${database}.steps
WHERE run_id = ${run_id:singlequote}
ORDER BY ready_at, wave, step_id
LIMIT 1000
""",
            "In the order in which they became ready.",
            width=24,
            units={"spent": "currencyUSD", "duration": "ms"},
        ),
        Panel(
            "Attempts",
            TABLE,
            """
SELECT
    step_id, attempt, outcome, late_outcome, instance_id, requested_at,
    coalesce(dispatched_at, entered_at) AS placed_at,
    dateDiff('millisecond', requested_at, least(placed_at, coalesce(entered_at, placed_at))) AS waited,
    dateDiff('millisecond', entered_at, left_at) AS ran,
    actual_micros / 1000000 AS spent, usage, error_class, error_message
FROM ${database}.attempts
WHERE run_id = ${run_id:singlequote}
ORDER BY requested_at, step_id, attempt
LIMIT 1000
""",
            "Each dispatch, where it ran and what came of it.",
            width=24,
            units={"waited": "ms", "ran": "ms", "spent": "currencyUSD"},
        ),
        Panel(
            "Cost by step",
            BARS,
            """
SELECT step_id, spent_micros / 1000000 AS spent
FROM ${database}.steps
WHERE run_id = ${run_id:singlequote}
ORDER BY spent DESC, step_id
LIMIT 50
""",
            "All attempts of a step together.",
            units={"": "currencyUSD"},
        ),
        Panel(
            "Money",
            STAT,
            """
SELECT
    settled_micros / 1000000 AS spent,
    reserved_micros / 1000000 AS "set aside",
    budget_micros / 1000000 AS budget,
    overshoot_micros / 1000000 AS overshoot
FROM ${database}.budgets
WHERE run_id = ${run_id:singlequote}
""",
            "From the ledger.",
            units={"": "currencyUSD"},
        ),
        Panel(
            "Decisions",
            TABLE,
            """
SELECT at, step_id, attempt, decision, rule, policy, reason, instance_id, reserved_micros / 1000000 AS "set aside"
FROM ${database}.decisions
WHERE run_id = ${run_id:singlequote}
ORDER BY seq
LIMIT 1000
""",
            "What the gate answered, and by which rule.",
            width=24,
            units={"set aside": "currencyUSD"},
        ),
        Panel(
            "Events",
            TABLE,
            """
SELECT seq, at, type, step_id, attempt, cause, body
FROM ${database}.events
WHERE run_id = ${run_id:singlequote}
ORDER BY seq
LIMIT 5000
""",
            "The run's log, as it is.",
            width=24,
            height=14,
        ),
    ),
    by_account=False,
    by_run=True,
    since="now-30d",
)
