"""`tidegate verify`: read the logs and say whether they are whole."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from tidegate.cli.terminal import Console, say
from tidegate.cli.wording import counted
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
    """Check contiguous seqs, hash chains, epochs, folds and fingerprints.

    Runs that are not over are counted, and are no fault: a log that lost its end looks like one whose runs go on.

    Exit codes: 0 nothing is wrong; 1 something is; 2 the logs cannot be read.
    """
    settings = KafkaSettings()
    broker = KafkaBroker(settings)
    report = Report()
    not_over = 0
    try:
        counts = {log: description.partition_count for log, description in broker.describe(LOGS).items()}
        wanted = [(log, partition) for log in LOGS for partition in range(counts.get(log, 0))]
        if run_id is not None:
            wanted = [("run-events", partition_of(run_id, counts["run-events"]))]
        with Console(stderr=True).status("reading the logs …") as status:
            for log, partition in wanted:
                status.update(f"reading {log}-{partition} …")
                start, end = broker.offsets(log, partition)
                runs = verify_partition(broker.read(log, partition, start, end), report, run_id)
                not_over += sum(not run.is_over for run in runs.values())
    except (EventLogError, KeyError) as error:
        typer.echo(f"cannot read the logs of Kafka at {settings.bootstrap}: {error}", err=True)
        raise typer.Exit(2) from None
    if run_id is not None and not report.subjects:
        report.note(f"there is no run {run_id}")
    if as_json_:
        typer.echo(json.dumps({**as_json(report), "runs_not_over": not_over}))
    else:
        typer.echo(_summary(report, not_over))
        for problem in report.problems:
            say(f"  {problem}", err=True)
    raise typer.Exit(0 if report.ok else 1)


def _summary(report: Report, not_over: int) -> str:
    seen = (
        counted(report.subjects, "subject"),
        counted(report.entries, "entry", "entries"),
        counted(report.events, "event"),
        counted(report.void_entries, "void entry", "void entries"),
    )
    found = "all whole" if report.ok else counted(report.problem_count, "problem")
    carried = (
        f"; {counted(report.carried, 'ledger')} from where balances were carried forward" if report.carried else ""
    )
    going_on = f"; {counted(not_over, 'run')} not over" if not_over else ""
    return f"{', '.join(seen)}: {found}{carried}{going_on}"
