"""`tidegate verify`: read the logs and say whether they are whole."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from tidegate.domain.identity import partition_of
from tidegate.eventlog.interface import EventLogError
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings
from tidegate.eventlog.verification import Report, as_json, verify_partition

app = typer.Typer(add_completion=False)
LOGS = ("run-events", "gate-ledger")


@app.command()
def verify(
    run_id: Annotated[str | None, typer.Argument(help="A run; without it, every run and the whole ledger.")] = None,
    as_json_: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Check contiguous seqs, hash chains, epochs, folds and fingerprints. Exit code 1 if anything is wrong."""
    broker = KafkaBroker(KafkaSettings())
    report = Report()
    try:
        counts = {log: description.partition_count for log, description in broker.describe(LOGS).items()}
        wanted = [(log, partition) for log in LOGS for partition in range(counts.get(log, 0))]
        if run_id is not None:
            wanted = [("run-events", partition_of(run_id, counts["run-events"]))]
        with Console(stderr=True).status("reading the logs …") as status:
            for log, partition in wanted:
                status.update(f"reading {log}-{partition} …")
                start, end = broker.offsets(log, partition)
                verify_partition(broker.read(log, partition, start, end), report, run_id)
    except (EventLogError, KeyError) as error:
        typer.echo(f"cannot read the logs: {error}", err=True)
        raise typer.Exit(2) from None
    if run_id is not None and not report.subjects:
        report.note(f"there is no run {run_id}")
    if as_json_:
        typer.echo(json.dumps(as_json(report)))
    else:
        typer.echo(
            f"{report.subjects} subjects, {report.entries} entries, {report.events} events, "
            f"{report.void_entries} void entries: {'all whole' if report.ok else f'{report.problem_count} problems'}"
        )
        for problem in report.problems:
            typer.echo(f"  {problem}", err=True)
    raise typer.Exit(0 if report.ok else 1)
