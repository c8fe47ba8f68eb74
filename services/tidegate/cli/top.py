"""`tidegate top`: how everything stands, in the terminal, for those who have no Grafana. Asks ClickHouse, changes nothing."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any, Final

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tidegate.cli.sql_endpoint import URL_VARIABLE, SqlAddress, SqlError, find, rows
from tidegate.cli.terminal import Console, say

PIPED_WIDTH: Final = 120
MAX_LINES: Final = 12
DOLLAR_MICROS: Final = 1_000_000
STALE_AFTER_S: Final = 30
SILENT_AFTER_S: Final = 10
MISSING: Final = (
    "The tables lack records that the projection's group has passed, so all of this is too little. What brings them:\n"
    "tidegate replay projection --from earliest"
)

Snapshot = dict[str, Any]

# `{window}` is in seconds. Statuses of runs that are over are counted for the window only: nobody wants the sum of all years.
QUERIES: Final = {
    "runs": """
        SELECT status, count() AS runs, max(dateDiff('second', updated_at, now())) AS quiet_s
        FROM runs
        WHERE status IN ('running', 'waiting') OR finished_at > now() - INTERVAL {window} SECOND
        GROUP BY status
        ORDER BY status
    """,
    "throughput": """
        SELECT
            countIf(type = 'RunStarted') AS runs_started,
            countIf(type = 'RunFinished') AS runs_finished,
            countIf(type = 'RunFinished' AND JSONExtractString(body, 'status') = 'failed') AS runs_failed,
            countIf(type = 'StepSucceeded') AS steps_succeeded,
            countIf(type = 'StepFailed') AS steps_failed,
            countIf(type = 'AttemptEnded' AND JSONExtractString(body, 'outcome') != 'denied') AS attempts_failed
        FROM events
        WHERE at > now() - INTERVAL {window} SECOND
    """,
    "spend": """
        SELECT
            account,
            sumIf(actual_micros, type = 'AttemptSettled' AND at > now() - INTERVAL {window} SECOND) AS window_micros,
            sumIf(actual_micros, type = 'AttemptSettled') AS total_micros,
            sumIf(reserved_micros, type IN ('AttemptGranted', 'AttemptReserved'))
                - sumIf(reserved_micros, type IN ('AttemptSettled', 'AttemptReleased')) AS reserved_micros
        FROM ledger
        GROUP BY account
        HAVING total_micros > 0 OR reserved_micros > 0
        ORDER BY window_micros DESC, total_micros DESC, account
        LIMIT 50
    """,
    "approvals": """
        SELECT run_id, step_id, waits_for, function, detail AS question, dateDiff('second', since, now()) AS waits_s
        FROM waits
        WHERE waits_for IN ('approval', 'answer')
        ORDER BY since, run_id, step_id
        LIMIT 50
    """,
    "executors": """
        SELECT instance_id, state, queue, slots, i.slots - i.free_slots AS busy, dateDiff('second', heartbeat_at, now()) AS silent_s
        FROM instances AS i
        WHERE service = 'executor'
        ORDER BY queue, instance_id
        LIMIT 200
    """,
    "queues": """
        SELECT queue, count() AS waiting, max(dateDiff('second', since, now())) AS oldest_s
        FROM waits
        WHERE waits_for = 'executor'
        GROUP BY queue
        ORDER BY waiting DESC, queue
        LIMIT 50
    """,
    "freshness": """
        SELECT
            topic,
            sum(f.lag) AS lag,
            sum(f.missing) AS missing,
            max(f.last_event_at) AS last_event,
            dateDiff('second', max(f.written_at), now()) AS written_s_ago
        FROM freshness AS f
        GROUP BY topic
        ORDER BY topic
    """,
}

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def top(
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object per look instead, one a line.")] = False,
    interval_s: Annotated[
        float, typer.Option("--interval", min=0.2, max=86_400, help="Seconds between two looks.")
    ] = 2.0,
    window_s: Annotated[
        int,
        typer.Option("--window", min=1, max=31 * 86_400, help="Seconds over which throughput and spend are counted."),
    ] = 300,
    url: Annotated[str, typer.Option("--url", envvar=URL_VARIABLE, help="Where SQL is served.")] = "",
) -> None:
    """Watch runs by status, throughput, errors, spend, open questions, executors and freshness, until Ctrl-C.

    Asks the projection: how old its answers are is the last part of the page. Needs no Kafka.

    Exit code 1: no answer (without --once it goes on trying, and says so).
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPED_WIDTH)
    try:
        if once:
            _show_once(console, look(find(url), window_s), as_json)
        elif as_json or not console.is_terminal:
            while True:
                _show_once(console, look(find(url), window_s), as_json)
                time.sleep(interval_s)
        else:
            _watch(console, url, interval_s, window_s)
    except SqlError as error:
        say(f"tidegate top: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit from None


def look(address: SqlAddress, window_s: int) -> Snapshot:
    """Return what there is to see now, by part: the answers to QUERIES. Blocks. Raises SqlError."""
    found: Snapshot = {"window_s": window_s}
    for name, query in QUERIES.items():
        found[name] = rows(address, query.replace("{window}", str(window_s)))
    found["throughput"] = found["throughput"][0]
    return found


def _show_once(console: Console, snapshot: Snapshot, as_json: bool) -> None:
    if as_json:
        print(json.dumps(snapshot, ensure_ascii=False), flush=True)
    else:
        console.print(page(snapshot))


def _watch(console: Console, url: str, interval_s: float, window_s: int) -> None:
    """Show the page over and over; what is away is waited for."""
    with Live(Text("asking …"), console=console, screen=True, auto_refresh=False) as live:
        last: RenderableType = Text("")
        while True:
            try:
                last = page(look(find(url), window_s))
                live.update(last, refresh=True)
            except SqlError as error:
                live.update(Group(Text(f"no answer, trying again: {error}", style="bold red"), last), refresh=True)
            time.sleep(interval_s)


# --- the page -------------------------------------------------------------------------------------------------------------


def page(snapshot: Snapshot) -> RenderableType:
    """Return what a terminal shows of a snapshot, at most MAX_LINES lines a part."""
    over = Table.grid(padding=(0, 4))
    over.add_row(_runs(snapshot), _throughput(snapshot))
    parts = (_spend(snapshot), _approvals(snapshot), _executors(snapshot), _freshness(snapshot))
    lines: list[RenderableType] = [Text(time.strftime("tidegate top · %H:%M:%S"), style="bold")]
    for part in (over, *parts):
        lines += [Text(""), part]
    return Group(*lines)


def _runs(snapshot: Snapshot) -> Table:
    table = _table("Runs", "status", "runs>", "quiet for>")
    for row in snapshot["runs"]:
        is_over = row["status"] not in ("running", "waiting")
        style = "red" if row["status"] == "failed" else ""
        _add(table, row["status"], str(row["runs"]), "" if is_over else _age(row["quiet_s"]), style=style)
    return table


def _throughput(snapshot: Snapshot) -> Table:
    found, window_s = snapshot["throughput"], snapshot["window_s"]
    table = _table(f"Last {window_s} s", "", "count>", "per second>")
    for name, count in found.items():
        _add(table, name.replace("_", " "), str(count), f"{count / window_s:.2f}")
    finished = found["runs_finished"]
    rate = found["runs_failed"] / finished if finished else 0.0
    _add(table, "error rate of runs", f"{rate:.1%}", "", style="red" if rate else "")
    return table


def _spend(snapshot: Snapshot) -> Table:
    table = _table("Spend", "account", f"{snapshot['window_s']} s>", "ever>", "set aside>")
    for row in snapshot["spend"][:MAX_LINES]:
        money = (_dollars(row[name]) for name in ("window_micros", "total_micros", "reserved_micros"))
        _add(table, row["account"], *money)
    return _with_rest(table, snapshot["spend"])


def _approvals(snapshot: Snapshot) -> Table:
    table = _table("Waiting for a human", "run", "step", "function", "question", "for>")
    for row in snapshot["approvals"][:MAX_LINES]:
        _add(table, row["run_id"], row["step_id"], row["function"], row["question"], _age(row["waits_s"]))
    return _with_rest(table, snapshot["approvals"])


def _executors(snapshot: Snapshot) -> Table:
    waiting = {row["queue"]: row for row in snapshot["queues"]}
    table = _table("Executors", "queue", "executor", "state", "busy>", "slots>", "silent for>", "waiting in queue>")
    shown = snapshot["executors"][:MAX_LINES]
    for row in shown:
        queued = waiting.pop(row["queue"], None)  # beside the first executor of the queue
        _add(
            table,
            row["queue"],
            row["instance_id"],
            row["state"],
            str(row["busy"]),
            str(row["slots"]),
            _age(row["silent_s"]),
            str(queued["waiting"]) if queued else "",
            style="red" if row["silent_s"] > SILENT_AFTER_S else "",
        )
    served = {row["queue"] for row in snapshot["executors"]}
    for queue, row in waiting.items():
        if queue not in served:
            _add(table, queue, "nobody", "", "", "", "", f"{row['waiting']}, {_age(row['oldest_s'])}", style="red")
    return _with_rest(table, snapshot["executors"])


def _freshness(snapshot: Snapshot) -> RenderableType:
    columns = ("topic", "last event (UTC)", "records behind>", "missing>", "written before>")
    table = _table("How old this is", *columns)
    for row in snapshot["freshness"]:
        is_stale = row["written_s_ago"] > STALE_AFTER_S or row["missing"]
        last, missing = str(row["last_event"] or ""), str(row["missing"] or "")
        style = "red" if is_stale else ""
        _add(table, row["topic"], last, str(row["lag"]), missing, _age(row["written_s_ago"]), style=style)
    if not any(row["missing"] for row in snapshot["freshness"]):
        return table
    return Group(table, Text(MISSING, style="bold red"))


def _table(title: str, *columns: str) -> Table:
    """Return an empty table; a name that ends in > is of a column to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        justify: Any = "right" if name.endswith(">") else "left"
        table.add_column(name.removesuffix(">"), justify=justify, header_style="dim", no_wrap=True, overflow="ellipsis")
    return table


def _add(table: Table, *cells: str, style: str = "") -> None:
    """Add a row of texts as they are: what users wrote is no markup."""
    table.add_row(*(Text(cell) for cell in cells), style=style)


def _with_rest(table: Table, found: list[Any]) -> Table:
    if not found:
        table.add_row(Text("nothing", style="dim"))
    if len(found) > MAX_LINES:
        table.add_row(Text(f"… and {len(found) - MAX_LINES} more: --json shows them", style="dim"))
    return table


def _dollars(micros: int) -> str:
    return f"{micros / DOLLAR_MICROS:,.6f}"


def _age(seconds: int) -> str:
    if seconds < 0:
        return "0 s"
    for size, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {name}"
    return f"{seconds} s"
