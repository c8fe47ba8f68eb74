"""The `tidegate` command. Each subcommand lives in a module of its own and is imported only when it is asked for."""

from __future__ import annotations

import codecs
import importlib
import importlib.metadata
import io
import json
import sys
from collections.abc import Callable
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

# name -> (module attribute, help line). The attribute is a typer app, or a service's `main` that returns the exit code.
COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "dev": ("tidegate.cli.dev:app", "Start Kafka, ClickHouse and all services here, for development."),
    "demo": (
        "tidegate.cli.demo:app",
        "Demos: a refund survives a kill; 500 runs a storm of them; 100 share one limit.",
    ),
    "bench": ("tidegate.cli.bench:app", "Measure throughput, latency, recovery and rebuild."),
    "runs": ("tidegate.cli.runs:app", "Start, list, show, watch, answer, pause, resume and cancel runs."),
    "pause": ("tidegate.cli.controls:pause_app", "Pause a queue, everything, or a run; list what is paused."),
    "resume": ("tidegate.cli.controls:resume_app", "Resume a queue, everything, or a run."),
    "sql": ("tidegate.cli.sql:app", "Query the ClickHouse projections."),
    "top": ("tidegate.cli.top:app", "Watch runs, money, questions and executors in the terminal."),
    "figures": ("tidegate.cli.figures:app", "Show what accounts and functions did in the last minutes."),
    "workflow": ("tidegate.cli.workflow:app", "Publish, list and show workflow definitions."),
    "approvals": ("tidegate.cli.approvals:app", "List, approve and reject what waits for a human."),
    "policy": (
        "tidegate.cli.policy:app",
        "Check, try out, apply and compare policies, budgets and limits of the gate.",
    ),
    "budget": ("tidegate.cli.budget:app", "List, show and top up budgets."),
    "ledger": ("tidegate.cli.ledger:app", "Retire old entries of the ledger, and show how far that has come."),
    "why": ("tidegate.cli.why:app", "Say why the gate allowed, denied, asked about or paused a step."),
    "instances": ("tidegate.cli.registry:instances_app", "List the processes that are registered, and their slots."),
    "functions": ("tidegate.cli.registry:functions_app", "List the functions that executors offer."),
    "dead-letters": ("tidegate.cli.dead_letters:app", "List and show what could not be used; send requests again."),
    "topics": ("tidegate.cli.topics:app", "Create and check the topics that are declared in schemas/topics."),
    "replay": ("tidegate.cli.replay:app", "Rebuild tables or states from the log, beside the running system."),
    "verify": ("tidegate.cli.verify:app", "Check hash chain, contiguity and fold of a run, or of everything."),
    "audit": ("tidegate.cli.audit:app", "Recompute the money from the ledger alone."),
    "scheduler": ("tidegate.scheduler.__main__:main", "Run the scheduler service."),
    "gate": ("tidegate.gate.__main__:main", "Run the gate service (policy, budget, placement)."),
    "executor": ("tidegate.executor.__main__:app", "Run an executor of an app's functions."),
    "projection": ("tidegate.projection.__main__:main", "Run the projection into ClickHouse."),
    "gateway": ("tidegate.gateway.__main__:main", "Run the live view of runs."),
    "smoke": ("tidegate.cli.smoke:app", "Show that an installation works: a run, from its request to its row."),
    "kafka": ("tidegate.cli.kafka:app", "Run an embedded Apache Kafka in the foreground."),
}


class LazyGroup(TyperGroup):
    """A group that imports a subcommand's module when it is looked up, not when the commands are listed."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the subcommands in the order in which a newcomer meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import and return a subcommand; None if there is no such one."""
        if cmd_name not in COMMANDS:
            return None
        module_name, _, attribute = COMMANDS[cmd_name][0].partition(":")
        found = getattr(importlib.import_module(module_name), attribute)
        command = typer.main.get_command(found if isinstance(found, typer.Typer) else _service(cmd_name, found))
        command.name = cmd_name
        return command

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the overview without importing any subcommand."""
        lines = [f"  {name:<12} {text}" for name, (_, text) in COMMANDS.items()]
        typer.echo(f"Usage: {ctx.command_path} COMMAND [ARGS]...\n\n{self.help}\n\nCommands:\n" + "\n".join(lines))
        typer.echo(
            "\n`tidegate COMMAND --help` tells more. Settings are environment variables that start with TIDEGATE_."
        )


def _service(name: str, main_function: Callable[[], int]) -> typer.Typer:
    """Wrap a service's `main` as a command without options: services are configured by environment variables."""
    text = f"{COMMANDS[name][1]}\n\nConfigured by environment variables that start with TIDEGATE_. Runs until SIGTERM or Ctrl-C."
    wrapped = typer.Typer(add_completion=False)

    @wrapped.command(help=text)
    def run() -> None:
        raise typer.Exit(main_function())

    return wrapped


app = typer.Typer(
    cls=LazyGroup, add_completion=False, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]}
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tidegate {importlib.metadata.version('tidegate')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Run AI agents on Kafka: deterministic, governed, resumable and replayable."""


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Return what an encoding lacks as JSON writes it, so that people can read it and JSON stays JSON."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _bear_any_text() -> None:
    """Have standard output and error take every text, whatever their encoding: not all terminals speak UTF-8."""
    codecs.register_error("tidegate", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="tidegate")


def main() -> None:
    """Run the command line; exits the process. A TIDEGATE_ variable that makes no sense is a line, not a traceback."""
    _bear_any_text()
    try:
        app(prog_name="tidegate")
    except ValueError as error:
        # Only now: what tells it takes as long to import as a whole command.
        from pydantic import ValidationError  # noqa: PLC0415

        from tidegate.process import EXIT_USAGE, settings_problems  # noqa: PLC0415

        if not isinstance(error, ValidationError):
            raise
        for line in settings_problems(error):
            typer.echo(f"error: {line}", err=True)
        sys.exit(EXIT_USAGE)


if __name__ == "__main__":
    main()
