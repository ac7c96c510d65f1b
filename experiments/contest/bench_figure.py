"""The figure of a benchmark, drawn only from its table."""

from collections.abc import Sequence
from pathlib import Path

from experiments.contest.bench_rows import read
from experiments.contest.contest import REFERENCE, Row
from experiments.run.drawing import Figure
from experiments.studies.curves import styles


def contests(rows: Sequence[Row]) -> list[tuple[int, int, int, str]]:
    """Lists shapes and passes, in the order of the table."""
    return list(dict.fromkeys((row.time, row.batch, row.state, row.which) for row in rows))


def draw(table: Path, *, title: str) -> Figure:
    """Draws the speed-up of each implementation over `lax.scan`, at each shape and pass.

    Args:
      table: `results.csv`.
      title: of the figure.

    Returns:
      The figure; rows that failed or were wrong have no point.
    """
    rows = read(table)
    places = contests(rows)
    names = [n for n in dict.fromkeys(row.name for row in rows) if n != REFERENCE]
    figure = Figure(figsize=(max(6.0, 2.5 + 0.55 * len(places)), 5), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(1.0, color="black", lw=1)
    for number, (name, (colour, _)) in enumerate(zip(names, styles(names), strict=True)):
        mine = [row for row in rows if row.name == name and row.speed_up is not None]
        shift = 0.6 * ((number + 0.5) / len(names) - 0.5)
        axes.plot(
            [places.index((r.time, r.batch, r.state, r.which)) + shift for r in mine],
            [row.speed_up for row in mine],
            "o",
            ms=5,
            color=colour,
            label=name,
        )
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    labels = [f"{t}, {b}, {d}\n{which.replace('_', '+')}" for t, b, d, which in places]
    axes.set_xticks(range(len(places)), labels, rotation=60, ha="right", fontsize=7)
    axes.set_xlabel("T, B, D and pass")
    axes.set_ylabel("times as fast as lax.scan")
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize="small", wrap=True)
    if names:
        figure.legend(loc="outside right upper", fontsize="small")
    return figure
