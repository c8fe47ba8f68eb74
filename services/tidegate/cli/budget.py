"""`tidegate budget list|show|topup`: what budgets allow, what is spent and set aside, and more room for one of them."""

from __future__ import annotations

import json
import time
import uuid
from typing import Annotated, Any, Final

import typer
from pydantic import ValidationError

from tidegate.audit.budgets import METERS
from tidegate.cli.audit import read_books
from tidegate.cli.documents import EXIT_WRONG, in_force, publish, value_of
from tidegate.cli.endings import EXIT_REFUSED, explained
from tidegate.cli.options import By, Json, Reason
from tidegate.cli.terminal import Console
from tidegate.cli.wording import plain_table
from tidegate.domain.identity import MAX_MICROS
from tidegate.eventlog.interface import Broker
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings
from tidegate.gate.budgets import Budget, TopUp
from tidegate.gate.kinds import DocumentError, parse
from tidegate.gate.names import SEPARATOR
from tidegate.gate.windows import said_moment, window_at
from tidegate.sdk.client import user_name

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="List and show budgets, and top them up. Budgets are documents: `tidegate policy apply`. Exit codes: 0 done; 2 wrong "
    "usage; 3 Kafka does not answer; 4 there is no such budget.",
)
Name = Annotated[str, typer.Argument(metavar="BUDGET", help="The budget's name.")]
PER_DOLLAR: Final = 1_000_000
MAX_DOLLARS: Final = MAX_MICROS / PER_DOLLAR  # without a bound infinity is a number here, too
MAX_LISTED: Final = 10


@app.command("list")
@explained("budget list")
def list_(as_json: Json = False) -> None:
    """List the budgets in force, with what each of their buckets holds now."""
    broker = KafkaBroker(KafkaSettings())
    _print(_buckets(broker, _budgets(broker)), as_json)


@app.command()
@explained("budget show")
def show(name: Name, as_json: Json = False) -> None:
    """Show what every bucket of a budget allows, has spent and has set aside."""
    broker = KafkaBroker(KafkaSettings())
    _print(_buckets(broker, {name: _budget(broker, name)}), as_json)


@app.command()
@explained("budget topup")
def topup(
    name: Name,
    account: Annotated[str, typer.Option("--account", help="The account that is counted, as `budget show` names it.")],
    dollars: Annotated[float | None, typer.Option("--dollars", min=0.0, max=MAX_DOLLARS, help="More money.")] = None,
    input_tokens: Annotated[int | None, typer.Option("--input-tokens", min=0)] = None,
    output_tokens: Annotated[int | None, typer.Option("--output-tokens", min=0)] = None,
    calls: Annotated[int | None, typer.Option("--calls", min=0)] = None,
    wall_seconds: Annotated[int | None, typer.Option("--wall-seconds", min=0)] = None,
    run: Annotated[str, typer.Option("--run", help="The run, if the budget is counted per run.")] = "",
    reason: Reason = "",
    by: By = None,
) -> None:
    """Give one bucket more room, in its present window. What is paused for it goes on."""
    broker = KafkaBroker(KafkaSettings())
    budget = _budget(broker, name)
    if (budget.window == "run") != bool(run):
        problem = "is counted per run: say which with --run" if budget.window == "run" else "is not counted per run"
        typer.echo(f"tidegate budget topup: budget {name} {problem}", err=True)
        raise typer.Exit(EXIT_WRONG)
    now_ms = time.time_ns() // 1_000_000
    add = {
        "money_micros": None if dollars is None else round(dollars * PER_DOLLAR),
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "calls": calls,
        "wall_seconds": wall_seconds,
    }
    given = {meter: more for meter, more in add.items() if more}
    if not given:
        typer.echo("tidegate budget topup: say how much: --dollars, --calls, …", err=True)
        raise typer.Exit(EXIT_WRONG)
    try:
        top_up = TopUp.checked(
            {
                "kind": "topup",
                "topup": f"t{uuid.uuid4().hex}",
                "budget": name,
                "account": account,
                "run": run,
                "at_ms": now_ms,
                "add": given,
                "by": by or user_name(),
                "reason": reason,
            }
        )
    except ValidationError as error:
        typer.echo(f"tidegate budget topup: {error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}", err=True)
        raise typer.Exit(EXIT_WRONG) from None
    counted = {row["account"] for row in _buckets(broker, {name: budget}) if row["meters"]}
    publish(broker, [top_up], _over(broker, budget, now_ms), by)
    more = ", ".join(f"{number:,} {meter}" for meter, number in given.items())
    typer.echo(f"topped up {name} of {account} by {more} (gates take it up within a second)")
    if account not in counted:
        typer.echo(f"it has counted nothing of {account} yet: is that the name? {_listed(counted)}", err=True)


def _listed(accounts: set[str]) -> str:
    first = sorted(accounts)[:MAX_LISTED]
    return f"It counts {', '.join(first) or 'none'}{', …' if len(accounts) > len(first) else ''}"


def _over(broker: Broker, budget: Budget, now_ms: int) -> list[str]:
    """Return the keys of the budget's top-ups whose window is over: they say nothing any more."""
    window = window_at(budget.window, budget.time_zone, now_ms)
    return [
        key
        for key, row in in_force(broker).items()
        if isinstance(top_up := _parsed(value_of(row)), TopUp)
        and top_up.budget == budget.budget
        and window.until_ms
        and top_up.at_ms < window.from_ms
    ]


def _parsed(value: Any) -> Any:
    try:
        return parse(value)
    except DocumentError:
        return None  # of a later version; gates say so


def _budgets(broker: Broker) -> dict[str, Budget]:
    documents = (_parsed(value_of(row)) for _, row in sorted(in_force(broker).items()))
    return {document.budget: document for document in documents if isinstance(document, Budget)}


def _budget(broker: Broker, name: str) -> Budget:
    budgets = _budgets(broker)
    if name not in budgets:
        typer.echo(f"there is no budget {name!r}; there are: {', '.join(budgets) or 'none'}", err=True)
        raise typer.Exit(EXIT_REFUSED)
    return budgets[name]


def _buckets(broker: Broker, budgets: dict[str, Budget]) -> list[dict[str, Any]]:
    """Return what every bucket of the budgets holds, from the ledger's bytes; a budget without any is there all the same."""
    books = read_books(broker).budgets
    found: list[dict[str, Any]] = []
    for name, budget in budgets.items():
        rows = [
            {
                "budget": name,
                "version": budget.version,
                "account": bucket.account,
                "window": key.rpartition(SEPARATOR)[2],
                "on_exceed": budget.on_exceed,
                "meters": {
                    meter: {
                        "limit": bucket.limits[meter],
                        "spent": bucket.spent[meter],
                        "reserved": bucket.reserved(meter),
                    }
                    for meter in METERS
                },
            }
            for key, bucket in sorted(books.buckets.items())
            if key.startswith(name + SEPARATOR)
        ]
        nothing = {"budget": name, "version": budget.version, "account": budget.account, "window": budget.window}
        found += rows or [{**nothing, "on_exceed": budget.on_exceed, "meters": {}}]
    return found


def _window(window: str) -> str:
    """Return the window of a bucket for people: since when, where the ledger names it by its first millisecond."""
    return f"since {said_moment(int(window))}" if window.isdecimal() else window


def _print(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = plain_table("budget", "account", "window", "without room", "spent + set aside of limit")
    for row in rows:
        numbers = [
            f"{meter}: {m['spent']:,} + {m['reserved']:,} of {'-' if m['limit'] is None else format(m['limit'], ',')}"
            for meter, m in row["meters"].items()
            if m["limit"] is not None or m["spent"] or m["reserved"]
        ]
        name = f"{row['budget']}@{row['version']}"
        table.add_row(
            name, row["account"], _window(row["window"]), row["on_exceed"], "\n".join(numbers) or "nothing counted yet"
        )
    Console(highlight=False).print(table)
