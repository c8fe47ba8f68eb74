"""`tidegate bench`: what it can do on this machine."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tidegate.bench import report
from tidegate.bench.dataset import Note, read_note
from tidegate.bench.gate_alone import gate_memory, w8_decisions
from tidegate.bench.lab import DEFAULT_SLOTS, Lab, say_on_stderr
from tidegate.bench.profiled import summary
from tidegate.bench.watcher import RunFailedError
from tidegate.bench.works import STANDARD, WORKS, Sizes, run_works, w6_dataset
from tidegate.embedded.errors import EmbeddedKafkaError
from tidegate.embedded.stack import StackError
from tidegate.eventlog.interface import EventLogError

app = typer.Typer(add_completion=False)
STANDARD_WORKS = ",".join(STANDARD)
ALONE = {"W8": w8_decisions, "GM": gate_memory}  # in this process, before anything is started
ALL_WORKS = ",".join((*WORKS, *ALONE))


@app.command()
def bench(
    works: Annotated[str, typer.Option(help=f"Which works, comma-separated, of {ALL_WORKS}.")] = STANDARD_WORKS,
    runs: Annotated[int | None, typer.Option(min=1, help="Runs per work, instead of the standard sizes.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also append the JSON lines to this file.")] = None,
    slots: Annotated[int, typer.Option(min=1, max=1000, help="Attempts that run at the same time.")] = DEFAULT_SLOTS,
    profile: Annotated[
        Path | None, typer.Option(help="Run the services under cProfile and write the profiles to this folder.")
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            help="With W6 alone: rebuild from this folder, which `make dataset` made, and time every dashboard panel."
        ),
    ] = None,
) -> None:
    """Measure throughput, latency, recovery and rebuild, with everything on one machine and nothing switched off.

    JSON lines go to standard output, progress and the table to standard error. Exit code 1 if something could not be
    measured; a target that is missed is shown and changes nothing.
    """
    names = _works(works)
    note = None if dataset is None else _dataset(dataset, names)
    folder = Path(tempfile.mkdtemp(prefix="tidegate-bench-"))
    figures: list[report.Figure] = []
    try:
        for name in [name for name in names if name in ALONE]:
            names.remove(name)
            figures.append(ALONE[name](runs, say_on_stderr))
            typer.echo(report.json_line(figures[-1]))
            if out is not None:
                report.append(out, figures[-1])
        if not names:
            return
        home = folder if dataset is None else dataset.absolute()
        with Lab(home, slots=slots, say=say_on_stderr, profile_dir=profile, with_services=note is None) as lab:
            for figure in run_works(lab, names, Sizes.of(runs)) if note is None else w6_dataset(lab, note):
                figures.append(figure)
                typer.echo(report.json_line(figure))
                if out is not None:
                    report.append(out, figure)
    except (StackError, EmbeddedKafkaError, EventLogError, RunFailedError, TimeoutError) as error:
        typer.echo(f"bench failed: {error}\n{_last_lines(folder)}", err=True)
        raise typer.Exit(1) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if figures:
            report.print_table(Console(stderr=True), figures)
    if profile is not None:
        (profile / "summary.txt").write_text(summary(profile), encoding="utf-8")
        typer.echo(f"profiles and their summary: {profile}", err=True)


def _dataset(folder: Path, names: list[str]) -> Note:
    if names != ["W6"]:
        raise typer.BadParameter("a dataset is for `--works W6` alone", param_hint="--dataset")
    try:
        return read_note(folder)
    except (OSError, ValueError, TypeError) as error:
        raise typer.BadParameter(
            f"{folder} holds no dataset ({error}): `make dataset` makes one", param_hint="--dataset"
        ) from None


def _works(text: str) -> list[str]:
    names = [name.strip().upper() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in WORKS and name not in ALONE]
    if unknown or not names:
        raise typer.BadParameter(
            f"unknown: {', '.join(unknown) or text!r}; there are {ALL_WORKS}", param_hint="--works"
        )
    return names


def _last_lines(folder: Path) -> str:
    """Return the ends of the services' logs, which are about to be removed."""
    parts = []
    for path in sorted((folder / "logs").glob("*.log")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
        parts.append("\n".join([f"-- the end of {path.name}:", *lines]))
    return "\n".join(parts)
