"""The dashboard of whoever answers and of whoever writes policies: open questions, answers, and what the rules decide."""

from __future__ import annotations

from typing import Final

from tidegate.projection.dashboards.panels import BARS, SERIES, STAT, TABLE, Dashboard, Panel

APPROVALS: Final = Dashboard(
    "approvals",
    "approvals and policy",
    "Who is waited for, how long answers take, and what the rules let through, asked about and denied.",
    (
        Panel(
            "Waiting for a human",
            STAT,
            """
SELECT
    count() AS questions,
    if(count() = 0, 0, dateDiff('second', min(since), now())) AS "oldest"
FROM ${database}.waits
WHERE waits_for IN ('approval', 'answer') AND :scope
""",
            "Approvals and questions that nobody has answered, whatever time is looked at.",
            height=4,
            units={"oldest": "s"},
        ),
        Panel(
            "Time to an answer",
            STAT,
            """
SELECT
    count() AS answers,
    quantileExact(0.5)(dateDiff('millisecond', requested_at, resolved_at)) AS p50,
    quantileExact(0.95)(dateDiff('millisecond', requested_at, resolved_at)) AS p95
FROM ${database}.approvals
WHERE $__timeFilter(resolved_at) AND :scope
""",
            "From the question to the answer.",
            height=4,
            units={"p50": "ms", "p95": "ms"},
        ),
        Panel(
            "Open questions",
            TABLE,
            """
SELECT
    w.run_id AS run_id,
    w.step_id AS step_id,
    w.account AS account,
    w.waits_for AS "an",
    w.function AS function,
    w.detail AS question,
    a.rule AS rule,
    a.policy AS policy,
    a.arguments AS arguments,
    w.due_at AS lapses,
    dateDiff('second', w.since, now()) AS "waits for"
FROM (SELECT * FROM ${database}.waits WHERE waits_for IN ('approval', 'answer') AND :scope) AS w
LEFT ANY JOIN (SELECT * FROM ${database}.approvals WHERE status = 'open') AS a ON a.run_id = w.run_id AND a.step_id = w.step_id
ORDER BY w.since, run_id, step_id
LIMIT 200
""",
            "Oldest first. `tidegate runs approve RUN STEP` or `reject` answers an approval, `respond` a question.",
            width=24,
            units={"waits for": "s"},
        ),
        Panel(
            "Asked and answered",
            SERIES,
            """
SELECT
    $__timeInterval(at) AS time,
    countIf(type = 'ApprovalRequested') AS asked,
    countIf(type = 'ApprovalResolved') AS answered
FROM ${database}.events
WHERE $__timeFilter(at) AND type IN ('ApprovalRequested', 'ApprovalResolved') AND :scope
GROUP BY time
ORDER BY time
""",
            "Questions to humans and their answers over time.",
            stacked=False,
        ),
        Panel(
            "Answers by person",
            TABLE,
            """
SELECT
    answered_by,
    countIf(status = 'approved') AS approved,
    countIf(status = 'rejected') AS rejected,
    quantileExact(0.5)(dateDiff('millisecond', requested_at, resolved_at)) AS "usually after"
FROM ${database}.approvals
WHERE $__timeFilter(resolved_at) AND :scope
GROUP BY answered_by
ORDER BY approved + rejected DESC, answered_by
""",
            "Who answered, how, and how soon.",
            units={"usually after": "ms"},
        ),
        Panel(
            "Decisions",
            BARS,
            """
SELECT decision, count() AS decisions
FROM ${database}.decisions
WHERE $__timeFilter(at) AND :scope
GROUP BY decision
ORDER BY decisions DESC, decision
""",
            "What the gate answered. `allow` is counted when the attempt was placed on an executor.",
            width=8,
        ),
        Panel(
            "Decisions by rule",
            TABLE,
            """
SELECT policy, rule, decision, count() AS decisions, uniqExact(run_id) AS runs, max(at) AS latest
FROM ${database}.decisions
WHERE $__timeFilter(at) AND :scope
GROUP BY policy, rule, decision
ORDER BY decisions DESC, policy, rule, decision
LIMIT 100
""",
            "Which rule of which policy version decided. No rule: nothing matched, so it was allowed.",
            width=16,
        ),
        Panel(
            "Denied",
            TABLE,
            """
SELECT at, run_id, step_id, attempt, account, rule, policy, reason
FROM ${database}.decisions
WHERE $__timeFilter(at) AND decision = 'deny' AND :scope
ORDER BY at DESC, run_id, step_id
LIMIT 200
""",
            "The newest denials.",
            width=24,
        ),
    ),
    since="now-7d",
)
