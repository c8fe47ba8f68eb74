"""`python -m tidegate.executor --app module:app`: wiring only."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

import structlog
import typer
from pydantic import ValidationError

from tidegate.cluster_api import ClusterApi, ClusterApiError, own_namespace
from tidegate.domain.isolation import JOB, SUBPROCESS
from tidegate.eventlog.interface import EventLogError
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings
from tidegate.executor.forks import ChildrenEndHere, children_do_not_run
from tidegate.executor.isolation import Apart, Isolation
from tidegate.executor.isolation.job_manifest import Owner
from tidegate.executor.isolation.jobs import Jobs
from tidegate.executor.isolation.process import Processes
from tidegate.executor.service import EXIT_LOG_FAILED, Executor
from tidegate.executor.settings import ExecutorSettings
from tidegate.health import Health, beat_forever
from tidegate.process import (
    EXIT_USAGE,
    ProcessSettings,
    configure_logging,
    observed,
    prepare,
    settings_problems,
)
from tidegate.sdk.app import App
from tidegate.sdk.errors import AppError
from tidegate.sdk.loading import load_app

SERVICE = "executor"
T = TypeVar("T")
_log = structlog.get_logger()

app = typer.Typer(add_completion=False)


@app.command()
def executor(  # `tidegate executor` and `python -m tidegate.executor`
    target: Annotated[
        str, typer.Option("--app", envvar="TIDEGATE_EXECUTOR_APP", help="The app: module:attribute or file.py.")
    ],
    queue: Annotated[str | None, typer.Option(help="The queue whose work to take.")] = None,
    slots: Annotated[int | None, typer.Option(help="How many attempts to run at the same time.")] = None,
    instance_id: Annotated[str | None, typer.Option(help="Name in the registry, the same after a restart.")] = None,
    bootstrap: Annotated[str | None, typer.Option(help="Addresses of Kafka brokers, host:port.")] = None,
) -> None:
    """Run an executor: it runs the app's functions when the gate says so. Options win over TIDEGATE_… variables."""
    try:
        process = ProcessSettings(**_given(instance_id=instance_id))
        settings = ExecutorSettings(**_given(queue=queue, slots=slots))
        kafka = KafkaSettings(**_given(bootstrap=bootstrap))
        loaded = load_app(target)
    except AppError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_USAGE) from None
    except ValidationError as error:
        for line in settings_problems(error):
            typer.echo(f"error: {line}", err=True)
        raise typer.Exit(EXIT_USAGE) from None
    name = process.instance_id or f"executor-{settings.queue}-{socket.gethostname()}"
    configure_logging(SERVICE, name, process.log_level)
    with observed(process, SERVICE, name) as health:
        code = run_to_its_end(_run(KafkaBroker(kafka), loaded, settings, name, target, process.broker_wait_s, health))
    raise typer.Exit(code)


def run_to_its_end(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on an event loop of its own, and return what it returns. Blocks. Raises what it raises.

    SystemExit and KeyboardInterrupt of any other task of the loop do not end it: an event loop passes them on to whoever runs it,
    so a function whose own task calls `sys.exit` would end the process and everything else that runs in it. Children that
    functions fork run nothing of the loop.
    """
    with asyncio.Runner() as runner, children_do_not_run(runner.get_loop()):
        loop = runner.get_loop()
        task = loop.create_task(main)
        while True:
            try:
                with ChildrenEndHere():
                    return loop.run_until_complete(task)
            except (SystemExit, KeyboardInterrupt) as error:
                if task.done() or (isinstance(error, KeyboardInterrupt) and _is_ctrl_c()):
                    raise
                _log.exception("a task that a function began wants to end the process, which goes on")


def _is_ctrl_c() -> bool:
    """Tell whether a KeyboardInterrupt is the user's: not any more once signals have handlers of their own."""
    return signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


async def _apart(loaded: App, settings: ExecutorSettings, name: str, target: str) -> Apart:
    """Return where functions can run besides in this process. Raises ClusterApiError, AppError."""
    ways: dict[str, Isolation] = {SUBPROCESS: Processes(settings.process_start_s)}
    if settings.job_namespace:
        ways[JOB] = jobs = Jobs(ClusterApi(), settings, Owner(own_namespace(), name))
        await jobs.clean_up()  # before anybody hears of us, and takes the work of our predecessor to be lost
    for function in loaded.functions.values():
        if function.settings.isolation not in ("", *ways):
            raise AppError(
                f"{function.label} declares isolation {function.settings.isolation!r}, which this executor does not have: "
                "set TIDEGATE_EXECUTOR_JOB_NAMESPACE and TIDEGATE_EXECUTOR_JOB_IMAGE (docs/isolation.md)"
            )
    return Apart(target, ways)


async def _run(
    broker: KafkaBroker,
    loaded: App,
    settings: ExecutorSettings,
    name: str,
    target: str,
    wait_s: float,
    health: Health,
) -> int:
    try:
        apart = await _apart(loaded, settings, name, target)
    except (ClusterApiError, AppError) as error:
        _log.error("cannot work", error=str(error))
        return EXIT_USAGE
    service = Executor(broker, loaded, settings, instance_id=name, apart=apart)
    health.ready_when(service.why_not_ready)
    beating = asyncio.create_task(beat_forever(service.measure))
    stop, loop = threading.Event(), asyncio.get_running_loop()

    def on_signal() -> None:
        stop.set()
        service.drain()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        await asyncio.to_thread(prepare, broker, SERVICE, wait_s, stop, settings.queue)
        # What is loaded stays: the collector need not look through it again and again. How often it looks is left as it is,
        # because what functions make may well be in cycles.
        gc.freeze()
        code = await service.run()
        beating.cancel()
    except EventLogError as error:
        _log.error("cannot work", error=str(error))
        return EXIT_LOG_FAILED
    if service.has_stuck_functions:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the interpreter would wait for them
    return code


def main() -> None:
    """Run the command line; exits the process."""
    app()


if __name__ == "__main__":
    main()
