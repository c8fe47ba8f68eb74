"""A folder full of the logs of a day of real runs, made once and looked at often: `python -m tidegate.bench.dataset FOLDER`.

It only sends requests, answers questions and restarts processes, as users and operators do, and lets the services run: what is
in the logs was written by the scheduler and the gate. What is kept is Kafka's data and a note of how much there is.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import typer

from tidegate.bench import day_app
from tidegate.bench.day import TOPUP_AT, Day, Request
from tidegate.bench.lab import Lab, Say, say_on_stderr
from tidegate.bench.watcher import RunFailedError
from tidegate.cli.documents import publish
from tidegate.domain import canonical
from tidegate.embedded import sql
from tidegate.embedded.errors import EmbeddedKafkaError
from tidegate.embedded.stack import ExecutorPool, StackError
from tidegate.eventlog.interface import EventLogError
from tidegate.gate.kinds import parse, read
from tidegate.projection.dashboards.boards import BOARDS
from tidegate.projection.dashboards.macros import ALL, Range, substituted
from tidegate.projection.dashboards.panels import query_of

NOTE: Final = "dataset.json"
MAKING: Final = "making.json"
KEPT: Final = frozenset({"kafka", NOTE})
DEFAULT_RUNS: Final = 45_000  # a million events of both logs, about
SEED: Final = 5
APP: Final = "tidegate.bench.day_app:app"
POOLS: Final = (
    ExecutorPool(APP, slots=64, count=2),
    ExecutorPool(APP, queue=day_app.MODELS_QUEUE, slots=48, count=2),
)
# So many runs that end by themselves may be under way: the next one is asked for when one of them ends. So the services are never
# asked for more than the machine can do, however busy it is.
WINDOW: Final = 400
TURN_S: Final = 0.02
ANSWER_EVERY_S: Final = 5.0
TELL_EVERY_S: Final = 10.0
STUCK_S: Final = 600.0
EVENT_COUNT: Final = "SELECT (SELECT count() FROM events) + (SELECT count() FROM ledger) AS n"
QUESTIONS: Final = "SELECT run_id, step_id, waits_for FROM waits WHERE waits_for IN ('approval', 'answer')"
STEADY_RUN: Final = "SELECT run_id FROM runs WHERE workflow = 'order' AND status = 'succeeded' ORDER BY run_id LIMIT 1"

app = typer.Typer(add_completion=False)


class Note(NamedTuple):
    """What a dataset holds: events of both logs, runs that were asked for, and when it began and ended, Unix seconds."""

    events: int
    runs: int
    from_s: int
    to_s: int


def read_note(folder: Path) -> Note:
    """Return what a dataset holds. Raises OSError or ValueError if the folder holds none."""
    return Note(**json.loads((folder / NOTE).read_text(encoding="utf-8")))


class Making(NamedTuple):
    """How far a dataset is that is being made. over: every run below this number that ends by itself has ended."""

    runs: int
    seed: int
    from_s: int
    over: int = 0

    @staticmethod
    def read(folder: Path) -> Making | None:
        """Return how far a folder is; None if nothing was begun there. Raises ValueError if that cannot be read."""
        try:
            return Making(**json.loads((folder / MAKING).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def write(self, folder: Path) -> None:
        """Write it down, all or nothing."""
        new = folder / f"{MAKING}.new"
        new.write_text(json.dumps(self._asdict()), encoding="utf-8")
        new.replace(folder / MAKING)


@app.command()
def main(
    folder: Annotated[
        Path, typer.Argument(help="Where to: a new or empty folder, or one whose making was cut short: that goes on.")
    ],
    runs: Annotated[
        int, typer.Option(min=100, help="How many runs; a run has about 23 events in both logs together.")
    ] = DEFAULT_RUNS,
) -> None:
    """Make a dataset for `tidegate bench --works W6 --dataset FOLDER`. Ctrl-C and `kill` lose nothing: the same command goes on."""
    folder = folder.absolute()
    try:
        making = Making.read(folder)
    except (ValueError, TypeError) as error:
        typer.echo(f"{folder / MAKING} cannot be read ({error}): remove the folder and begin anew", err=True)
        raise typer.Exit(2) from None
    if making is None and folder.exists() and any(folder.iterdir()):
        typer.echo(f"{folder} is not empty: name another folder, or remove it", err=True)
        raise typer.Exit(2)
    if making is not None and making.runs != runs:
        typer.echo(f"{folder} was begun with --runs {making.runs}: go on with that, or remove it", err=True)
        raise typer.Exit(2)
    try:
        note = make(folder, making or Making(runs, SEED, int(time.time())))
    except KeyboardInterrupt:
        typer.echo("cut short: the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    except (StackError, EmbeddedKafkaError, EventLogError, RunFailedError, TimeoutError) as error:
        typer.echo(f"no dataset was made: {error}\nthe same command goes on from here", err=True)
        raise typer.Exit(1) from None
    typer.echo(json.dumps(note._asdict()))


def make(folder: Path, making: Making) -> Note:
    """Play the day, from where it was cut short; keep Kafka's data. Blocks. Raises StackError, TimeoutError."""
    if making.over:
        say_on_stderr(f"dataset: going on at run {making.over:,} of {making.runs:,}")
    folder.mkdir(parents=True, exist_ok=True)
    making.write(folder)
    with Lab(folder, say=say_on_stderr, published=day_app.app, pools=POOLS) as lab:
        publish(lab.broker, read(Day(making.seed, making.runs).documents()))
        _Player(lab, making, say_on_stderr).play()
        # Timers and answers move runs for as long as somebody listens: what is counted must be all there will be.
        lab.stop_services()
        lab.start_projection(lab.data_dir)
        sql.wait_caught_up(lab.data_dir, sql.log_ends(lab.broker), STUCK_S)
        events = _event_count(lab)
    for path in folder.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    note = Note(events, making.runs, making.from_s, int(time.time()) + 1)
    (folder / NOTE).write_text(json.dumps(note._asdict(), indent=2) + "\n", encoding="utf-8")
    return note


def _event_count(lab: Lab) -> int:
    return int(sql.query(lab.data_dir, EVENT_COUNT)[0]["n"])


class _Player:
    """Customers, people who answer, and an operator: all that comes from outside on that day."""

    def __init__(self, lab: Lab, making: Making, say: Say) -> None:
        self._lab = lab
        self._say = say
        self._making = making
        self._day = Day(making.seed, making.runs)
        self._next = making.over
        self._under_way: dict[str, int] = {}  # run id -> number
        self._ended: set[str] = set()  # before we asked (again), or that need not end
        self._later: dict[int, list[tuple[str, Request]]] = {}
        self._answered: set[tuple[str, str]] = set()
        self._incidents = deque(step for step in self._operator() if step[0] >= making.over)
        now_s = time.monotonic()
        self._began_s = self._moved_s = now_s
        self._answer_due_s = self._tell_due_s = now_s + ANSWER_EVERY_S

    def play(self) -> None:
        """Ask for all runs, and see those end that end by themselves. Blocks. Raises TimeoutError if nothing moves any more."""
        while self._next < self._making.runs or self._under_way or self._later:
            self._see_ends()
            self._ask()
            now_s = time.monotonic()
            if now_s >= self._answer_due_s:
                self._answer()
                self._answer_due_s = now_s + ANSWER_EVERY_S
            if now_s >= self._tell_due_s:
                self._tell()
                self._tell_due_s = now_s + TELL_EVERY_S
            if now_s - self._moved_s > STUCK_S:
                names = ", ".join(list(self._under_way)[:5])
                raise TimeoutError(f"no run has ended for {STUCK_S:.0f} s; under way: {names}")
            time.sleep(TURN_S)
        self._answer()
        self._lab.flush()
        self._tell()

    def _see_ends(self) -> None:
        for run_id in self._lab.take_ended():
            self._moved_s = time.monotonic()
            if self._under_way.pop(run_id, None) is None:
                self._ended.add(run_id)

    def _ask(self) -> None:
        """Ask for as many runs as there is room, and for what is due of earlier ones."""
        while self._next < self._making.runs and len(self._under_way) < WINDOW:
            number = self._next
            wish = self._day.wish(number)
            self._lab.send(wish.run_id, wish.raw or canonical.dumps(wish.request).encode())
            if wish.ends and wish.run_id not in self._ended:
                self._under_way[wish.run_id] = number
            for later in wish.later:
                due = min(number + later.after_runs, self._making.runs - 1)
                self._later.setdefault(due, []).append((wish.run_id, later.request))
            for run_id, request in self._later.pop(number, []):
                self._lab.send(run_id, canonical.dumps(request).encode())
            self._next += 1
            while self._incidents and self._incidents[0][0] <= number:
                self._incidents.popleft()[1]()

    def _answer(self) -> None:
        """Answer what is asked, as somebody does who looks at the list of open questions from time to time."""
        try:
            rows = sql.query(self._lab.data_dir, QUESTIONS)
        except OSError:  # the projection is about to be started again
            return
        for row in rows:
            run_id, step_id = str(row["run_id"]), str(row["step_id"])
            if (run_id, step_id) in self._answered:
                continue
            request = self._day.answer(run_id, step_id, row["waits_for"] == "approval")
            if request is not None:
                self._answered.add((run_id, step_id))
                self._lab.send(run_id, canonical.dumps(request).encode())

    def _tell(self) -> None:
        """Write down how far we are, and say it."""
        self._lab.flush()
        over = min(self._under_way.values(), default=self._next)
        self._making._replace(over=over).write(self._lab.data_dir)
        rate = (self._next - self._making.over) / (time.monotonic() - self._began_s)
        left_s = (self._making.runs - self._next) / max(rate, 0.1)
        self._say(
            f"dataset: {self._next:,} of {self._making.runs:,} runs asked for, {len(self._under_way):,} under way, "
            f"{rate:.0f} a second, {left_s / 60:.0f} min left"
        )

    # -- the operator ---------------------------------------------------------------

    def _operator(self) -> list[tuple[int, Callable[[], None]]]:
        """Return what is done to the system, each at its place of the day."""
        kill = self._lab.kill
        steps: tuple[tuple[float, Callable[[], None]], ...] = (
            (0.20, lambda: kill("executor-default-1")),
            (0.35, lambda: kill("executor-models-0")),
            (0.50, self._restart),
            (TOPUP_AT, self._top_up),
            (0.80, lambda: kill("scheduler-0")),
            (0.90, lambda: kill("executor-default-0")),
        )
        return [(round(at * self._making.runs), act) for at, act in steps]

    def _restart(self) -> None:
        for name in ("scheduler-0", "gate-0", "executor-default-0"):
            self._lab.terminate(name)

    def _top_up(self) -> None:
        publish(self._lab.broker, [parse(self._day.topup(time.time_ns() // 1_000_000))])


def panel_times_ms(data_dir: Path, note: Note, repeats: int = 3) -> Mapping[str, float]:
    """Return how long each panel's query took, the middle of some, by dashboard and title. Blocks. Raises OSError."""
    shown = Range(note.from_s, note.to_s, max(1, (note.to_s - note.from_s) // 100))
    run_id = str(sql.query(data_dir, STEADY_RUN)[0]["run_id"])
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
