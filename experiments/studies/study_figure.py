"""Draws the figure of `solver_study`: `python -m experiments.studies.study_figure FILE`."""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from experiments.run import figures
from experiments.run.drawing import Figure
from experiments.run.plain_files import regular

USAGE = "python -m experiments.studies.study_figure FOLDER/study.csv"
LINES = {
    ("stopped", "exact"): ("trained stopping early, tested exactly", "-", "o"),
    ("stopped", "stopped"): ("trained and tested stopping early", "--", "s"),
    ("exact", "stopped"): ("trained exactly, tested stopping early", ":", "^"),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73")
PANELS = {
    "max_iters": "budget (evaluations of all steps)",
    "tol": "tolerance (relative correction)",
}


def draw(table: Path) -> Figure:
    """Draws accuracy at each test length against budget and tolerance; mean and range over seeds.

    Args:
      table: `study.csv`.

    Returns:
      The figure: a row of panels for each length.
    """
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lengths = sorted({int(row["length"]) for row in rows})
    columns = [key for key in PANELS if any(row[key] for row in rows)]
    figure = Figure(figsize=(5 * len(columns) + 1, 3 * len(lengths) + 1.4), layout="constrained")
    grid = figure.subplots(len(lengths), len(columns), squeeze=False, sharey=True)
    for length, line in zip(lengths, grid, strict=True):
        for key, axes in zip(columns, line, strict=True):
            _panel(axes, [row for row in rows if int(row["length"]) == length], key)
            axes.set_title(f"T = {length}")
        line[0].set_ylabel("accuracy (share of answers)")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(columns), fontsize="small")
    return figure


def _panel(axes: Axes, rows: Sequence[dict[str, str]], key: str) -> None:
    exact = [float(row["accuracy"]) for row in rows if row["solver"] == "exact"]
    axes.axhline(sum(exact) / len(exact), color="black", lw=1, label="trained and tested exactly")
    solvers = list(dict.fromkeys(row["solver"] for row in rows if row["solver"] != "exact"))
    for solver, colour in zip(solvers, COLOURS, strict=False):
        for (trained, tested), (label, style, marker) in LINES.items():
            found: dict[float, list[float]] = {}
            for row in rows:
                if (row["solver"], row["trained"], row["tested"]) == (solver, trained, tested):
                    if row[key]:
                        found.setdefault(float(row[key]), []).append(float(row["accuracy"]))
            xs = sorted(found)
            mean = [sum(found[x]) / len(found[x]) for x in xs]
            axes.plot(xs, mean, style, color=colour, marker=marker, label=f"{solver}: {label}")
            low, high = ([f(found[x]) for x in xs] for f in (min, max))
            axes.fill_between(xs, low, high, color=colour, alpha=0.1, lw=0)
    axes.set_xscale("log", base=2 if key == "max_iters" else 10)
    if key == "tol":
        axes.invert_xaxis()  # exactness grows to the right, as with the budget
    else:
        ticks = sorted({int(row[key]) for row in rows if row[key]})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel(PANELS[key])
    axes.set_ylim(0, 1.03)
    axes.grid(alpha=0.3)


def main() -> None:
    """The command line: a table, beside which the figure is written.

    Raises:
      SystemExit: no table is given, or it is not one of a study, or somebody else's picture is in
        the place of the figure; says what to do.
    """
    if len(sys.argv) != 2:
        raise SystemExit(f"error: give the table of one study: {USAGE}")
    source = Path(sys.argv[1])
    try:
        figure = draw(regular(source))
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, csv.Error) as error:
        told = error.strerror if isinstance(error, OSError) else "it is no table of a study"
        raise SystemExit(f"error: {source} cannot be drawn ({told}): {USAGE}") from error
    target = source.with_suffix(".png")
    if target.exists() and not figures.is_ours(target):
        raise SystemExit(f"error: {target} is there, and no figure of this program; move it away")
    figures.save(figure, target)


if __name__ == "__main__":
    main()
