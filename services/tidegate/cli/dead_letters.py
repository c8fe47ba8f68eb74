"""`tidegate dead-letters list|show|redrive`: what could not be used. Talks to Kafka alone."""

from __future__ import annotations

import base64
import json
import sys
import time
from typing import Annotated, Any, Final

import typer
from rich.table import Table
from rich.text import Text

from tidegate.cli.endings import EXIT_REFUSED, explained, usage
from tidegate.cli.options import Json
from tidegate.cli.run_output import moment
from tidegate.cli.terminal import Console, harmless
from tidegate.cli.wording import counted, moment_ms
from tidegate.domain.canonical import NotJsonError
from tidegate.domain.requests import parse_json
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.letter_box import (
    RUN_REQUESTS,
    CannotRedriveError,
    Filter,
    Stored,
    find_letters,
    read_letters,
    redrive_record,
)
from tidegate.eventlog.letter_box import redrive as send_again
from tidegate.eventlog.settings import KafkaSettings

EXIT_CODES: Final = (
    "Exit codes: 0 done; 2 wrong usage; 3 Kafka does not answer; 4 there is no such letter, or it cannot be sent again."
)
DEFAULT_LIMIT: Final = 50
PIPED_WIDTH: Final = 160
MAX_SHOWN_REASON: Final = 200
MAX_SHOWN_BYTES: Final = 64 * 1024

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="List and show dead letters (what could not be used, with the reason), and send their originals again.",
    epilog=EXIT_CODES,
    pretty_exceptions_show_locals=False,
)

Since = Annotated[
    str,
    typer.Option("--since", metavar="AGE|TIME", help="Only later ones: 90s, 15m, 6h or 2d ago, or 2026-01-31T12:00Z."),
]
Code = Annotated[str, typer.Option("--code", help="Only with this code: malformed, unknown_workflow, ...")]
Topic = Annotated[str, typer.Option("--topic", help="Only about records of this topic.")]
RunId = Annotated[str, typer.Option("--run", metavar="RUN", help="Only about this run.")]

_out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


@app.command("list", epilog=EXIT_CODES)
def list_(
    since: Since = "",
    code: Code = "",
    topic: Topic = "",
    run_id: RunId = "",
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="The latest so many.")] = DEFAULT_LIMIT,
    as_json: Json = False,
) -> None:
    """List dead letters, the latest last."""
    with explained("dead-letters list"):
        broker = KafkaBroker(KafkaSettings())
        found = _read(broker, Filter(_since_ms("list", since), code, topic, run_id))
        broker.close()
    shown = found[-limit:]
    if as_json:
        print(json.dumps({"count": len(found), "letters": [_as_json(stored) for stored in shown]}, ensure_ascii=False))
        return
    table = Table("letter", "when", "code", "run", "reason", "sent again as", box=None)
    for stored in shown:
        letter = stored.letter
        cells = (moment(letter.at_ms), letter.code, letter.run_id, letter.reason[:MAX_SHOWN_REASON])
        table.add_row(*map(_plain, (stored.key, *cells, ", ".join(stored.redriven))))
    _out.print(table)
    hidden = f"; the latest {len(shown)} are shown (--limit)" if len(shown) < len(found) else ""
    print(f"{counted(len(found), 'letter')}{hidden}")


@app.command(epilog=EXIT_CODES)
def show(
    key: Annotated[str, typer.Argument(metavar="LETTER", help="topic:partition:offset of what died; see `list`.")],
    as_json: Json = False,
    raw: Annotated[bool, typer.Option("--raw", help="Write nothing but the original's bytes.")] = False,
) -> None:
    """Print a letter: why, from where, its headers, and the original (JSON is laid out)."""
    with explained("dead-letters show"):
        broker = KafkaBroker(KafkaSettings())
        stored = find_letters(broker, frozenset([key])).get(key)
        broker.close()
    if stored is None:
        _no_such(key)
        raise typer.Exit(EXIT_REFUSED)
    if raw:
        sys.stdout.buffer.write(stored.letter.original)
        sys.stdout.buffer.flush()
    elif as_json:
        print(json.dumps(_as_json(stored, whole=True), ensure_ascii=False))
    else:
        for line in _lines(stored):
            print(line)


@app.command(epilog=EXIT_CODES)
def redrive(
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="[LETTER]...", help="Which; or say it with options.")
    ] = None,
    since: Since = "",
    code: Code = "",
    topic: Topic = "",
    run_id: RunId = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")] = False,
    new_id: Annotated[
        bool, typer.Option("--new-id", help="Under a new run id (or command id) where the request's own is used up.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Also what was sent again before.")] = False,
) -> None:
    """Send the originals of letters again, byte for byte, to the topic where they came from.

    Only requests can be sent again: everything else follows from a log. The new record's header `tidegate-redrives` names the
    letter, and the letter notes where it went. What cannot be sent again is said, and the rest is sent.
    """
    wanted = Filter(_since_ms("redrive", since), code, topic, run_id)
    if bool(keys) == (wanted != Filter()):
        usage("dead-letters redrive", "name letters, or say which with --since, --code, --topic or --run; not both")
    with explained("dead-letters redrive"):
        broker = KafkaBroker(KafkaSettings())
        named = list(dict.fromkeys(keys or [stored.key for stored in _read(broker, wanted)]))
        found = find_letters(broker, frozenset(named))
        count = broker.describe([RUN_REQUESTS])[RUN_REQUESTS].partition_count
        done = [
            _redrive(broker, key, found.get(key), count, dry_run=dry_run, new_id=new_id, again=again) for key in named
        ]
        broker.close()
    verb = "would be sent again" if dry_run else "sent again"
    typer.echo(f"{sum(done)} of {counted(len(done), 'letter')} {verb}", err=True)
    raise typer.Exit(0 if all(done) else EXIT_REFUSED)


def _redrive(
    broker: KafkaBroker, key: str, stored: Stored | None, count: int, *, dry_run: bool, new_id: bool, again: bool
) -> bool:
    """Send one original again and say so; returns False if it cannot be."""
    if stored is None:
        _no_such(key)
        return False
    try:
        record = redrive_record(stored, count, new_id=new_id, again=again)
    except CannotRedriveError as error:
        typer.echo(f"{key}: not sent again: {error}", err=True)
        return False
    size = counted(len(record.value or b""), "byte")
    if dry_run:
        print(f"{key}: {size} would go to {record.topic}:{record.partition}")
    else:
        print(f"{key}: {size} sent again as {send_again(broker, stored, record)}")
    return True


def _read(broker: KafkaBroker, wanted: Filter) -> list[Stored]:
    with Console(stderr=True).status("reading dead-letters …"):
        return read_letters(broker, wanted)


def _no_such(key: str) -> None:
    typer.echo(f"there is no dead letter {key}; `tidegate dead-letters list` shows their names", err=True)


def _since_ms(command: str, text: str) -> int:
    """Return the moment that an age or a time means, in Unix milliseconds; 0 for none."""
    try:
        return moment_ms(text, time.time()) if text else 0
    except ValueError as error:
        usage(f"dead-letters {command}", f"--since: {error}")


def _lines(stored: Stored) -> list[str]:
    letter = stored.letter
    lines = [
        f"letter    {_plain(stored.key)}",
        f"when      {moment(letter.at_ms)}",
        f"by        {_plain(letter.service)}",
        f"code      {_plain(letter.code)}",
        f"run       {_plain(letter.run_id) or '-'}",
        f"reason    {_plain(letter.reason)}",
        f"key       {_plain(letter.original_key.decode('utf-8', 'backslashreplace')) or '-'}",
    ]
    lines += [
        f"header    {_plain(name)}: {_plain(value.decode('utf-8', 'backslashreplace'))}"
        for name, value in letter.headers.items()
    ]
    kept = "" if letter.original_size <= len(letter.original) else f", of which {len(letter.original)} were kept"
    lines.append(f"original  {counted(letter.original_size, 'byte')}{kept}")
    return [*lines, "", *_original_lines(letter.original)]


def _original_lines(original: bytes) -> list[str]:
    try:
        text = json.dumps(parse_json(original), indent=2, ensure_ascii=False)
    except NotJsonError:
        text = original[:MAX_SHOWN_BYTES].decode("utf-8", "backslashreplace")
        if len(original) > MAX_SHOWN_BYTES:
            text += f"\n… {len(original) - MAX_SHOWN_BYTES} bytes more: --raw"
    return [harmless(line) for line in text.split("\n")]


def _as_json(stored: Stored, *, whole: bool = False) -> dict[str, Any]:
    letter = stored.letter
    found: dict[str, Any] = {
        "letter": stored.key,
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "service": letter.service,
        "code": letter.code,
        "reason": letter.reason,
        "run_id": letter.run_id,
        "original_size": letter.original_size,
        "at_ms": letter.at_ms,
        "redriven_as": list(stored.redriven),
    }
    if whole:
        found["is_truncated"] = letter.original_size > len(letter.original)
        found["key_base64"] = base64.b64encode(letter.original_key).decode()
        found["headers_base64"] = {name: base64.b64encode(value).decode() for name, value in letter.headers.items()}
        found["original_base64"] = base64.b64encode(letter.original).decode()
    return found


def _plain(text: str) -> Text:
    """Return somebody else's text for a terminal: on one line, and no control sequences."""
    return Text(harmless(text.replace("\n", " ")))
