"""A folder full of the logs of real runs, made once and looked at often: `python -m tidegate.bench.dataset FOLDER`.

It only produces requests (and answers questions, and cancels, as users do) and lets the services run: what is in the logs was
written by the scheduler and the gate. What is kept is Kafka's data and a note of how much there is.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import typer

from tidegate.bench.lab import DEFAULT_SLOTS, Lab, say_on_stderr
from tidegate.bench.watcher import RunFailedError
from tidegate.embedded import sql
from tidegate.embedded.errors import EmbeddedKafkaError
from tidegate.embedded.stack import StackError
from tidegate.eventlog.interface import EventLogError
from tidegate.projection.dashboards.boards import BOARDS
from tidegate.projection.dashboards.macros import ALL, Range, substituted
from tidegate.projection.dashboards.panels import query_of
from tidegate.sdk.client import Client

NOTE: Final = "dataset.json"
DEFAULT_EVENTS: Final = 1_000_000
CHUNK_RUNS: Final = 1_000
SMALLEST_CHUNK_RUNS: Final = 100  # of which the mix has some of each
EVENTS_PER_RUN: Final = 23  # of both logs, about
TIMEOUT_S: Final = 900.0
POLL_S: Final = 0.2
KEPT: Final = frozenset({"kafka", NOTE})
SEED: Final = 5
EVENT_COUNT: Final = "SELECT (SELECT count() FROM events) + (SELECT count() FROM ledger) AS n"
QUESTIONS: Final = "SELECT run_id FROM approvals WHERE status = 'open'"
# Of a hundred runs: what, and for whom; accounts that are not named are those of the benchmark.
MIX: Final = (
    (78, "three", ""),
    (8, "shaky", ""),
    (3, "hopeless", ""),
    (7, "agent:clerk", ""),
    (2, "three", "asked/desk"),
    (1, "three", "denied/interns"),
    (1, "alive", ""),
)
POLICY: Final = """
policy: dataset
version: "1"
rules:
  - name: somebody-must-look
    when: account == 'asked/desk' && step == 'b'
    then: require_approval
    reason: somebody must look
  - name: not-for-interns
    when: account == 'denied/interns'
    then: deny
    reason: interns run nothing
"""

app = typer.Typer(add_completion=False)


class Note(NamedTuple):
    """What a dataset holds: events of both logs, runs, and when it began and ended, Unix seconds."""

    events: int
    runs: int
    from_s: int
    to_s: int


def read_note(folder: Path) -> Note:
    """Return what a dataset holds. Raises OSError or ValueError if the folder holds none."""
    return Note(**json.loads((folder / NOTE).read_text(encoding="utf-8")))


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(help="Where to; must not exist, or be empty.")],
    events: Annotated[
        int, typer.Option(min=1, help="At least so many events, of both logs together.")
    ] = DEFAULT_EVENTS,
) -> None:
    """Make a dataset for `tidegate bench --works W6 --dataset FOLDER`: minutes, and some 400 MB for a million events."""
    if folder.exists() and any(folder.iterdir()):
        typer.echo(f"{folder} is not empty: name another folder, or remove it", err=True)
        raise typer.Exit(2)
    try:
        note = make(folder.absolute(), events)
    except (StackError, EmbeddedKafkaError, EventLogError, RunFailedError, TimeoutError) as error:
        typer.echo(f"no dataset was made: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(json.dumps(note._asdict()))


def make(folder: Path, events_wanted: int) -> Note:
    """Have runs until the logs hold so many events; keep Kafka's data. Blocks. Raises StackError, TimeoutError."""
    chance = random.Random(SEED)  # noqa: S311 - which runs there are, not secrets
    from_s, runs = int(time.time()), 0
    with Lab(folder, slots=DEFAULT_SLOTS, say=say_on_stderr) as lab:
        _apply_policy(lab, folder)
        there = 0
        while there < events_wanted:
            missing = (events_wanted - there) // EVENTS_PER_RUN
            runs += _play(lab, chance, max(SMALLEST_CHUNK_RUNS, min(CHUNK_RUNS, missing)))
            sql.wait_caught_up(lab.data_dir, sql.log_ends(lab.broker), TIMEOUT_S)
            there = int(sql.query(lab.data_dir, EVENT_COUNT)[0]["n"])
            lab.say(f"dataset: {runs:,} runs, {there:,} of {events_wanted:,} events")
    for path in folder.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    note = Note(there, runs, from_s, int(time.time()) + 1)
    (folder / NOTE).write_text(json.dumps(note._asdict(), indent=2) + "\n", encoding="utf-8")
    return note


def _apply_policy(lab: Lab, folder: Path) -> None:
    file = folder / "policy.yaml"
    file.write_text(POLICY, encoding="utf-8")
    environment = {**os.environ, "TIDEGATE_KAFKA_BOOTSTRAP": lab.settings.bootstrap}
    command = [sys.executable, "-m", "tidegate.cli", "policy", "apply", str(file)]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


def _play(lab: Lab, chance: random.Random, count: int) -> int:
    """Ask for `count` runs, give or take a few, in a mixed order, and see all of them end. Returns how many they were."""
    kinds = [(what, account) for share, what, account in MIX for _ in range(share * count // 100)]
    chance.shuffle(kinds)
    asked: dict[str, float] = {}
    by_kind: dict[str, list[str]] = {}
    for what, account in kinds:
        run_id, at_s = lab.request(what, account=account)
        asked[run_id] = at_s
        by_kind.setdefault(account or what, []).append(run_id)
    lab.flush()
    with Client(lab.settings, by="dataset") as client:
        for run_id in by_kind["alive"]:
            client.cancel(run_id, reason="nobody serves its queue")
        _answer(lab, client, by_kind["asked/desk"], chance)
    lab.wait(asked, TIMEOUT_S, may_fail=True)
    return len(kinds)


def _answer(lab: Lab, client: Client, wanted: list[str], chance: random.Random) -> None:
    """Approve or reject what these runs ask, as soon as they do."""
    left = set(wanted)
    deadline_s = time.monotonic() + TIMEOUT_S
    while left:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{len(left)} runs asked nothing within {TIMEOUT_S:.0f} s")
        open_now = {str(row["run_id"]) for row in sql.query(lab.data_dir, QUESTIONS)} & left
        for run_id in sorted(open_now):
            answer = client.approve if chance.random() < 0.7 else client.reject
            answer(run_id, reason="looked at")
        left -= open_now
        time.sleep(POLL_S)


def panel_times_ms(data_dir: Path, note: Note, repeats: int = 3) -> Mapping[str, float]:
    """Return how long each panel's query took, the middle of some, by dashboard and title. Blocks. Raises OSError."""
    shown = Range(note.from_s, note.to_s, max(1, (note.to_s - note.from_s) // 100))
    run_id = str(sql.query(data_dir, "SELECT run_id FROM runs ORDER BY run_id LIMIT 1")[0]["run_id"])
    variables = {"database": "tidegate", "account": [ALL], "run_id": run_id}
    found = {}
    for board in BOARDS:
        for panel in board.all_panels:
            query, took_ms = substituted(query_of(panel), shown, variables), []
            for _ in range(repeats):
                began_s = time.monotonic()
                sql.query(data_dir, query)
                took_ms.append((time.monotonic() - began_s) * 1000)
            found[f"{board.slug}: {panel.title}"] = round(sorted(took_ms)[repeats // 2], 1)
    return found


if __name__ == "__main__":
    app()
