"""`tidegate ledger retire|show`: carry the ledger's balances forward, retire what is older, and see how far that has come."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Annotated, Final

import typer

from tidegate import codec
from tidegate.cli.audit import LEDGER
from tidegate.cli.documents import in_force, publish, value_of
from tidegate.cli.endings import explained
from tidegate.cli.options import By, Json
from tidegate.cli.terminal import Console
from tidegate.cli.wording import counted, plain_table
from tidegate.domain.entry import Entry, OwnerAnnounced
from tidegate.domain.ledger_events import carried_by
from tidegate.eventlog.interface import Broker, UnknownTopicError
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.schemas import load_schemas
from tidegate.eventlog.settings import KafkaSettings
from tidegate.eventlog.validity import EpochTracker
from tidegate.gate.carrying import DAY_S, Retention
from tidegate.gate.windows import said_moment

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Retire old entries of the ledger, whose balances are carried forward, and show how far that has come. Exit codes: 0 "
    "done; 2 wrong usage; 3 Kafka does not answer.",
)
RETENTION: Final = "retention:ledger"
HOUR_S: Final = 3_600
MAX_DAYS: Final = 36_500


@dataclass
class Kept:
    """What a partition of the ledger holds. carried_*: of the last entry that carries its balances forward; 0 and empty if there
    is none. before_carried: entries that stand before it; older: those of them that are older than they are to be kept. retired:
    those that have a tombstone and are there only until Kafka compacts; they count nowhere else."""

    partition: int
    entries: int = 0
    oldest_ms: int = 0
    carried_ms: int = 0
    carried_by: str = ""
    carried_for: str = ""
    before_carried: int = 0
    older: int = 0
    retired: int = 0


@app.command()
@explained("ledger retire")
def retire(
    keep_days: Annotated[
        float, typer.Option("--keep-days", min=0.0, max=MAX_DAYS, help="How long entries are kept at least.")
    ],
    every_hours: Annotated[
        float,
        typer.Option("--every-hours", min=0.001, max=24 * MAX_DAYS, help="How often balances are carried forward."),
    ] = 24.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say how many entries are old enough now; publish nothing.")
    ] = False,
    by: By = None,
) -> None:
    """Have gates retire entries that are older, from now on: until `tidegate policy remove retention:ledger`.

    Who asked is recorded in each entry that carries balances forward. Projections keep their rows, by settings of their own.
    """
    broker = KafkaBroker(KafkaSettings())
    keep_s = round(keep_days * DAY_S)
    if dry_run:
        found = kept(broker, keep_s * 1000)
        for part in found:
            typer.echo(
                f"{LEDGER}-{part.partition}: {part.older} of {counted(part.entries, 'entry', 'entries')} are older"
            )
        typer.echo("nothing was published; what is older goes once an entry carries the balances forward")
        return
    document = Retention(
        kind="retention", retention="ledger", version="1", keep_s=keep_s, every_s=max(1, round(every_hours * HOUR_S))
    )
    publish(broker, [document], by=by)
    typer.echo("gates retire what is older from now on; `tidegate ledger show` says how far that has come")


@app.command()
@explained("ledger show")
def show(as_json: Json = False) -> None:
    """Show what is kept of the ledger, when and for whom its balances were carried forward, and what is still to be retired."""
    broker = KafkaBroker(KafkaSettings())
    row = in_force(broker).get(RETENTION)
    keep_s = None if row is None else int(value_of(row)["keep_s"])
    found = kept(broker, None if keep_s is None else keep_s * 1000)
    if as_json:
        asked = None if row is None else {"by": row.by, "at_ms": row.at_ms, **value_of(row)}
        typer.echo(json.dumps({"asked": asked, "partitions": [asdict(part) for part in found]}))
        return
    if row is None or keep_s is None:
        typer.echo("nothing is retired: nobody asked for it (`tidegate ledger retire`)")
    else:
        typer.echo(f"{row.by or 'somebody'} asked for it: entries are kept for {keep_s / DAY_S:g} days")
    table = plain_table(
        "partition", "entries", "oldest", "carried forward", "by", "before that", "to be retired", "retired"
    )
    for part in found:
        oldest, carried = (said_moment(at_ms) if at_ms else "" for at_ms in (part.oldest_ms, part.carried_ms))
        counts = (str(part.before_carried), str(part.older if part.carried_ms else 0), str(part.retired))
        table.add_row(str(part.partition), str(part.entries), oldest, carried, part.carried_by, *counts)
    Console().print(table)


def kept(broker: Broker, keep_ms: int | None, now_ms: int | None = None) -> list[Kept]:
    """Read the whole ledger and return what each partition holds. Blocks; raises EventLogError."""
    described = broker.describe([LEDGER]).get(LEDGER)
    if described is None:
        raise UnknownTopicError(f"there is no topic {LEDGER}")
    load_schemas(broker)
    before_ms = None if keep_ms is None else (now_ms or time.time_ns() // 1_000_000) - keep_ms
    return [_of_partition(broker, partition, before_ms) for partition in range(described.partition_count)]


def _of_partition(broker: Broker, partition: int, before_ms: int | None) -> Kept:
    found, tracker = Kept(partition), EpochTracker()
    start, end = broker.offsets(LEDGER, partition)
    gone = {message.key for message in broker.read(LEDGER, partition, start, end) if message.value is None}
    older = 0
    for message in broker.read(LEDGER, partition, start, end):
        if message.value is None:
            continue
        if message.key in gone:
            found.retired += 1
            continue
        record = codec.decode(message.value)
        if isinstance(record, OwnerAnnounced):
            tracker.announced(message.offset, record.epoch)
        elif isinstance(record, Entry) and tracker.is_valid(record.epoch):
            if (first := carried_by(record.events)) is not None:
                found.carried_ms, found.carried_by, found.carried_for = record.now_ms, first.by, first.policy
                found.before_carried, found.older = found.entries, older
            found.entries += 1
            found.oldest_ms = found.oldest_ms or record.now_ms
            older += before_ms is not None and message.timestamp_ms <= before_ms
    if not found.carried_ms:
        found.older = older
    return found
