"""`docs/memory.svg` from the output of `tidegate bench --works MEM --out FILE`: what each process held after every portion of runs.

python tests/benchmarks/plot_memory.py FILE docs/memory.svg
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 60, 150, 40, 50
STEP_MIB = 100
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by the colour-blind too


def main(source: Path, target: Path) -> int:
    """Draw the last MEM figure of a file; exit code 1 if there is none."""
    figures = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    memory = [figure for figure in figures if figure["work"] == "MEM"]
    if not memory:
        sys.stderr.write(f"{source} holds no figure of MEM: run `tidegate bench --works MEM --out {source}` first\n")
        return 1
    target.write_text("\n".join(drawing(memory[-1])) + "\n", encoding="utf-8")
    return 0


def drawing(figure: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the SVG."""
    series: dict[str, list[float]] = figure["resident_mib"]
    portion, runs = figure["portion"], figure["runs"]
    top_mib = STEP_MIB * (1 + int(max(max(values) for values in series.values()) // STEP_MIB))

    def x(done: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * done / runs

    def y(mib: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * mib / top_mib

    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">'
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    yield f'<text x="{LEFT}" y="22" font-size="14">Resident memory over {runs:,} finished runs of three steps, MiB</text>'
    for mib in range(0, top_mib + 1, STEP_MIB):
        yield f'<path d="M{LEFT} {y(mib):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
        yield f'<text x="{LEFT - 8}" y="{y(mib) + 4:.1f}" text-anchor="end">{mib}</text>'
    for quarter in range(5):
        done = runs * quarter // 4
        yield f'<text x="{x(done):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{done:,}</text>'
    yield f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">finished runs</text>'
    names = sorted(series, key=lambda name: -series[name][-1])
    labels = _apart([y(series[name][-1]) for name in names])
    for name, colour, label_y in zip(names, COLOURS, labels, strict=False):
        points = " ".join(
            f"{x(min(runs, portion * number)):.1f},{y(mib):.1f}" for number, mib in enumerate(series[name], 1)
        )
        yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        yield f'<text x="{WIDTH - RIGHT + 8}" y="{label_y + 4:.1f}" fill="{colour}">{name} {series[name][-1]:.0f}</text>'
    yield "</svg>"


def _apart(heights: Sequence[float], least: float = 15.0) -> list[float]:
    """Return the heights, which grow, moved down as far as labels need to be apart."""
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] + least) if found else height)
    return found


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
