"""Figures for machines (a JSON line each) and for people (a table with what was aimed at)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from rich.console import Console
from rich.table import Table

Figure = dict[str, Any]


class Target(NamedTuple):
    """What a work aims at, in words, and whether a figure reaches it."""

    text: str
    is_met: Callable[[Figure], bool]


TARGETS: Final[dict[str, Target]] = {
    "W1": Target("≥ 3,500 steps/s", lambda figure: figure["steps_per_s"] >= 3_500),
    "W2": Target("p50 ≤ 12 ms", lambda figure: figure["p50_ms"] <= 12),
    # Repeats of the same hundred steps differ by more than a tenth.
    "W3": Target(
        "≤ 4 s, last 100 steps as fast (±10 %)",
        lambda figure: figure["seconds"] <= 4 and figure["last_hundred_ms"] <= 1.1 * figure["first_hundred_ms"],
    ),
    "W4": Target("≤ 1.5 s", lambda figure: figure["recovery_s"] <= 1.5),
    "W5": Target("≤ 5 s", lambda figure: figure["ready_s"] <= 5),
    "W6": Target("≥ 60,000 events/s", lambda figure: figure["events_per_s"] >= 60_000),
    "W8": Target("≥ 8,000 decisions/s", lambda figure: figure["decisions_per_s"] >= 8_000),
    "W7": Target(
        "≤ 1 KiB of memory a run, ready in ≤ 15 s, none early, p99 ≤ 1 s late",
        lambda figure: (
            figure["scheduler_asleep_mib"] - figure["scheduler_before_mib"] <= max(100, figure["runs"] / 1024)
            and figure["ready_s"] <= 15
            and figure["early"] == 0
            and figure["late_p99_ms"] <= 1_000
        ),
    ),
    "HO": Target("≤ 10 s, the session, when nobody comes back", lambda figure: figure["pause_max_s"] <= 12),
    "SC": Target("≤ 0.8 ms of processor time a step", lambda figure: figure["cpu_ms_per_step"] <= 0.8),
    "GM": Target("flat in the second half (± 5 MiB)", lambda figure: abs(figure["growth_mib"]) <= 5),
    "MEM": Target(
        "flat in the second half (± 10 MiB)",
        lambda figure: all(
            abs(figure["growth_mib"].get(name, 0.0)) <= 10 for name in ("scheduler", "gate", "executor")
        ),
    ),
}
_SUMMARIES: Final[dict[str, str]] = {
    "W1": "{steps_per_s:,} steps/s, run p50 {p50_ms:,.0f} ms, p99 {p99_ms:,.0f} ms; projection {projection_lag_records:,} "
    "records behind at the end, caught up {projection_caught_up_s} s later",
    "W2": "p50 {p50_ms} ms, p99 {p99_ms} ms",
    "W3": "{seconds} s; first hundred {first_hundred_ms} ms, last {last_hundred_ms} ms",
    "W4": "kill -9 {killed}: {recovery_s} s at worst, {recovery_median_s} s in the middle ({undisturbed_s} s undisturbed)",
    "W5": "kill -9 {killed}: ready after {ready_s} s at worst, {ready_median_s} s in the middle",
    "W6": "{events_per_s:,} events/s: {events:,} events in {seconds} s",
    "W8": "{decisions_per_s:,} decisions/s of one gate alone ({us_per_decision} us; {plain_us_per_decision} us with no document)",
    "W7": "scheduler {scheduler_before_mib:.0f} MiB before, {scheduler_asleep_mib:.0f} asleep, "
    "{scheduler_restored_mib:.0f} restored; "
    "ready {ready_s} s after kill -9; late p50 {late_p50_ms} ms, p99 {late_p99_ms} ms, most {late_max_ms} ms",
    "HO": "{action}: pause per partition {pause_median_s} s in the middle, {pause_max_s} s at most, of {partitions} that moved",
    "GM": "{growth_mib} MiB gained in the second half; {units_left} units left",
    "MEM": "MiB gained in the second half: {growth_mib}",
    "SC": "{steps_per_s:,} steps/s, {cpu_ms_per_step} ms of processor time a step, {cores_used} cores in use",
}
_SIZES: Final[dict[str, str]] = {
    "W1": "{runs:,} runs",
    "W2": "{runs} runs",
    "W3": "{steps:,} steps",
    "W4": "{runs} runs, {repeats} times",
    "W5": "{live_runs:,} live runs",
    "W6": "",
    "W7": "{runs:,} runs",
    "W8": "{rules} rules, {budgets} budgets, {limits} limits",
    "HO": "{runs:,} runs",
    "GM": "{settled:,} settled reservations",
    "MEM": "{runs:,} runs",
    "SC": "{runs:,} runs, {replicas} of each owner",
}


def json_line(figure: Figure) -> str:
    """Return a figure as one line of JSON, with whether its target was met."""
    target = TARGETS[figure["work"]]
    return json.dumps({**figure, "target": target.text, "met": target.is_met(figure)}, ensure_ascii=False)


def append(path: Path, figure: Figure) -> None:
    """Add a figure's line to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json_line(figure) + "\n")


def print_table(console: Console, figures: Sequence[Figure]) -> None:
    """Print one row per figure, and what each process cost."""
    table = Table(show_edge=False, header_style="bold")
    for heading in ("work", "size", "measured", "target", "", "load before"):
        table.add_column(heading, justify="right" if heading == "load before" else "left")
    costs = Table(show_edge=False, header_style="bold", title="processor seconds / peak MiB", title_justify="left")
    names = sorted({name for figure in figures for name in figure["processes"]})
    for heading in ("work", *names):
        costs.add_column(heading, justify="left" if heading == "work" else "right")
    for figure in figures:
        work = figure["work"]
        target = TARGETS[work]
        verdict = "[green]met[/green]" if target.is_met(figure) else "[red]missed[/red]"
        size, measured = (text[work].format(**figure) for text in (_SIZES, _SUMMARIES))
        table.add_row(work, size, measured, target.text, verdict, f"{figure['load_before']}")
        cells = [figure["processes"].get(name) for name in names]
        costs.add_row(f"{work} {size}", *(f"{c['cpu_s']} / {c['peak_rss_mib']:.0f}" if c else "" for c in cells))
    console.print(table)
    console.print()
    console.print(costs)
    for figure in figures:
        if "panels_ms" in figure:
            console.print()
            console.print(_panels(figure))


def _panels(figure: Figure) -> Table:
    """Return how long the queries of the dashboards' panels took, the slowest first."""
    table = Table(show_edge=False, header_style="bold", title="panels, ms", title_justify="left")
    table.add_column("dashboard: panel")
    table.add_column("ms", justify="right")
    for name, took_ms in sorted(figure["panels_ms"].items(), key=lambda one: -one[1]):
        table.add_row(name, f"{took_ms:,.0f}")
    return table
