"""The dashboard of whoever pays: what was spent on what, what is set aside, and whose budget is nearly gone."""

from __future__ import annotations

from typing import Final

from tidegate.projection.dashboards.panels import BARS, SERIES, STAT, TABLE, Dashboard, Panel

DOLLARS: Final = {"": "currencyUSD"}

SPEND: Final = Dashboard(
    "spend",
    "spend and budgets",
    "What runs cost, by account, workflow, function and model, and how far their budgets go.",
    (
        Panel(
            "Spent",
            STAT,
            """
SELECT
    sumIf(actual_micros, type = 'AttemptSettled') / 1000000 AS spent,
    sumIf(overshoot_micros, type = 'AttemptSettled') / 1000000 AS "beyond what was declared"
FROM ${database}.ledger
WHERE $__timeFilter(at) AND :scope
""",
            "What was settled in this time, late results included: spent is spent. Beyond what was declared: of functions that "
            "cost more than they had said, which no budget could prevent.",
            height=4,
            units=DOLLARS,
        ),
        Panel(
            "Set aside now",
            STAT,
            """
SELECT sum(reserved_micros) / 1000000 AS "set aside", countIf(reserved_micros > 0) AS runs
FROM ${database}.budgets
WHERE :scope
""",
            "Reserved for attempts that are under way, whatever time is looked at.",
            height=4,
            units={"set aside": "currencyUSD"},
        ),
        Panel(
            "Spend by account",
            SERIES,
            """
SELECT $__timeInterval(at) AS time, account, sum(actual_micros) / 1000000 AS spent
FROM ${database}.ledger
WHERE $__timeFilter(at) AND type = 'AttemptSettled' AND :scope
GROUP BY time, account
ORDER BY time, account
""",
            "Settled money over time.",
            width=24,
            units=DOLLARS,
            stacked=True,
        ),
        Panel(
            "Spend by workflow",
            BARS,
            """
SELECT workflow, sum(settled_micros) / 1000000 AS spent
FROM ${database}.spend
WHERE day >= toDate($__fromTime) AND day <= toDate($__toTime) AND :scope
GROUP BY workflow
ORDER BY spent DESC, workflow
LIMIT 30
""",
            "Whole days (UTC) that the time touches.",
            units=DOLLARS,
        ),
        Panel(
            "Spend by model",
            BARS,
            """
SELECT if(model = '', 'no model named', model) AS model, sum(settled_micros) / 1000000 AS spent
FROM ${database}.spend
WHERE day >= toDate($__fromTime) AND day <= toDate($__toTime) AND :scope
GROUP BY model
ORDER BY spent DESC, model
LIMIT 30
""",
            "By the model that the call names. Whole days (UTC) that the time touches.",
            units=DOLLARS,
        ),
        Panel(
            "Spend by function and tool",
            TABLE,
            """
SELECT
    kind,
    function,
    sum(settlements) AS attempts,
    sum(settled_micros) / 1000000 AS spent,
    sum(settled_micros) / sum(settlements) / 1000000 AS "per attempt",
    sum(overshoot_micros) / 1000000 AS overshoot
FROM ${database}.spend
WHERE day >= toDate($__fromTime) AND day <= toDate($__toTime) AND :scope
GROUP BY kind, function
ORDER BY spent DESC, function
LIMIT 100
""",
            "Whole days (UTC) that the time touches.",
            units={"spent": "currencyUSD", "per attempt": "currencyUSD", "overshoot": "currencyUSD"},
        ),
        Panel(
            "Usage",
            TABLE,
            """
SELECT s.function AS function, u.1 AS what, sum(u.2) AS amount, count() AS attempts
FROM (
    SELECT run_id, step_id, arrayJoin(CAST(usage, 'Array(Tuple(String, Int64))')) AS u
    FROM ${database}.attempts
    WHERE $__timeFilter(ended_at) AND :scope
) AS a
INNER JOIN ${database}.steps AS s ON s.run_id = a.run_id AND s.step_id = a.step_id
GROUP BY function, what
ORDER BY amount DESC, function, what
LIMIT 100
""",
            "What functions reported beside money, such as tokens.",
        ),
        Panel(
            "Nearest to their budget",
            TABLE,
            """
SELECT
    b.run_id AS run_id,
    b.account AS account,
    r.status AS status,
    b.budget_micros / 1000000 AS budget,
    b.settled_micros / 1000000 AS spent,
    b.reserved_micros / 1000000 AS "set aside",
    (b.settled_micros + b.reserved_micros) / b.budget_micros AS used
FROM (
    SELECT * FROM ${database}.budgets
    WHERE budget_micros > 0 AND $__timeFilter(last_at) AND :scope
) AS b
LEFT ANY JOIN ${database}.runs AS r ON r.run_id = b.run_id
ORDER BY used DESC, run_id
LIMIT 50
""",
            "Runs with a budget to which something happened in this time. More than 100 %: a function cost more than it declared.",
            width=24,
            units={"budget": "currencyUSD", "spent": "currencyUSD", "set aside": "currencyUSD", "used": "percentunit"},
        ),
        Panel(
            "Budgets of accounts",
            TABLE,
            """
SELECT
    budget,
    account,
    from_at,
    until_at,
    on_exceed AS "without room",
    limit_micros / 1000000 AS "limit",
    spent_micros / 1000000 AS spent,
    reserved_micros / 1000000 AS "set aside",
    (spent_micros + reserved_micros) / nullIf(limit_micros, 0) AS used
FROM ${database}.account_budgets
WHERE $__timeFilter(last_at) AND :scope
ORDER BY used DESC NULLS LAST, budget, account, from_at
LIMIT 100
""",
            "Money of each budget, account that it tells apart, and window to which something happened in this time. Tokens, calls "
            "and time: `tidegate budget list`.",
            width=24,
            units={"limit": "currencyUSD", "spent": "currencyUSD", "set aside": "currencyUSD", "used": "percentunit"},
        ),
        Panel(
            "Stopped by a budget",
            TABLE,
            """
SELECT at, decision, rule, run_id, step_id, account, reason
FROM ${database}.decisions
WHERE $__timeFilter(at) AND decision IN ('deny', 'pause', 'require_approval')
    AND (rule = 'budget' OR startsWith(rule, 'budget:')) AND :scope
ORDER BY at DESC, run_id, step_id
LIMIT 100
""",
            "Attempts that did not fit into their run's budget (`budget`) or into one of an account (`budget:NAME`).",
            width=24,
        ),
        Panel(
            "Dearest runs",
            TABLE,
            """
SELECT run_id, workflow, account, status, spent_micros / 1000000 AS spent, started_at
FROM ${database}.runs
WHERE $__timeFilter(started_at) AND :scope
ORDER BY spent_micros DESC, run_id
LIMIT 50
""",
            "Runs that were started in this time.",
            width=24,
            units={"spent": "currencyUSD"},
        ),
    ),
    since="now-7d",
)
