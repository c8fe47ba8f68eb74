"""`tidegate demo`: the refund demo, storms over many runs, many runs under one limit, and a tree of budgets."""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer
from typer.core import TyperGroup

from tidegate.cli.keys import Keys
from tidegate.cli.storm_screen import StormScreen
from tidegate.cli.throttling_screen import ThrottlingScreen
from tidegate.demo.budget.demo import BudgetDemo
from tidegate.demo.budget.demo import make_stack as make_budget_stack
from tidegate.demo.by_hand import KEYS_SAID
from tidegate.demo.chaos.demo import SIZES, ChaosDemo, Size
from tidegate.demo.chaos.demo import make_stack as make_chaos_stack
from tidegate.demo.refund import ACCOUNT, DemoError, RefundDemo, Say, make_stack, wait_for_projection
from tidegate.demo.throttling.demo import ThrottlingDemo
from tidegate.demo.throttling.demo import make_stack as make_throttling_stack
from tidegate.embedded import sql
from tidegate.embedded.errors import EmbeddedKafkaError
from tidegate.embedded.stack import StackError
from tidegate.eventlog.interface import EventLogError, Record
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings
from tidegate.sdk.client import Client

REFUND: Final = "refund"
FAILURES: Final = (DemoError, StackError, EmbeddedKafkaError, EventLogError)


class DemoGroup(TyperGroup):
    """Takes `tidegate demo` without a command for the refund demo."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the refund demo's name before options that are not ours."""
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = [REFUND, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=DemoGroup,
    add_completion=False,
    help="Demonstrations that prove what they show. Without a command: the refund demo. Exit code 1 if anything does not hold.",
)
AsJson = Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")]
Keep = Annotated[bool, typer.Option(help="Keep the demo's data folder and say where it is.")]
Seed = Annotated[
    int | None, typer.Option(help="Repeats the same blows at the same times; without it a new one is drawn.")
]
Seconds = Annotated[float | None, typer.Option(min=15.0, help="How long the storm lasts, instead of the usual time.")]
Blows = Annotated[int | None, typer.Option(min=0, help="How often it strikes; everybody is struck at any rate.")]


@app.command()
def refund(as_json: AsJson = False, keep: Keep = False) -> None:
    """Show a refund survive kill -9: dispatched twice, paid once. Exit code 1 if any part of the proof fails.

    Starts Kafka, ClickHouse and all services in a temporary folder, kills the executor in the middle of the refund, and
    proves with queries what came of it. Needs no Docker and nothing that is installed by hand; the first start fetches Kafka.
    """
    data_dir = Path(tempfile.mkdtemp(prefix="tidegate-demo-"))

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n") if as_json else typer.echo(line)

    stack = make_stack(data_dir, say)
    try:
        with stack:
            proof = RefundDemo(stack, say).run()
            _show_plain_producer(stack.settings, data_dir, say)
    except FAILURES as error:
        _fail(error, data_dir, {"ok": False, "error": str(error)}, as_json=as_json)
    say("\nAll of it holds." if proof["ok"] else "\nThe proof FAILED.")
    _end(proof, data_dir, say, as_json=as_json, keep=keep)


@app.command("chaos-100")
def chaos_100(
    seed: Seed = None, seconds: Seconds = None, blows: Blows = None, as_json: AsJson = False, keep: Keep = False
) -> None:
    """Run 100 runs while every process and the broker are killed, frozen and restarted; show that nothing came of it.

    Starts two of everything that shares its work in a temporary folder. Runs retry, wait, ask humans and move money, while
    a storm of kill -9, SIGSTOP and SIGTERM goes over all services and over Kafka. When all is quiet again: no run is lost,
    no effect doubled, all chains verify, the money is recomputed from the ledger, ClickHouse and the live view agree.
    """
    _chaos("chaos-100", seed, seconds, blows, as_json=as_json, keep=keep)


@app.command("chaos-500")
def chaos_500(
    seed: Seed = None, seconds: Seconds = None, blows: Blows = None, as_json: AsJson = False, keep: Keep = False
) -> None:
    """The same with 500 runs, for longer."""
    _chaos("chaos-500", seed, seconds, blows, as_json=as_json, keep=keep)


@app.command("throttling-100")
def throttling_100(
    runs: Annotated[int, typer.Option(min=20, max=10_000, help="How many runs.")] = 100,
    as_json: AsJson = False,
    keep: Keep = False,
) -> None:
    """Run 100 runs of four accounts against one provider limit of 5; show that it holds and is shared fairly.

    Starts Kafka, a scheduler, two gates and two executors in a temporary folder. The account with the most runs asks first.
    When all is over: the ledger's bytes and the step's own clock say how many calls were ever under way at once. In a
    terminal, p pauses the queue, r resumes it, and c cancels what is left.
    """
    data_dir = Path(tempfile.mkdtemp(prefix="tidegate-throttling-"))
    with Keys() as keys, ThrottlingScreen(to_stderr=as_json) as screen:
        if keys.are_there:
            screen.say(KEYS_SAID)
        try:
            with make_throttling_stack(data_dir, screen.say) as stack:
                summary = ThrottlingDemo(stack, runs, screen.show, keys.pressed).run()
        except FAILURES as error:
            screen.close()
            _fail(error, data_dir, {"ok": False, "error": str(error)}, as_json=as_json)
        screen.summarise(summary)
    _end(summary, data_dir, screen.say, as_json=as_json, keep=keep)


@app.command()
def budget(as_json: AsJson = False, keep: Keep = False) -> None:
    """Run three teams out of their budgets: one is denied, one asks a human, one waits until somebody tops up.

    Starts Kafka, a scheduler, a gate and an executor in a temporary folder. Every team's money is counted for the whole account,
    too. When all is over, the money is recomputed from the ledger's bytes: no limit was exceeded but by the one approval. In
    a terminal, p pauses the queue, r resumes it, and c cancels what is left.
    """
    data_dir = Path(tempfile.mkdtemp(prefix="tidegate-budget-"))

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n") if as_json else typer.echo(line)

    with Keys() as keys:
        if keys.are_there:
            say(KEYS_SAID)
        try:
            with make_budget_stack(data_dir, say) as stack:
                proof = BudgetDemo(stack, say, keys.pressed).run()
        except FAILURES as error:
            _fail(error, data_dir, {"ok": False, "error": str(error)}, as_json=as_json)
    say("\nAll of it holds." if proof["ok"] else "\nThe proof FAILED.")
    _end(proof, data_dir, say, as_json=as_json, keep=keep)


def _chaos(name: str, seed: int | None, seconds: float | None, blows: int | None, *, as_json: bool, keep: bool) -> None:
    usual = SIZES[name]
    size = Size(usual.runs, usual.seconds if seconds is None else seconds, usual.blows if blows is None else blows)
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    again = f"tidegate demo {name} --seed {seed} --seconds {size.seconds:g} --blows {size.blows}"
    data_dir = Path(tempfile.mkdtemp(prefix=f"tidegate-{name}-"))
    with StormScreen(size.runs, to_stderr=as_json) as screen:
        screen.say(f"{size.runs} runs, {size.seconds:g} s of storm, seed {seed}")
        try:
            with make_chaos_stack(data_dir, screen.say) as stack:
                summary = ChaosDemo(stack, size, seed, screen.screen).run()
        except FAILURES as error:
            screen.close()
            typer.echo(f"the same storm again: {again}", err=True)
            _fail(error, data_dir, {"ok": False, "seed": seed, "error": str(error)}, as_json=as_json)
        screen.summarise(summary)
        if not summary["ok"]:
            screen.say(f"the same storm again: {again}")
    _end(summary, data_dir, screen.say, as_json=as_json, keep=keep)


def _fail(error: Exception, data_dir: Path, answer: dict[str, Any], *, as_json: bool) -> NoReturn:
    typer.echo(f"demo failed: {error}", err=True)
    if (data_dir / "logs").is_dir():  # not if Kafka could not even be fetched
        typer.echo(f"the logs are in {data_dir}/logs", err=True)
    if as_json:
        typer.echo(json.dumps(answer))
    raise typer.Exit(1) from None


def _end(answer: dict[str, Any], data_dir: Path, say: Say, *, as_json: bool, keep: bool) -> NoReturn:
    """Say where the data is if it is kept, print the answer, and exit with what it means."""
    if keep or not answer["ok"]:
        say(f"data and logs: {data_dir} (look at them with `tidegate dev --data-dir {data_dir}`)")
    else:
        shutil.rmtree(data_dir, ignore_errors=True)
    if as_json:
        typer.echo(json.dumps(answer))
    raise typer.Exit(0 if answer["ok"] else 1)


def _show_plain_producer(settings: KafkaSettings, data_dir: Path, say: Say) -> None:
    """Start the same run by what any Kafka producer can send, one JSON object, and look at it with SQL."""
    run_id = "by-a-plain-producer"
    request = json.dumps({"agent": "support", "run_id": run_id, "input": {"order_id": "order-7"}, "account": ACCOUNT})
    writer = KafkaBroker(settings).writer()
    writer.send(Record("run-requests", 0, b"any", request.encode()))
    writer.flush(10)
    with Client(settings) as client:
        run = client.wait(run_id, 60)
    say("\nThe same by a plain producer:")
    say(f"  echo '{request}' | kcat -P -b {settings.bootstrap} -t run-requests -k any")
    say(f"  -> {run.status}: {run.output}")
    query = f"SELECT step_id, status, attempts, spent_micros FROM steps WHERE run_id = '{run_id}' ORDER BY ready_at, step_id"
    say(f'  tidegate sql "{query}"')
    wait_for_projection(data_dir, settings, run_id)
    for row in sql.query(data_dir, query):
        say(f"     {row['step_id']:<36} {row['status']:<10} {row['attempts']} attempt {row['spent_micros']:>6} micros")
