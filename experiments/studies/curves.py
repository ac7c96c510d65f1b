"""Curves over groups of runs: the mean over seeds and the band from the lowest to the highest."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import EngFormatter

from experiments.run.drawing import Figure
from experiments.run.folders import RunError
from experiments.run.plain_files import printable
from experiments.sweep.run_sets import Run

COLUMNS = ("group", "runs")  # of a figure's table, before its numbers
BAND = "band: lowest to highest run"
# Okabe and Ito's colours, distinct under every common colour blindness; yellow is too pale here.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
# Methods that many figures compare keep their colour from figure to figure.
USUAL = (
    "para_gru",
    "para_lstm",
    "slstm",
    "min_gru",
    "attention",
    "recurrent+recurrent+attention",
    "linear",
)
LABELS = {
    "tokens": "training tokens",
    "seconds": "time (s)",
    "tokens_per_second": "speed (tokens/s)",
    "model_flops_per_second": "model speed (FLOP/s)",
}
UNITS = {
    "bits_per_byte": "bits per byte",
    "bits_per_token": "bits per token",
    "nats": "nats per token",
    "seconds": "s",
    "ms": "ms",
    "bytes": "bytes",
}


class Curve(NamedTuple):
    """One group's numbers.

    Attributes:
      x: increasing.
      mean: over the group's runs, at each x.
      low: of the runs, at each x.
      high: of the runs, at each x.
      runs: how many.
    """

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    runs: int


def axis_label(name: str) -> str:
    """Formats a column or config key with its unit.

    Args:
      name: from the table's header.

    Returns:
      Text for an axis.
    """
    if name in LABELS:
        return LABELS[name]
    text = name.replace("_", " ")
    for ending, unit in UNITS.items():
        if name.endswith(f"_{ending}"):
            return f"{text.removesuffix(ending.replace('_', ' ')).strip()} ({unit})"
    return f"{text} (share correct)" if "accuracy" in name else text


def points(run: Run, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Selects the points where a run has both numbers, by increasing x.

    Args:
      run: the run.
      x: a column of its table, or a key of its config, at which the last y is taken.
      y: a column of its table.

    Returns:
      Two arrays of equal length, finite; empty if no row has both.

    Raises:
      RunError: no such column or key, with the known ones.
    """
    if y not in run.columns:
        raise RunError(f"{run.folder}: no column y={y!r}; choose from {', '.join(run.columns)}")
    measured = run.columns[y]
    if x in run.columns:
        pairs = list(zip(run.columns[x], measured, strict=True))
    else:
        at = run.config.get(x)
        if not isinstance(at, int | float):
            raise RunError(
                f"{run.folder}: x={x!r} is neither a column nor a number in its config; "
                f"columns are {', '.join(run.columns)}"
            )
        pairs = [(float(at), b) for b in measured if b is not None][-1:]
    # A column may be written twice at one step, when a run ends on an evaluation: the last counts.
    unique = {a: b for a, b in pairs if a is not None and b is not None and math.isfinite(b)}
    xs = sorted(unique)
    return np.asarray(xs), np.asarray([unique[a] for a in xs])


def drawable(runs: Sequence[Run], x: str, y: str) -> tuple[list[Run], list[str]]:
    """Leaves out the runs without a point, such as those that diverged.

    Args:
      runs: at least one.
      x: a column or a key of the config.
      y: a column.

    Returns:
      The others, and a line for each that is left out.

    Raises:
      RunError: as `points`; or no run has a point.
    """
    found, left_out = [], []
    for run in runs:
        if y not in run.columns and any(y in other.columns for other in runs):
            left_out.append(f"{run.folder}: it has no column {y}")
        elif points(run, x, y)[0].size:
            found.append(run)
        elif x in run.columns:
            left_out.append(f"{run.folder}: no row has finite {x} and {y}")
        else:
            left_out.append(f"{run.folder}: its last {y} is not finite")
    if not found:
        raise RunError("nothing to draw:\n  " + "\n  ".join(map(printable, left_out)))
    return found, left_out


def make_curve(runs: Sequence[Run], x: str, y: str) -> Curve:
    """Computes the mean and band of a group.

    Runs measured at different x are interpolated linearly, only in the range that all of them
    share. If x is a key of the config, runs with the same value of it are one point.

    Args:
      runs: of the group, from `drawable`.
      x: a column or a key of the config.
      y: a column.

    Returns:
      The curve.

    Raises:
      RunError: as `points`; or the runs share no range of x.
    """
    found = [points(run, x, y) for run in runs]
    if not all(x in run.columns for run in runs):
        grid = np.unique([xs[0] for xs, _ in found])
        at = [np.asarray([ys[0] for xs, ys in found if xs[0] == value]) for value in grid]
        mean, low, high = (np.asarray([f(ys) for ys in at]) for f in (np.mean, np.min, np.max))
        return Curve(grid, mean, low, high, max(len(ys) for ys in at))
    first, last = max(xs[0] for xs, _ in found), min(xs[-1] for xs, _ in found)
    grid = np.unique(np.concatenate([xs for xs, _ in found]))
    grid = grid[(grid >= first) & (grid <= last)]
    if not grid.size:
        folders = ", ".join(str(run.folder) for run in runs)
        raise RunError(f"runs of one group share no range of x={x!r}: {folders}")
    ys = np.stack([np.interp(grid, xs, ys) for xs, ys in found])
    return Curve(grid, ys.mean(0), ys.min(0), ys.max(0), len(runs))


def shortest(runs: Sequence[Run], x: str, y: str) -> Run | None:
    """Finds the run that ends a group's curve before the others end.

    Args:
      runs: of the group.
      x: a column of steps or tokens, which equal runs share; other columns give None.
      y: a column.

    Returns:
      The run; None if all end together.
    """
    if x not in ("step", "tokens"):
        return None
    ends = [float(points(run, x, y)[0][-1]) for run in runs]
    return runs[ends.index(min(ends))] if min(ends) < max(ends) else None


def styles(labels: Sequence[str]) -> list[tuple[str, str]]:
    """Assigns a colour and a line style to each label, fixed for the usual methods.

    Args:
      labels: of the groups, in the order of the legend.

    Returns:
      As many pairs, all different up to 28 labels.
    """
    usual = [
        next((i for i, m in enumerate(USUAL) if any(v.split("=")[-1] == m for v in parts)), None)
        for parts in (text.split(", ") for text in labels)
    ]
    known = [i for i in usual if i is not None]
    if len(known) == len(labels) == len(set(known)):
        return [(COLOURS[i], STYLES[0]) for i in known]
    count = len(COLOURS)
    return [(COLOURS[i % count], STYLES[i // count % len(STYLES)]) for i in range(len(labels))]


def draw(
    curves: Mapping[str, Curve],
    *,
    x: str,
    y: str,
    title: str,
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """Draws one line for each group, with its band.

    Args:
      curves: by label, in the order of the legend.
      x: what the x axis is.
      y: what the y axis is.
      title: of the figure.
      log_x: a logarithmic x axis.
      log_y: a logarithmic y axis.

    Returns:
      The figure.

    Raises:
      RunError: a number that is not positive on a logarithmic axis.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, log in (("x", log_x), ("y", log_y)):
        values = [c.x if name == "x" else c.low for c in curves.values()]
        if log:
            if not all((v > 0).any() for v in values):
                raise RunError(f"log_{name}=true, but {x if name == 'x' else y} is never positive")
            getattr(axes, f"set_{name}scale")("log")
    for (label, curve), (colour, style) in zip(curves.items(), styles(list(curves)), strict=True):
        marker = "o" if len(curve.x) <= 25 else None
        seeds = textwrap.fill(f"{label} (n={curve.runs})", 70, max_lines=12, placeholder=" …")
        axes.plot(curve.x, curve.mean, style, color=colour, marker=marker, ms=4, label=seeds)
        if curve.runs > 1:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.2, lw=0)
    axes.set_xlabel(axis_label(x))
    axes.set_ylabel(axis_label(y))
    if not log_x and max(c.x.max() for c in curves.values()) >= 1e4:
        axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_title(title)
    axes.grid(alpha=0.3)
    band = any(curve.runs > 1 for curve in curves.values())
    axes.legend(title=f"mean; {BAND}" if band else None, fontsize="small", title_fontsize="small")
    return figure


def pick_y(runs: Sequence[Run]) -> str:
    """Selects the default y: the figure that runs are judged by, or their training loss.

    Args:
      runs: at least one.

    Returns:
      A column that all of them have.

    Raises:
      RunError: there is none.
    """
    shared = [name for name in runs[0].columns if all(name in run.columns for run in runs)]
    best = [run.summary["judged_by"][0] for run in runs if "judged_by" in run.summary]
    likely = [n for n in shared if n.startswith("validation") or "accuracy" in n]
    for name in (*best, *likely, *(n for n in shared if n.startswith("train"))):
        if name in shared:
            return name
    raise RunError(f"give y=COLUMN; the columns that all runs have are {', '.join(shared)}")


def table(curves: Mapping[str, Curve], x: str, y: str) -> tuple[Sequence[str], list[Sequence[Any]]]:
    """The plotted numbers.

    Args:
      curves: by label.
      x: name of the x column.
      y: prefix of the names of the columns after it.

    Returns:
      `(columns, rows)`; the first columns are `COLUMNS`.
    """
    rows = [
        [label, curve.runs, *map(float, row)]
        for label, curve in curves.items()
        for row in zip(curve.x, curve.mean, curve.low, curve.high, strict=True)
    ]
    return (*COLUMNS, x, f"{y}_mean", f"{y}_lowest", f"{y}_highest"), rows
