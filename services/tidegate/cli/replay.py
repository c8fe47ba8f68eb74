"""`tidegate replay …`: rebuild what is made of the log, beside the running system."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
import urllib.error
import urllib.request
from getpass import getuser
from typing import Annotated, Any, Final, NoReturn

import msgspec
import typer
from rich.progress import BarColumn, Progress, TextColumn

from tidegate.cli.addresses import AddressError, address_file, read_address
from tidegate.cli.replay_offsets import offsets
from tidegate.cli.terminal import Console
from tidegate.cli.wording import counted, moment_ms
from tidegate.eventlog.interface import EventLogError
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.machine import Machine
from tidegate.eventlog.settings import KafkaSettings
from tidegate.eventlog.state_check import StateReport, check_state
from tidegate.gate.placement import Executors
from tidegate.gate.service import GateMachine
from tidegate.scheduler.service import SchedulerMachine

ADDRESS_FILE: Final = "projection.json"
TOKEN_HEADER: Final = "X-Tidegate-Token"  # noqa: S105 - a name
ANSWER_TIMEOUT_S: Final = 60.0
AWAY_S: Final = 120.0
POLL_S: Final = 0.5
STATE_TOPICS: Final = ("run-events", "gate-ledger", "run-snapshots", "gate-snapshots")
OVER: Final = frozenset({"done", "failed", "cancelled"})
EXIT_FAILED, EXIT_USAGE, EXIT_NO_ANSWER, EXIT_IN_PART = 1, 2, 3, 4

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Rebuild what is made of the log, beside the running system: the tables in ClickHouse, or the owners' state.",
    pretty_exceptions_show_locals=False,
)
_notes = Console(stderr=True, highlight=False, soft_wrap=True)


class _UnansweredError(RuntimeError):
    """The projection does not answer: it may in a moment."""


@app.command()
def projection(
    start: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="earliest|TIME|OFFSET",
            help="Where to begin to read the logs: their beginning; a time (2026-01-31T12:00Z, or 90m, 12h, 7d ago); an offset, "
            "in every partition. What lies before it is taken from the tables as they are.",
        ),
    ] = "earliest",
    tables: Annotated[
        str, typer.Option("--tables", help="Replace only these, comma-separated (event_facts, run_state, ...).")
    ] = "",
    check: Annotated[
        bool, typer.Option("--check", help="Rebuild and compare, but leave the tables as they are.")
    ] = False,
    forget_retired: Annotated[
        bool,
        typer.Option(
            "--forget-retired", help="Leave out runs that the log holds no more, instead of keeping their rows."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be read and replaced.")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Begin nothing; show the one under way until it is over.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Begin, and do not wait for the end.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Give up the one under way.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print how it ended as JSON.")] = False,
) -> None:
    """Rebuild the tables from the log without downtime.

    The running projection does it, beside its work: it fills tables of its own, compares checksums, exchanges them, and reads
    what was written meanwhile. If it is killed, it goes on where it was. This command finds it by `projection.json` in
    TIDEGATE_DATA_DIR, so it must run on the same machine (on Kubernetes: `kubectl exec` into its pod).

    Exit codes: 0 done (and with --check: everything is equal); 1 failed, cancelled, or --check found differences; 2 wrong usage;
    3 the projection does not answer.
    """
    try:
        if cancel:
            _ask("DELETE")
        elif not follow:
            wanted = {
                "start": _start(start),
                "tables": [name.strip() for name in tables.split(",") if name.strip()],
                "check": check,
                "forget_retired": forget_retired,
                "dry_run": dry_run,
                "by": _user(),
            }
            begun = _ask("POST", wanted)
            if dry_run:
                _show_plan(begun, as_json)
                return
            if begun["request"] != {**begun["request"], **wanted, "by": begun["request"]["by"]}:
                _notes.print("an unfinished replay goes on, with what was asked for then")
            if detach:
                print(json.dumps(begun) if as_json else f"replay {begun['replay_id']} has begun")
                return
        ended = _watch()
    except _UnansweredError as error:
        _fail(str(error), EXIT_NO_ANSWER)
    _show_end(ended, as_json)


def _start(text: str) -> str:
    """Return the request's form of a start. Ends the command if it has none."""
    if text == "earliest":
        return text
    if text.isascii() and text.isdigit():
        return f"offset:{int(text)}"
    try:
        return f"time:{moment_ms(text, time.time())}"
    except ValueError:
        _fail(
            f"--from: {text!r} is neither earliest, nor an offset, nor a time (2026-01-31T12:00Z, or 12h for ago)",
            EXIT_USAGE,
        )


def _user() -> str:
    try:
        return getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


app.command()(offsets)

# --- asking the projection ----------------------------------------------------------------------------------------------


def _ask(method: str, body: Any = None) -> dict[str, Any]:
    """Return the replay as the projection answers. Raises _UnansweredError; ends the command if it refuses."""
    file = address_file(ADDRESS_FILE)
    try:
        found = read_address(file, "projection")
    except AddressError as error:
        raise _UnansweredError(
            f"{error}. A projection that runs here writes that file; say where its data folder is with TIDEGATE_DATA_DIR, or on "
            "Kubernetes run this in its pod: kubectl exec POD -- tidegate replay projection ..."
        ) from None
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{found['url']}/replay", data=data, method=method)  # noqa: S310 - see read_address
    request.add_header(TOKEN_HEADER, str(found.get("token", "")))
    if not request.full_url.startswith("http://127.0.0.1:"):
        raise _UnansweredError(f"{file} names {found['url']}, which is not on this machine")
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as response:  # noqa: S310 - checked above
            replay = json.loads(response.read())["replay"]
    except urllib.error.HTTPError as error:
        try:
            message = str(json.loads(error.read())["message"])
        except (ValueError, LookupError, TypeError):
            message = str(error)
        if error.code >= 500:
            raise _UnansweredError(message) from None
        _fail(message, EXIT_USAGE)
    except OSError as error:
        raise _UnansweredError(
            f"nothing answers at {found['url']} (from {file}): is the projection running?"
        ) from error
    if replay is None:
        _fail("no replay is under way", EXIT_USAGE)
    return dict(replay)


def _watch() -> dict[str, Any]:
    """Show how the replay goes until it is over. A projection that is started again in between is waited for."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    heard_s = time.monotonic()
    with Progress(*columns, console=_notes, transient=True, disable=not sys.stderr.isatty()) as bars:
        bar = bars.add_task("replay", total=1.0, left="")
        while True:
            try:
                replay = _ask("GET")
                heard_s = time.monotonic()
                if replay["phase"] in OVER:
                    return replay
                done, left = replay["records_done"], replay["records_left"]
                share = done / (done + left) if done + left else 0.0
                bars.update(bar, description=replay["phase"], completed=share, left=_left(replay))
            except _UnansweredError:
                if time.monotonic() - heard_s > AWAY_S:
                    raise
            time.sleep(POLL_S)


def _left(replay: dict[str, Any]) -> str:
    done, left = replay["records_done"], replay["records_left"]
    seconds = (replay["updated_ms"] - (replay["filling_since_ms"] or replay["updated_ms"])) / 1000
    text = f"{done:,} records, {left:,} left"
    if done and left and seconds > 1:
        text += f", about {datetime.timedelta(seconds=round(seconds * left / done))}"
    return text


# --- showing ------------------------------------------------------------------------------------------------------------


def _show_plan(replay: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(replay))
        return
    print(f"tables: {', '.join(replay['tables'])}")
    for name, start in sorted(replay["positions"].items()):
        print(f"  {name:<24} from {start:>10} to {replay['ends'][name]:>10}")
    print(f"at most {counted(replay['records_left'], 'record')}; nothing was changed")


def _show_end(replay: dict[str, Any], as_json: bool) -> None:
    differing = [one for one in replay["comparisons"] if not one["equal"]]
    if as_json:
        print(json.dumps(replay))
    else:
        for one in replay["comparisons"]:
            sign = "equal" if one["equal"] else "DIFFERS"
            print(f"  {one['table']:<22} {one['rows_in_place']:>10} rows, rebuilt {one['rows_rebuilt']:>10}  {sign}")
        if replay["phase"] == "done":
            compared = {one["table"] for one in replay["comparisons"]}
            for table in replay["tables"]:
                if table not in compared:
                    print(f"  {table:<22} not compared: it changes with every heartbeat")
            is_check = replay["request"]["check"]
            what = f"{counted(len(compared if is_check else replay['tables']), 'table')} {'compared' if is_check else 'replaced'}"
            print(f"{what}, {counted(replay['records_done'], 'record')} read")
        else:
            print(f"replay {replay['phase']}: {replay['reason']}", file=sys.stderr)
    if replay["phase"] != "done" or (replay["request"]["check"] and differing):
        raise typer.Exit(EXIT_FAILED)


# --- the owners' state --------------------------------------------------------------------------------------------------


@app.command()
def state(
    service: Annotated[
        str, typer.Option("--service", help="scheduler, gate, or both, comma-separated.")
    ] = "scheduler,gate",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Fold the logs from their beginning and compare with the running owners' state, run by run.

    Owners write their state down with every checkpoint (TIDEGATE_CHECKPOINT_EVERY_S); the fold is compared with the last one.
    Nothing is written, and nothing waits for it. The command must be of the version that the owners run: states that another
    version wrote in another format are compared only in that both know the run, and by its hash chain.

    Exit codes: 0 nothing differs; 1 something does; 2 wrong usage, or the logs cannot be read; 4 nothing differs as far as it
    could be compared, because the owners are of another version.
    """
    wanted = [name.strip() for name in service.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in ("scheduler", "gate")]
    if unknown or not wanted:
        _fail(f"--service: {', '.join(unknown) or 'nothing'}: there are scheduler and gate", EXIT_USAGE)
    settings = KafkaSettings()
    broker = KafkaBroker(settings)
    reports = []
    try:
        counts = {name: found.partition_count for name, found in broker.describe(STATE_TOPICS).items()}
        missing = [topic for topic in STATE_TOPICS if topic not in counts]
        if missing:
            raise EventLogError(f"topics missing: {', '.join(missing)}")
        with _notes.status("folding the logs …") as status:
            for machine in _machines(wanted, counts):
                for partition in range(counts[machine.log_topic]):
                    where = f"{machine.log_topic}-{partition}"
                    status.update(f"folding {where} …")

                    def show(at: int, of: int, where: str = where) -> None:
                        status.update(f"folding {where}: {at:,} of {of:,} …")

                    reports.append(check_state(broker, machine, partition, show))
    except EventLogError as error:
        _fail(f"the logs of Kafka at {settings.bootstrap} cannot be read: {error}", EXIT_USAGE)
    finally:
        broker.close()
    _show_state(reports, as_json)


def _machines(wanted: list[str], counts: dict[str, int]) -> list[Machine]:
    """Return the services' own machines, for folding alone: they are told of no executor and decide nothing."""
    nobody = Executors(lease_ms=1, monotonic_ms=lambda: 0, table_end=lambda: 0)
    made: dict[str, Machine] = {
        "scheduler": SchedulerMachine(counts["run-events"], counts["gate-ledger"]),
        "gate": GateMachine(counts["run-events"], counts["gate-ledger"], nobody),
    }
    return [made[name] for name in wanted]


def _show_state(reports: list[StateReport], as_json: bool) -> None:
    ok = all(report.ok for report in reports)
    if as_json:
        print(json.dumps({"ok": ok, "partitions": [msgspec.to_builtins(report) for report in reports]}))
    else:
        for report in reports:
            seen = f"{counted(report.entries, 'entry', 'entries')} folded, {counted(report.compared, 'state')} compared"
            if report.read_from < 0:
                seen = "no checkpoint yet: nothing to compare with"
            found = "equal" if report.ok else counted(report.difference_count, "difference")
            print(f"{report.log}-{report.partition}: {seen}{'' if report.read_from < 0 else f': {found}'}")
            if report.in_part:
                print(f"  {_other_version(report)}", file=sys.stderr)
            for one in report.differences:
                print(f"  {one.unit} at offset {one.offset}: {one.why}", file=sys.stderr)
    in_part = any(report.in_part for report in reports)
    raise typer.Exit(EXIT_FAILED if not ok else EXIT_IN_PART if in_part else 0)


def _other_version(report: StateReport) -> str:
    """Return what is to be done about states that could be compared only in part."""
    theirs = ", ".join(map(str, report.formats))
    return (
        f"{counted(report.in_part, 'state')} of snapshot format {theirs}, and this version writes {report.own_format}: only "
        "whether the log knows them, and their hash chains, were compared. For the rest run the owners' own version, on "
        "Kubernetes in one of their pods: kubectl exec POD -- tidegate replay state"
    )


def _fail(text: str, code: int) -> NoReturn:
    typer.echo(f"tidegate replay: {text}", err=True)
    raise typer.Exit(code) from None
