"""Writes docs/clickhouse.md from what the migrations make: `python -m tidegate.projection.schema_page docs/clickhouse.md`.

Tables, columns and types are asked of the embedded engine after all migrations. What views and columns mean is said here, once for
all views that have a column.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tidegate.projection.migrations import migrations
from tidegate.projection.settings import ProjectionSettings
from tidegate.projection.store import Store
from tidegate.projection.tables import AGED_BY, MERGED, TABLES, VIEWS

HEAD: Final = """# The tables in ClickHouse

<!-- Written by `python -m tidegate.projection.schema_page` from the migrations (`make docs`). Changes belong there. -->

What the projection makes of the topics, for people and dashboards. Never truth: every row can be made again from the logs.
Query the **views**: they show each thing once, whatever was inserted twice, late or in another order, and whether ClickHouse
has merged or not. [sql-cookbook.md](sql-cookbook.md) has the questions that people ask; `tidegate sql` asks them; Grafana's
dashboards are in `charts/tidegate/dashboards`; `tidegate top` shows the present state in a terminal.

Units: `_micros` is millionths of a dollar, `_ms` milliseconds since 1970, times are UTC. Columns of one name mean the same
everywhere.

## How it works

- The projection writes **facts** only: a row per event of the two logs, and per record of `instances` and `dead-letters`. A
  fact is a function of its record, its identity is the table's sorting key, and `ReplacingMergeTree` keeps one of equal ones.
- What changes with every event (runs, steps, attempts, questions) is **merged** from facts by ClickHouse itself, in the same
  insert, by aggregates that know neither order nor number (`max`, `min`, `maxMap`). Money is summed when it is asked for,
  over deduplicated facts. Nothing is ever a running sum.
- Facts lie in a partition per month. `TIDEGATE_PROJECTION_TTL_DAYS` (0: never) says after how many days rows may go from
  {aged}. It has nothing to do with the retention of the logs: a rebuild brings back what they hold.
- Where a policy's decision says `redact`, views show `(redacted)` instead of those arguments, and the ledger's facts are
  stored without them. The facts of the run's own events were written before the decision: on a server, grant people the
  views, not the tables.
- Kinds of events that this version has not heard of are in `events` and `ledger` all the same, with all their fields in
  `body`.

## Migrations

Numbered SQL files in `services/tidegate/projection/migrations`, applied in order, once each, when the projection starts, on
an embedded engine or a server alike. `schema_migrations` says which were, with the checksum of each. A database that a newer
version made, or a migration whose text has changed since, is refused before anything is touched. A file may be begun twice (a
crash in its middle): every statement can be applied again.

| number | name | what |
| --- | --- | --- |
"""

DESCRIPTIONS: Final = {
    "runs": "One row per run. A run that is not over is `waiting` while a question is open or a step waits for "
    "an event, a time or an "
    "answer. A run id that only ever saw refused commands is no run.",
    "steps": "One row per step of a run; waits, and runs that are steps of others, included.",
    "attempts": "One row per dispatch of a step.",
    "events": "The scheduler's log: one row per event of a run, as the log has it.",
    "ledger": "The gate's log: one row per event, as the log has it.",
    "decisions": "What the gate answered about attempts. `allow` is counted when the attempt was placed; `throttle`: "
    "a limit lets it "
    "wait; `pause`: a budget does; `lapse`: nobody answered in time.",
    "budgets": "One row per run: its own limit, what is set aside for it and what it has spent.",
    "account_budgets": "Budgets of accounts, one row per bucket: a budget, an account path and a window (or a run). Money "
    "only; tokens, "
    "calls and time are in the bodies of the ledger's events.",
    "spend": "What was settled, by day, account, workflow, function, model and run.",
    "approvals": "Questions to humans about attempts: open until somebody answers, it lapses, or its step needs no "
    "answer any more.",
    "waits": "What every unfinished step waits for, and since when. `resume`: its run or queue is paused; `executor`: a free slot; "
    "`function`: it runs; `run`: another run does it; `gate`: its decision.",
    "graph_changes": "What steps proposed to add to the graphs of their runs, and what became of it; agents' plans (`kind` is "
    "`plan`) included.",
    "instances": "The processes that are registered: the latest line of each.",
    "dead_letters": "What could not be used, named by where its original lies. Text for people; the exact bytes are in "
    "`original_base64`.",
    "unreadable": "Records of our own topics that gave no rows: nothing is skipped silently.",
    "queues": "One row per queue that has something waiting, somebody who serves it, or moved within the last minute: what the "
    "gate has waiting in it over all partitions of the ledger, which count by themselves, and how fast it moves.",
    "freshness": "How far the projection is, per topic partition: the only rows that depend on when they were written.",
}
# What columns mean, by name, or by `view.column` where one differs.
MEANINGS: Final = {
    "account": "who is billed: a path such as `acme/support`",
    "account_budgets.account": "the path that the budget counts for, everything below it included",
    "actual_micros": "what it cost",
    "answer": "what was said with the answer",
    "answered_by": "who answered",
    "arguments": "what the function was called with, JSON; redacted where the decision says so",
    "arguments_hash": "SHA-256 of the arguments that the question was about",
    "at": "when it was decided, by the clock of the log's owner",
    "attempt": "number of the dispatch, from 1; 0 if it is about no attempt",
    "attempts": "how many attempts it has had",
    "body": "all fields of the record, JSON",
    "bucket": "`budget|account|window`: what limits apply to together",
    "budget": "name of the budget",
    "budget_micros": "the run's own limit; null for none",
    "busy": "how many slots are not free",
    "cancelled_by": "who cancelled it, empty if nobody did",
    "cause": "the input that it follows from, `topic:partition:offset`",
    "code_version": "of the code that was entered, as its executor says; empty if it has none",
    "change": "what was proposed: nodes, edges and because, JSON; of a plan it stands in the step's output",
    "conflicts_with": "the step whose change it does not go together with; empty if there is none",
    "code": "why, as a word for programs",
    "decided_at": "when it was accepted or rejected; null if it was not",
    "day": "day (UTC) of the settlement",
    "decision": "allow, deny, require_approval, throttle, pause or lapse",
    "definition_hash": "SHA-256 of the definition that the run carries",
    "detail": "the question, the event and its key, or the reason",
    "dispatched_at": "when the run learned of its placement; null if the result was faster",
    "due_at": "when it ends by itself, or may go on; null if that depends on others",
    "ended_at": "when the log had its end",
    "entered_at": "when the function was entered, by the executor's clock",
    "epoch": "epoch of the owner that wrote it",
    "error_class": "class of the exception",
    "error_message": "its message",
    "executors": "how many of them reported within the last minute",
    "expires_at": "when the question lapses; null for never",
    "fingerprint": "hash of all that the run came to; equal for equal inputs and outputs",
    "finished_at": "when it was over",
    "first_at": "first event",
    "free_slots": "how many of them are free",
    "from_at": "when the window begins",
    "function": "name of the step, agent, flow or tool function; of a run that is a step, its workflow",
    "functions": "what it can run",
    "headers": "of the original",
    "heartbeat_at": "when it was last heard of, by its own clock",
    "host": "where it runs",
    "incarnation": "offset of the registration of this life of the process",
    "input": "JSON",
    "instance_id": "name of the process",
    "is_closed": "whether the window is over and settled",
    "graph_changes.kind": "`graph` (nodes and edges of a step), `plan` (tool calls of an agent) or `flow` (calls of a flow)",
    "graph_changes.status": "accepted, rejected, in part (of a plan's calls), open (a person decides) or withdrawn",
    "graph_hash": "SHA-256 of the graph's nodes and edges with the change; empty of a plan",
    "kind": "step, agent, flow (a turn), tool, wait_event, wait_until, sleep, ask, outside or workflow",
    "lag": "records of the topic partition that are not in the tables yet",
    "last_at": "latest event",
    "last_event_at": "when the newest event in the tables happened",
    "last_seq": "seq of the latest event",
    "late_outcome": "what came when nobody waited for it any more",
    "ledger": "partition of `gate-ledger`",
    "left_at": "when it returned, by the executor's clock",
    "limit_micros": "the most that may be spent in it; null for no limit of money",
    "log_partition": "partition of `run-events`",
    "model": "the model that the call names; empty for none",
    "missing": "offsets that the group has passed and that the tables never got; `tidegate replay projection --from earliest` "
    "fills them in",
    "next_offset": "where the projection reads on; everything below it is in the tables, unless something is `missing`",
    "nodes": "the nodes that it adds; of a plan, the steps of its calls",
    "node_id": "node of the workflow that it is an instance of",
    "offset": "offset of the record",
    "oldest": "since when the first of them waits",
    "on_exceed": "what happens to an attempt that has no room",
    "original": "the record as text",
    "original_base64": "its exact bytes",
    "original_key": "its key as text",
    "original_size": "its size in bytes",
    "outcome": "requested, dispatched, awaiting_approval, succeeded, failed, timed_out, released, busy, lost, denied, rejected, "
    "expired or cancelled",
    "output": "JSON; empty if there is none",
    "overshoot_micros": "what was spent beyond what had been set aside",
    "parent_run_id": "the run of which this one is a step; empty if somebody asked for it",
    "partition": "partition of the topic",
    "partitions": "in how many partitions of the ledger they wait",
    "paused": "`paused by NAME`, or empty",
    "pid": "process id there",
    "placed_per_s": "attempts a second that were placed on an executor of it, over the last minute",
    "policy": "`name@version` of the policy; empty if none decided",
    "question": "what the human is asked",
    "proposed_at": "when its step's result was recorded",
    "queue": "queue of executors",
    "queued_per_s": "attempts a second that found no place at once, over the last minute",
    "ready_at": "when it became ready",
    "reason": "why, for people",
    "requested_at": "when it was asked for",
    "reserved_micros": "what was set aside",
    "budgets.reserved_micros": "set aside and not yet ended",
    "account_budgets.reserved_micros": "set aside and not yet ended",
    "resolved_at": "when it was answered",
    "retry_document": "`name@version` of the retry document that decided; empty if the function itself did",
    "retry_rule": "label of the retry rule that counts its failure; empty for none",
    "rule": "the rule that decided; `budget` (the run's own), `budget:NAME` (an account's), `limit` or `default` (none matched) "
    "are none of a policy",
    "run_id": "the run",
    "running": "how many attempts it runs",
    "seq": "place in the run's events (of the ledger: in its partition's), from 1 without gaps",
    "service": "scheduler, gate, projection, gateway or executor",
    "settled_micros": "what was spent",
    "settlements": "how many attempts were settled",
    "since": "since when it waits",
    "size": "bytes",
    "slots": "how many attempts it can run at once",
    "spent_micros": "what it cost so far, as the ledger settled it",
    "account_budgets.spent_micros": "what was spent in it",
    "started_at": "when it began",
    "state": "of the process: ready or draining",
    "status": "how it stands",
    "approvals.status": "open, approved, rejected, expired, or withdrawn (no answer is needed any more)",
    "runs.status": "running, waiting, succeeded, failed, cancelled or refused",
    "step_id": "path of the step in the run, such as `triage/2/tool:lookup_order`",
    "tags": "as in the request",
    "tool": "the function's name if it is a tool, else empty",
    "topic": "Kafka topic",
    "type": "name of the event",
    "until_at": "when the window ends; null for never",
    "updated_at": "when anything last happened to it",
    "usage": "what the function reported beside money, such as tokens",
    "version": "of the workflow (of an instance: of Tidegate; of a budget: its document's)",
    "waiting": "attempts that wait for a slot",
    "waits_for": "approval, answer, event, time, retry, resume, budget, limit, executor, function, run or gate",
    "wave": "longest distance from the start of the run",
    "whole_to": "everything below it is in the tables",
    "why": "`policy`, `outcome_unknown` (nobody knows if it had its effect) or `change` (of the run's graph)",
    "workflow": "name of the workflow; of an agent that runs alone `agent:NAME`",
    "written_at": "when the projection wrote this, by its own clock",
}


def page() -> str:
    """Return the page. Blocks for seconds: it starts an engine."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(ProjectionSettings(clickhouse_url=f"chdb://{folder}"))
        try:
            views = [line for view in VIEWS for line in _view(store, view)]
            tables = [line for table in TABLES for line in _table(store, table)]
        finally:
            store.close()
    aged = ", ".join(f"`{table}`" for table in AGED_BY)
    rows = [f"| {one.version} | {one.name.replace('_', ' ')} | {_introduction(one.text)} |" for one in migrations()]
    parts = [
        HEAD.replace("{aged}", aged).rstrip(),
        *rows,
        "",
        "## Views",
        "",
        *views,
        "## Tables",
        "",
        _TABLES,
        "",
        *tables,
    ]
    return "\n".join(parts).rstrip() + "\n"


_TABLES: Final = (
    "For whoever looks after them. All have one row per sorting key in the end; until ClickHouse has merged, more."
)


def _view(store: Store, view: str) -> Iterator[str]:
    yield from (f"### {view}", "", DESCRIPTIONS[view], "", "| column | type | what |", "| --- | --- | --- |")
    for name, kind in _columns(store, view):
        meaning = MEANINGS.get(f"{view}.{name}") or MEANINGS[name]
        yield f"| `{name}` | {kind} | {meaning.replace('|', '&#124;')} |"
    yield ""


def _table(store: Store, table: str) -> Iterator[str]:
    ((engine, key, months),) = store.rows(
        f"SELECT engine, sorting_key, partition_key FROM system.tables WHERE database = currentDatabase() AND name = '{table}'"  # noqa: S608 - our own name
    )
    source = next(
        (f", merged from `{merged.source}` by `{merged.by}`" for merged in MERGED if merged.table == table), ""
    )
    by_month = ", a partition per month" if months else ""
    yield f"- `{table}`: {engine}, sorted by `{key}`{by_month}{source}. Columns:"
    yield "  " + ", ".join(f"`{name}`" for name, _ in _columns(store, table)) + "."


def _columns(store: Store, name: str) -> list[tuple[str, str]]:
    return [(str(row[0]), _WRAPPED.sub(r"\1", str(row[1]))) for row in store.rows(f"DESCRIBE TABLE {name}")]


# How a value is stored or merged, which nobody who queries it has to know.
_WRAPPED: Final = re.compile(r"^(?:SimpleAggregateFunction\(\w+, |LowCardinality\()(.*)\)$")


def _introduction(text: str) -> str:
    found = re.match(r"(?:--[^\n]*\n)+", text)
    return _prose(found[0]).partition(". ")[0].rstrip(".") if found else ""


def _prose(comment: str) -> str:
    return " ".join(line.removeprefix("--").strip() for line in comment.splitlines()).replace("|", "&#124;")


def main() -> int:
    """Write the page into the file that is named."""
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
