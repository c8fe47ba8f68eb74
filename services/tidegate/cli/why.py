"""`tidegate why RUN [STEP]`: how a step's input was bound, what the gate decided about it, by which rule, on which values."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Final, NamedTuple, TypeVar

import typer

from tidegate import codec
from tidegate.cli.endings import EXIT_REFUSED, explained
from tidegate.cli.terminal import Console, say
from tidegate.domain import ledger_events as ev
from tidegate.domain.identity import account_root, partition_of
from tidegate.eventlog.interface import Broker, Message, UnknownTopicError
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.schemas import load_schemas
from tidegate.eventlog.settings import KafkaSettings
from tidegate.sdk.bound_inputs import BoundInput, bound_inputs
from tidegate.sdk.client import Client
from tidegate.sdk.reading import Event, ValidEntries

app = typer.Typer(add_completion=False)
LEDGER: Final = "gate-ledger"
SETTINGS_RULE: Final = "retries"  # of a document no rule of which is about the error's class
MAX_SHOWN: Final = 500
VOID: Final = (
    "void"  # the ledger's word for what a run has given up: it ended, was cancelled, or an answer came too late
)


T = TypeVar("T", "Line", BoundInput)


class Line(NamedTuple):
    """What the ledger says of an attempt at one moment. values: what was looked at, JSON or empty."""

    at_ms: int
    step_id: str
    attempt: int
    said: str
    rule: str
    policy: str
    values: str


@app.command()
@explained("why")
def why(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="The run's id.")],
    step_id: Annotated[
        str | None, typer.Argument(metavar="[STEP]", help="A step; all that the gate knows if left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object per line.")] = False,
) -> None:
    """Say why the gate allowed, denied, asked about, paused or keeps waiting a step: rule, version, values, budget numbers.

    Of a step also how its input was bound: which expression read what, and gave which value; and what became of the changes of the
    run's graph that steps have proposed. Read from the logs themselves.
    Exit codes: 0 done; 3 Kafka does not answer; 4 there is no such run, or the gate was never asked.
    """
    broker = KafkaBroker(KafkaSettings())
    with Client(broker) as client:
        run, folded = client.get_folded(run_id)
        events = list(client.events(run_id))
    bound = [] if step_id is None or step_id not in folded.steps else bound_inputs(folded, step_id)
    for part in bound:
        _print(part, shown_input, as_json=as_json)
    with Console(stderr=True).status(f"reading {LEDGER} …"):
        lines = [
            *story(_ledger_of(broker, run.account), run_id, step_id),
            *of_changes(events, step_id),
            *repeats(events, step_id),
        ]
    lines.sort(key=lambda line: line.at_ms)
    if not lines and not bound:
        asked = f"step {step_id} of run {run_id}" if step_id else f"run {run_id}"
        because = f": {run.reason}" if run.reason else ""
        say(f"the gate was never asked about {asked}; the run is {run.status}{because}", err=True)
        raise typer.Exit(EXIT_REFUSED)
    for line in lines:
        _print(line, shown, as_json=as_json)


def _print(what: T, for_people: Callable[[T], str], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(what._asdict(), ensure_ascii=False))
    else:
        say(for_people(what))


def _ledger_of(broker: Broker, account: str) -> Iterator[Message]:
    """Return the ledger partition of an account. Raises EventLogError."""
    described = broker.describe([LEDGER]).get(LEDGER)
    if described is None:
        raise UnknownTopicError(f"there is no topic {LEDGER}")
    load_schemas(broker)
    partition = partition_of(account_root(account), described.partition_count)
    start, end = broker.offsets(LEDGER, partition)
    return broker.read(LEDGER, partition, start, end)


def story(messages: Iterable[Message], run_id: str, step_id: str | None) -> Iterator[Line]:
    """Yield what a ledger partition says of a run's attempts, in order; void entries are left out."""
    valid = ValidEntries()
    for message in messages:
        if not valid.admits(message):
            continue
        entry = codec.decode(message.value)
        for event in entry.events:
            say = _SAYINGS.get(type(event))
            if say is None or event.run_id != run_id or step_id not in (None, event.step_id):
                continue
            get = vars_of(event)
            yield Line(
                entry.now_ms,
                event.step_id,
                event.attempt,
                say(event),
                get("rule"),
                get("policy"),
                get("values"),
            )


def of_changes(events: Iterable[Event], step_id: str | None) -> Iterator[Line]:
    """Yield what a run's log says of the changes of its graph."""
    for at in events:
        say = _OF_CHANGES.get(at.type)
        if say is not None and step_id in (None, at.data.step_id):
            change = getattr(at.data, "change", "")
            yield Line(at.at_ms, at.data.step_id, getattr(at.data, "attempt", 0), say(at.data), "", "", change)


_OF_CHANGES: Final[dict[str, Callable[[Any], str]]] = {
    "GraphChangeProposed": lambda event: f"proposes to add {', '.join(event.nodes) or 'edges'}",
    "GraphChangeAccepted": lambda event: f"its change was accepted: {', '.join(event.nodes) or 'edges'}",
    "GraphChangeRejected": lambda event: f"its change was rejected ({event.code}): {event.reason}",
}


def repeats(events: Iterable[Event], step_id: str | None) -> Iterator[Line]:
    """Yield what was decided about the repetition of failed attempts by retry documents, or by rules for their error classes."""
    for event in events:
        body = event.data
        if event.type != "AttemptEnded" or step_id not in (None, body.step_id):
            continue
        if body.retry_document or body.retry_rule:
            then = f"again at {_time(body.retry_at_ms)}" if body.retry_at_ms is not None else "not again"
            said = f"{body.outcome} with {body.error_class}: {then},"
            yield Line(
                event.at_ms,
                body.step_id,
                body.attempt,
                said,
                body.retry_rule or SETTINGS_RULE,
                body.retry_document,
                "",
            )


def vars_of(event: Any) -> Callable[[str], str]:
    """Return what looks a field of an event up: empty if it has none."""
    return lambda name: str(getattr(event, name, ""))


def shown(line: Line) -> str:
    """Return a line for people."""
    at = datetime.datetime.fromtimestamp(line.at_ms / 1000, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    by = f" by {line.policy}/{line.rule}" if line.policy else f" by {line.rule}" if line.rule else ""
    looked = f"\n    it looked at {line.values}" if line.values else ""
    attempt = f"#{line.attempt}" if line.attempt else ""  # what became of a change is about none
    return f"{at}  {line.step_id}{attempt}  {line.said}{by}{looked}"


def shown_input(part: BoundInput) -> str:
    """Return for people how a part of a step's input came about."""
    where = f"input {part.part}" if part.part else "input"
    by = f" = {part.expression}" if part.expression else ""
    sources = f" from {', '.join(part.sources)}" if part.sources else ""
    value = json.dumps(part.value, ensure_ascii=False)
    cut = value if len(value) <= MAX_SHOWN else value[:MAX_SHOWN] + "…"
    return f"{where}{by}{sources}\n    it was {cut}"


def _time(at_ms: int) -> str:
    return datetime.datetime.fromtimestamp(at_ms / 1000, datetime.UTC).isoformat(timespec="seconds")


def _reserved(event: ev.Reserving) -> str:
    basis = f" ({event.basis})" if event.basis else ""
    counted = f", counted in {', '.join(event.buckets)}" if event.buckets else ""
    approved = f", approved by {event.approved_by}" if event.approved_by else ""
    return f"allowed: {event.reserved_micros} micro-dollars set aside{basis}{counted}{approved}"


def _held(event: ev.ApprovalHeld) -> str:
    until = f", open until {_time(event.expires_at_ms)}" if event.expires_at_ms else ""
    return f"held for approval{until}: {event.reason};"


def _paused(event: ev.AttemptPaused) -> str:
    until = f"; the next window begins at {_time(event.until_ms)}" if event.until_ms else ""
    what = "waits for a run above its own" if event.rule == "family" else "paused for lack of budget"
    return f"{what}{until}: {event.reason};"


def _settled(event: ev.AttemptSettled) -> str:
    basis = f" ({event.basis})" if event.basis else ""
    return f"settled: {event.actual_micros} micro-dollars{basis}, {event.overshoot_micros} of it more than set aside"


def _throttled(event: ev.AttemptThrottled) -> str:
    before = f", {event.position} before it" if event.position else ""
    retry = f", at the earliest at {_time(event.retry_at_ms)}" if event.retry_at_ms else ""
    return f"waits: {event.reason}{before}{retry}"


def _released(event: ev.AttemptReleased) -> str:
    return "released: its run wants it no more" if event.reason == VOID else f"released: {event.reason}"


def _queued(event: ev.AttemptQueued) -> str:
    if event.call.is_outside:
        return "waits for a place under a limit"
    return f"waits for a free slot of an executor of queue {event.call.queue}"


def _placed(event: ev.Placing) -> str:
    if event.call.is_outside:
        return "let through: it waits for whoever does it outside"
    preferred = event.call.preferred
    if event.instance_id in preferred:
        wish = ", as preferred"
    else:
        wish = f"; preferred, but without a free slot for it: {', '.join(preferred)}" if preferred else ""
    return f"placed on {event.instance_id} (incarnation {event.incarnation}){wish}"


def _granted(event: ev.AttemptGranted) -> str:
    return f"{_reserved(event)}; {_placed(event)}"


_SAYINGS: Final[dict[type, Callable[[Any], str]]] = {
    ev.AttemptGranted: _granted,
    ev.AttemptReserved: _reserved,
    ev.AttemptRefused: lambda event: f"denied: {event.reason};",
    ev.ApprovalHeld: _held,
    ev.QuestionAnswered: lambda event: f"needs no approval any more, because of {event.by}: {event.reason};",
    ev.ApprovalLapsed: lambda event: f"the approval expired: {event.reason};",
    ev.AttemptPaused: _paused,
    ev.AttemptQueued: _queued,
    ev.AttemptPlaced: _placed,
    ev.PlacementLost: lambda event: f"lost with {event.instance_id}: {event.reason}",
    ev.AttemptCancelTold: lambda event: f"{event.instance_id} was told to abort it",
    ev.AttemptSettled: _settled,
    ev.AttemptThrottled: _throttled,
    ev.AttemptReleased: _released,
}
