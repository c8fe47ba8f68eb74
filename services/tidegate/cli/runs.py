"""`tidegate runs …`: start runs, look at them, answer their questions.

What starts, answers and reads the log talks to Kafka alone; `list`, `show` and `watch` ask the gateway's live view.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from rich.markup import escape

from tidegate.cli import run_output
from tidegate.cli.endings import (
    EXIT_NEEDS_HUMAN,
    EXIT_NO_ANSWER,
    EXIT_REFUSED,
    EXIT_TIMEOUT,
    RUN_EXIT_CODES,
    exit_code,
    explained,
    usage,
)
from tidegate.cli.live_view import (
    GATEWAY_AWAY_S,
    RETRY_S,
    LiveView,
    NotReadyError,
    RestoringError,
    UnknownRunError,
    Url,
    patiently,
    waiting,
)
from tidegate.cli.options import By, Json, Reason
from tidegate.cli.terminal import Console, say
from tidegate.cli.wording import moment_ms
from tidegate.domain import states
from tidegate.domain.canonical import NotJsonError
from tidegate.domain.requests import parse_json, validate
from tidegate.sdk.client import Client, Run
from tidegate.sdk.errors import RunNotFinishedError, RunNotFoundError
from tidegate.sdk.reading import Approval

ANSWER_TIMEOUT_S: Final = 30.0
# How long a run that was asked for a moment ago may take to be known to the live view.
NEW_RUN_S: Final = 2.0
POLL_S: Final = 20.0
PIPED_WIDTH: Final = 160
PAUSED: Final = "paused"  # no status, but people look for it as for one

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Start, list, show, watch, answer, pause, resume and cancel runs.",
    epilog=RUN_EXIT_CODES,
    pretty_exceptions_show_locals=False,
)

RunId = Annotated[str, typer.Argument(metavar="RUN", help="The run's id.")]
StepId = Annotated[
    str | None, typer.Argument(metavar="[STEP]", help="The step that asks; may be left out if only one does.")
]
Attempt = Annotated[
    int | None, typer.Option("--attempt", min=1, help="Of the question that is meant; another one is not answered.")
]
Why = Annotated[
    str | None, typer.Option("--why", help="policy, outcome_unknown or change: as the question that is meant says.")
]
Question = Annotated[
    str | None,
    typer.Option("--question", help="Id of the question that is meant, as lists show it; another one is not answered."),
]
Timeout = Annotated[float | None, typer.Option("--timeout", min=0.0, help="Seconds after which to give up waiting.")]

_out = Console(highlight=False, soft_wrap=True)
_tables = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
_notes = Console(stderr=True, highlight=False, soft_wrap=True)


# --- through Kafka --------------------------------------------------------------------------------------------------------


@app.command(epilog=RUN_EXIT_CODES)
def start(
    workflow: Annotated[
        str | None, typer.Argument(metavar="[WORKFLOW]", help="`name`, for its latest version, or `name@version`.")
    ] = None,
    agent: Annotated[str | None, typer.Option("--agent", help="Run this agent alone, instead of a workflow.")] = None,
    input_: Annotated[
        str, typer.Option("--input", "-i", metavar="JSON|@FILE|-", help="JSON, a file of it, or - for standard input.")
    ] = "null",
    run_id: Annotated[
        str | None, typer.Option("--run-id", help="Id of the run; asked for again under it, it is not run again.")
    ] = None,
    account: Annotated[
        str | None, typer.Option("--account", help="Who is billed: a path such as acme/support.")
    ] = None,
    budget_micros: Annotated[
        int | None, typer.Option("--budget-micros", help="The most it may cost; a dollar is 1000000.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", metavar="NAME=VALUE", help="Repeatable.")] = None,
    priority: Annotated[
        int | None,
        typer.Option("--priority", min=0, max=9, help="More goes first among the account's runs. Default: 5."),
    ] = None,
    failure_mode: Annotated[
        str | None,
        typer.Option("--failure-mode", help="`fail_fast` or `continue`, instead of what the workflow says."),
    ] = None,
    prefer: Annotated[
        str | None,
        typer.Option("--prefer", metavar="INSTANCE", help="The executor that should run its steps, where it can."),
    ] = None,
    wait: Annotated[
        bool,
        typer.Option("--wait", "-w", help="Show its events until it is over or needs a human; see the exit codes."),
    ] = False,
    timeout: Timeout = None,
    as_json: Json = False,
) -> None:
    """Ask for a run and print its id. The request is in Kafka then; whether it is taken is known with --wait."""
    with _client("runs start") as client:
        wanted = {
            "workflow": workflow,
            "agent": agent,
            "input": _json("runs start", "--input", input_),
            "run_id": run_id,
            "account": account,
            "budget_micros": budget_micros,
            "tags": _tags(tag or ()),
            "priority": priority,
            "failure_mode": failure_mode,
            "prefer": prefer,
        }
        given = {name: value for name, value in wanted.items() if value is not None}
        validate({"type": "start", **given})
        started = client.start(**given)
        if wait:
            _notes.print(f"run {started}")
            request = validate({"type": "start", **given, "run_id": started})
            _follow(client, started, timeout, as_json, request.content_hash())
        print(json.dumps({"run_id": started}) if as_json else started)


@app.command(epilog=RUN_EXIT_CODES)
def wait(run_id: RunId, timeout: Timeout = None, as_json: Json = False) -> None:
    """Show a run's events until it is over or needs a human. Waits for a run that is yet to come, too."""
    with _client("runs wait") as client:
        _follow(client, run_id, timeout, as_json)


@app.command(epilog=RUN_EXIT_CODES)
def events(
    run_id: RunId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run is over.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object per line, with all fields.")] = False,
) -> None:
    """Print a run's events from the log itself. Needs no gateway."""
    with _client("runs events") as client:
        began_ms = 0
        for event in client.events(run_id, follow=follow):
            began_ms = began_ms or event.at_ms
            if as_json:
                print(run_output.event_json(event), flush=True)
            else:
                _out.print(run_output.time_line(event, began_ms))


@app.command(epilog=RUN_EXIT_CODES)
def approve(
    run_id: RunId,
    step_id: StepId = None,
    reason: Reason = "",
    by: By = None,
    attempt: Attempt = None,
    why: Why = None,
    question: Question = None,
) -> None:
    """Let the attempt that waits go ahead; say what was answered, and what came of it."""
    _decide("approve", run_id, step_id, by, {"reason": reason, "attempt": attempt, "why": why, "question": question})


@app.command(epilog=RUN_EXIT_CODES)
def reject(
    run_id: RunId,
    step_id: StepId = None,
    reason: Reason = "",
    by: By = None,
    attempt: Attempt = None,
    why: Why = None,
    question: Question = None,
) -> None:
    """Refuse the attempt that waits, or say that an outside tool cannot be done: its step fails. Say what came of it."""
    _decide("reject", run_id, step_id, by, {"reason": reason, "attempt": attempt, "why": why, "question": question})


@app.command(epilog=RUN_EXIT_CODES)
def respond(
    run_id: RunId,
    step_id: StepId = None,
    text: Annotated[str | None, typer.Option("--text", "-t", help="The answer, as a text.")] = None,
    value: Annotated[
        str | None, typer.Option("--value", "-v", metavar="JSON|@FILE|-", help="The answer, as JSON.")
    ] = None,
    done: Annotated[
        str | None,
        typer.Option(
            "--done", metavar="JSON|@FILE|-", help="An attempt of unknown outcome was done: this is its result."
        ),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Run an attempt of unknown outcome again.")] = False,
    fail: Annotated[bool, typer.Option("--fail", help="Let the step of unknown outcome fail.")] = False,
    reason: Reason = "",
    by: By = None,
    attempt: Attempt = None,
    why: Why = None,
    question: Question = None,
) -> None:
    """Answer what a run waits for: a question, an event, an outside tool, what became of an attempt. Say what came of it."""
    given = [text is not None, value is not None, done is not None, again, fail]
    if sum(given) != 1:
        usage("runs respond", "give one of --text, --value, --done, --again and --fail")
    answer: Any = text
    if value is not None:
        answer = _json("runs respond", "--value", value)
    elif done is not None:
        answer = {"done": _json("runs respond", "--done", done)}
    elif again or fail:
        answer = "again" if again else "fail"
    with _client("runs respond", by) as client:
        meant: dict[str, Any] = {"attempt": attempt, "why": why, "question": question}
        _check("respond", run_id, step_id=step_id, value=answer, reason=reason, by=by, **meant)
        command = client.respond(run_id, answer, step_id, reason=reason, **meant)
        _answer(client, "respond", run_id, command)


@app.command(epilog=RUN_EXIT_CODES)
def signal(
    run_id: RunId,
    event: Annotated[str, typer.Argument(metavar="EVENT", help="The event's name.")],
    key: Annotated[
        str | None,
        typer.Option("--key", "-k", help="Its correlation key; without one it fits every wait for the name."),
    ] = None,
    payload: Annotated[
        str, typer.Option("--payload", "-p", metavar="JSON|@FILE|-", help="Becomes the output of the wait.")
    ] = "null",
    by: By = None,
) -> None:
    """Send a run an event; it is kept if nothing waits for it yet. Say what came of it."""
    value = _json("runs signal", "--payload", payload)
    with _client("runs signal", by) as client:
        _check("signal", run_id, event=event, key=key, by=by)
        _answer(client, "signal", run_id, client.signal(run_id, event, value, key=key))


@app.command(epilog=RUN_EXIT_CODES)
def pause(run_id: RunId, reason: Reason = "", by: By = None) -> None:
    """Pause a run: what runs may end, nothing further starts. Queues are paused with `tidegate pause`."""
    with _client("runs pause", by) as client:
        _check("pause", run_id, reason=reason, by=by)
        _answer(client, "pause", run_id, client.pause(run_id, reason=reason))


@app.command(epilog=RUN_EXIT_CODES)
def resume(run_id: RunId, reason: Reason = "", by: By = None) -> None:
    """Let a paused run go on."""
    with _client("runs resume", by) as client:
        _check("resume", run_id, reason=reason, by=by)
        _answer(client, "resume", run_id, client.resume(run_id, reason=reason))


@app.command(epilog=RUN_EXIT_CODES)
def cancel(run_id: RunId, reason: Reason = "", by: By = None) -> None:
    """Cancel a run: what runs is aborted, nothing further starts."""
    with _client("runs cancel", by) as client:
        _check("cancel", run_id, reason=reason, by=by)
        _answer(client, "cancel", run_id, client.cancel(run_id, reason=reason))


@contextmanager
def _client(command: str, by: str | None = None) -> Iterator[Client]:
    with explained(command), Client(by=by) as client:
        yield client


def _json(command: str, option: str, text: str) -> Any:
    """Return the JSON value that an option means."""
    where, data = "", text.encode("utf-8", "surrogateescape")
    try:
        if text == "-":
            where, data = " on standard input", sys.stdin.buffer.read()
        elif text.startswith("@"):
            where, data = f" in {text[1:]}", Path(text[1:]).read_bytes()
        return parse_json(data)
    except OSError as error:
        usage(command, f"{option}: {text[1:]} cannot be read: {error.strerror or error}")
    except NotJsonError as error:
        hint = "" if where else f'. In a shell: {option} \'{{"order_id": "order-1"}}\''
        usage(command, f"{option}: no JSON{where}: {error}{hint}")


def _tags(texts: Sequence[str]) -> dict[str, str] | None:
    """Return tags by name."""
    found: dict[str, str] = {}
    for text in texts:
        name, mark, value = text.partition("=")
        if not mark or name in found:
            usage("runs start", f"--tag: {text!r} {'names a tag twice' if mark else 'is no NAME=VALUE'}")
        found[name] = value
    return found or None


def _check(kind: str, run_id: str, **fields: Any) -> None:
    """Find out before it is sent whether a command has the right form. Raises RequestError."""
    given = {name: value for name, value in fields.items() if value not in (None, "")}
    validate({"type": kind, "run_id": run_id, **given})


def _follow(
    client: Client, run_id: str, timeout_s: float | None, as_json: bool, content_hash: str | None = None
) -> None:
    """Print a run's time line until it is over or needs a human; then end with the exit code that says so.

    content_hash: that of the request that we think has started it.
    """
    lines = _notes if as_json else _out
    began_ms = 0
    last: Run | None = None
    for run, new in client.follow(run_id, timeout_s):
        last = run
        for event in new:
            if event.type == "RunStarted" and content_hash not in (None, event.data.content_hash):
                typer.echo(f"tidegate runs start: run {run_id} is there already, with other content", err=True)
                raise typer.Exit(EXIT_REFUSED)
            began_ms = began_ms or event.at_ms
            lines.print(run_output.time_line(event, began_ms))
        if run.needs_human:
            break
    if last is None or not (last.is_over or last.needs_human):
        seen = f"it is {last.status}" if last is not None else "the log has nothing of it"
        raise RunNotFinishedError(f"run {run_id} did not end within {timeout_s} s: {seen}")
    if as_json:
        print(run_output.run_json(last))
    else:
        for line in run_output.ending(last):
            _out.print(line)
    raise typer.Exit(EXIT_NEEDS_HUMAN if last.needs_human else exit_code(last.status))


def _asked(client: Client, run_id: str, step_id: str | None) -> Approval | None:
    """Return the question that an answer about this step means now; None if that is not sure, or there is none."""
    try:
        approvals = client.get(run_id).approvals
    except RunNotFoundError:
        return None
    found = [asked for asked in approvals if step_id in (None, asked.step_id)]
    return found[0] if len(found) == 1 else None


def _decide(
    verb: Literal["approve", "reject"], run_id: str, step_id: str | None, by: str | None, fields: dict[str, Any]
) -> None:
    """Decide what was asked: the question that `fields` names, or the only one that is open now."""
    with _client(f"runs {verb}", by) as client:
        _check(verb, run_id, step_id=step_id, by=by, **fields)
        asked = _asked(client, run_id, step_id)
        fields["question"] = fields["question"] or (asked.question if asked else None)
        send = client.approve if verb == "approve" else client.reject
        _answer(client, verb, run_id, send(run_id, step_id, **fields), asked)


def _answer(client: Client, command: str, run_id: str, command_id: str, asked: Approval | None = None) -> None:
    """Wait until the run has answered a command, and say what it answered. asked: the question that it was about."""
    try:
        event = client.answer(run_id, command_id, ANSWER_TIMEOUT_S)
    except RunNotFinishedError:
        problem = f"no scheduler has answered within {ANSWER_TIMEOUT_S:.0f} s. The command is in Kafka and counts when one runs."
        typer.echo(f"tidegate runs {command}: {problem}", err=True)
        raise typer.Exit(EXIT_NO_ANSWER) from None
    if event.type == "CommandRefused":
        say(f"tidegate runs {command}: {event.data.code}: {event.data.reason}", err=True)
        raise typer.Exit(EXIT_REFUSED)
    say(run_output.answer(run_id, event, asked))


# --- through the live view ------------------------------------------------------------------------------------------------


@app.command("list", epilog=RUN_EXIT_CODES)
def list_(
    status: Annotated[
        list[str] | None, typer.Option("--status", "-s", help="Such as waiting, failed or paused; repeatable.")
    ] = None,
    workflow: Annotated[str, typer.Option("--workflow", help="`name` or `name@version`.")] = "",
    account: Annotated[str, typer.Option("--account", help="This account and all below it.")] = "",
    since: Annotated[
        str, typer.Option("--since", help="Started then or later: 2026-01-31T12:00Z, or 90m, 12h, 7d ago.")
    ] = "",
    until: Annotated[str, typer.Option("--until", help="Started before then.")] = "",
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="At most so many.")] = 50,
    before: Annotated[
        str, typer.Option("--before", help="The next page: what the page before said at its end (`next` in JSON).")
    ] = "",
    as_json: Json = False,
    url: Url = "",
) -> None:
    """List runs, those started last first."""
    known = {states.RUNNING, states.WAITING, PAUSED, *states.RUN_TERMINAL}
    for name in status or ():
        if name not in known:
            usage("runs list", f"--status: {name!r} is none of {', '.join(sorted(known))}")
    asked = {"status": ",".join(status or ()), "workflow": workflow, "account": account, "limit": limit}
    asked |= {"since_ms": _moment("--since", since), "until_ms": _moment("--until", until), "before": before}
    with explained("runs list"):
        found = patiently(lambda: LiveView(url).runs({name: value for name, value in asked.items() if value}), _say)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        _tables.print(run_output.runs_table(found["runs"]))
        if found.get("next"):
            _notes.print(f"[dim]more with --before {escape(found['next'])}[/]")
    if found["partitions_missing"]:
        _notes.print(f"[yellow]no gateway answers for partitions {found['partitions_missing']}: runs are missing[/]")


def _say(text: str) -> None:
    _notes.print(text, style="dim", markup=False)


def _moment(option: str, text: str) -> int | None:
    """Return a time of the command line as Unix milliseconds. Ends the command if it is none."""
    try:
        return moment_ms(text, time.time()) if text else None
    except ValueError as error:
        usage("runs list", f"{option}: {error}")


@app.command(epilog=RUN_EXIT_CODES)
def show(run_id: RunId, as_json: Json = False, url: Url = "") -> None:
    """Show how a run stands: its steps, its questions, its money."""
    with explained("runs show"):
        found = patiently(lambda: LiveView(url).run(run_id, wait_s=NEW_RUN_S), _say)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        _tables.print(run_output.run_page(found))


@app.command(epilog=RUN_EXIT_CODES)
def watch(
    run_id: RunId,
    timeout: Timeout = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object per line for every change.")] = False,
    url: Url = "",
) -> None:
    """Follow a run in the live view until it is over; a question to a human is shown, and waited for."""
    deadline = None if timeout is None else time.monotonic() + timeout
    seen: dict[str, Any] | None = None
    with explained("runs watch"):
        for body in _changes(LiveView(url), run_id, deadline):
            if as_json:
                print(json.dumps(body, ensure_ascii=False), flush=True)
            else:
                for line in run_output.changes(seen, body):
                    _out.print(line)
            seen = body
    assert seen is not None  # noqa: S101 - a run that is not there raises
    if seen["status"] in states.RUN_TERMINAL:
        raise typer.Exit(exit_code(seen["status"]))
    typer.echo(f"tidegate runs watch: run {run_id} is still {seen['status']} after {timeout} s", err=True)
    raise typer.Exit(EXIT_TIMEOUT)


def _changes(view: LiveView, run_id: str, deadline: float | None) -> Iterator[dict[str, Any]]:
    """Yield the run, then again after each change, until it is over or the time is up. Raises as LiveView.run.

    A gateway that is restarted meanwhile is waited for: it may come back under another address.
    """
    seq, wait_s = 0, NEW_RUN_S
    away_since: float | None = None
    while True:
        try:
            body = view.run(run_id, after_seq=seq, wait_s=wait_s)
        except (NotReadyError, UnknownRunError) as error:
            # Known a moment ago, so the gateway that answers now is one that knows it not yet. Or it is there, and not whole yet.
            is_hopeful = seq or isinstance(error, RestoringError)
            if not is_hopeful or (away_since and time.monotonic() - away_since > GATEWAY_AWAY_S):
                raise
            if away_since is None:
                away_since = time.monotonic()
                _say(waiting(error))
            time.sleep(RETRY_S)
        else:
            away_since = None
            if body["seq"] > seq:
                seq = body["seq"]
                yield body
                if body["status"] in states.RUN_TERMINAL:
                    return
        left_s = POLL_S if deadline is None else deadline - time.monotonic()
        if left_s <= 0:
            return
        wait_s = min(POLL_S, left_s)
