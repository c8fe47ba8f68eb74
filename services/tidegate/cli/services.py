"""`tidegate scheduler|gate|projection|gateway|executor`: the services as subcommands of one image."""

from __future__ import annotations

import typer

scheduler = typer.Typer(add_completion=False, help="Run the scheduler service.")
gate = typer.Typer(add_completion=False, help="Run the gate service: policy, budget, placement.")
projection = typer.Typer(add_completion=False, help="Run the projection into ClickHouse.")
gateway = typer.Typer(add_completion=False, help="Run the live view of runs.")


@scheduler.callback(invoke_without_command=True)
def _scheduler() -> None:
    """Run the scheduler until SIGTERM. Settings are environment variables: TIDEGATE_KAFKA_*, TIDEGATE_SCHEDULER_*."""
    from tidegate.scheduler.__main__ import main

    raise typer.Exit(main())


@gate.callback(invoke_without_command=True)
def _gate() -> None:
    """Run the gate until SIGTERM. Settings are environment variables: TIDEGATE_KAFKA_*, TIDEGATE_GATE_*."""
    from tidegate.gate.__main__ import main

    raise typer.Exit(main())


@projection.callback(invoke_without_command=True)
def _projection() -> None:
    """Run the projection until SIGTERM. Settings: TIDEGATE_KAFKA_*, TIDEGATE_CLICKHOUSE_URL, TIDEGATE_PROJECTION_*."""
    from tidegate.projection.__main__ import main

    raise typer.Exit(main())


@gateway.callback(invoke_without_command=True)
def _gateway() -> None:
    """Run the live view until SIGTERM. Settings: TIDEGATE_KAFKA_*, TIDEGATE_GATEWAY_*."""
    from tidegate.gateway.__main__ import main

    raise typer.Exit(main())
