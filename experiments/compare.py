"""Compares runs in a table: `python -m experiments.compare runs=runs/lm`.

Each run has a row: the keys of the config in which runs differ, seeds included, then its results.
"""

import csv
import io
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from experiments.run.folder_arguments import TRUST, quote_folders
from experiments.run.folders import RunError
from experiments.run.plain_files import printable, write_text
from experiments.run.tables import cell
from experiments.shell.commandline import command, guarded
from experiments.shell.foreign import content_of
from experiments.studies import figure_files
from experiments.studies.curves import pick_y
from experiments.sweep.run_sets import Run, differing_keys, read_all, short_names

RESULTS = (
    "steps_done",
    "final",
    "best",
    "tokens_per_second",
    "parameters",
    "memory_bytes",
    "minutes",
    "status",
    "commit",
)
SUFFIXES = (".csv", ".md")
Cell = str | int | float | bool | None


class Comparison(NamedTuple):
    """The table as values.

    Attributes:
      metric: the column whose final and best values are shown.
      better: "min" or "max".
      header: names of columns.
      rows: with one cell for each column; None if a run has no such value.
    """

    metric: str
    better: str
    header: list[str]
    rows: list[list[Cell]]


def _last(run: Run, column: str) -> float | None:
    return next((v for v in reversed(run.columns.get(column, [])) if v is not None), None)


def _largest(run: Run, column: str) -> float | None:
    return max((v for v in run.columns.get(column, []) if v is not None), default=None)


def _results(run: Run, metric: str, better: str) -> dict[str, Cell]:
    measured = [v for v in run.columns.get(metric, []) if v is not None and math.isfinite(v)]
    seconds = run.summary.get("seconds", _largest(run, "seconds"))
    commit = run.environment.get("git_commit")
    speed = run.summary.get("tokens_per_second", _last(run, "tokens_per_second"))
    return {
        "steps_done": _largest(run, "step"),
        "final": _last(run, metric),
        "best": {"min": min, "max": max}[better](measured, default=None),
        "tokens_per_second": speed,
        "parameters": run.summary.get("parameters"),
        "memory_bytes": run.summary.get("memory_bytes", _largest(run, "memory_bytes")),
        "minutes": None if seconds is None else round(seconds / 60, 2),
        "status": run.summary.get("status", "unfinished"),
        # The star marks uncommitted changes.
        "commit": commit and commit[:8] + ("*" if run.environment.get("git_dirty") else ""),
    }


def _lookup(run: Run, results: dict[str, Cell], column: str) -> Cell:
    if column in results:
        return results[column]
    if column in run.config:
        return run.config[column]
    found = run.summary.get(column)
    return _last(run, column) if found is None or isinstance(found, dict | list) else found


def tabulate(
    runs: Sequence[Run],
    *,
    metric: str | None = None,
    better: str | None = None,
    columns: Sequence[str] | None = None,
    sort: str | None = None,
) -> Comparison:
    """Looks up every cell.

    Args:
      runs: at least one.
      metric: the column of `metrics.csv` of which `final` and `best` are shown; None: the figure
        that the runs are judged by.
      better: "min" or "max"; None: as the runs are judged, otherwise "max" for an accuracy.
      columns: to show beside `run`: names of results, keys of the config, of `summary.json`, or
        columns of `metrics.csv` (their last value); None: differing keys and results.
      sort: a column; `-NAME` puts the largest first. None: as the runs were found.

    Returns:
      The comparison.

    Raises:
      RunError: an unknown column; names the known ones.
    """
    metric = metric or pick_y(runs)
    if not any(metric in run.columns for run in runs):
        there = dict.fromkeys(name for run in runs for name in run.columns)
        raise RunError(f"metric={metric!r}: no run has that column; choose from {', '.join(there)}")
    if better not in (None, "min", "max"):
        raise RunError(f"better={better!r}: give min or max")
    judged = dict(run.summary["judged_by"] for run in runs if "judged_by" in run.summary)
    better = better or judged.get(metric) or ("max" if "accuracy" in metric else "min")
    seeds = ["seed"] if len({run.config.get("seed") for run in runs}) > 1 else []
    shown = list(columns) if columns is not None else [*differing_keys(runs), *seeds, *RESULTS]
    by = (sort or "").removeprefix("-")
    every = [*shown, by] if by and by != "run" and by not in shown else shown
    table = []
    for run, name in zip(runs, short_names(runs), strict=True):
        results = _results(run, metric, better)
        table.append({"run": name, **{key: _lookup(run, results, key) for key in every}})
    known = {*RESULTS, *(k for run in runs for k in (*run.config, *run.columns, *run.summary))}
    for key in every:
        if key not in known:
            raise RunError(
                f"no run has {key!r}; results are {', '.join(RESULTS)}; the keys of the config in "
                f"which the runs differ are {', '.join(differing_keys(runs)) or 'none'}"
            )
    if by:
        table = _sorted(table, by, largest_first=sort != by)
    rows = [[row[key] for key in ("run", *shown)] for row in table]
    return Comparison(metric, better, ["run", *shown], rows)


def _sorted(table: list[dict[str, Cell]], by: str, *, largest_first: bool) -> list[dict[str, Cell]]:
    """Sorts numbers before texts; rows without a value are last in either direction."""
    there = [row for row in table if row[by] is not None]
    missing = [row for row in table if row[by] is None]

    def order(row):
        value = row[by]
        return (0, value, "") if isinstance(value, int | float) else (1, 0, str(value))

    return sorted(there, key=order, reverse=largest_first) + missing


def text(value: Cell, column: str = "") -> str:
    """Formats a cell.

    Args:
      value: of a table.
      column: its name; bytes are shown in MiB.

    Returns:
      Four significant digits, whole numbers with commas, "-" for None.
    """
    if value is None:
        return "-"
    if column.endswith("bytes") and not isinstance(value, str):
        return f"{value / 2**20:,.0f} MiB"
    if isinstance(value, bool | str):
        return printable(str(value))
    if abs(value) < 1e15 and (float(value).is_integer() or abs(value) >= 1e4):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def title(table: Comparison) -> str:
    """Describes the columns `final` and `best`.

    Args:
      table: from `tabulate`.

    Returns:
      One line.
    """
    which = {"min": "lowest", "max": "highest"}[table.better]
    return f"{len(table.rows)} runs; final and best ({which}) {table.metric}"


def as_csv(table: Comparison) -> str:
    """Formats the table with every digit.

    Args:
      table: from `tabulate`.

    Returns:
      CSV; its `final` and `best` also name the metric.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    named = {key: f"{key}_{table.metric}" for key in ("final", "best")}
    writer.writerow([named.get(key, key) for key in table.header])
    writer.writerows(table.rows)
    return file.getvalue()


def as_markdown(table: Comparison) -> str:
    """Formats the table for a document.

    Args:
      table: from `tabulate`.

    Returns:
      Markdown, under a title.
    """
    rows = [
        [
            text(value, name).replace("|", "\\|")
            for name, value in zip(table.header, row, strict=True)
        ]
        for row in table.rows
    ]
    header = [printable(name).replace("|", "\\|") for name in table.header]
    lines = [header, ["---"] * len(header), *rows]
    return f"{title(table)}\n\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines)


def show(table: Comparison) -> None:
    """Prints the table.

    Args:
      table: from `tabulate`.
    """
    printed = Table()
    for i, name in enumerate(table.header):
        numbers = all(isinstance(row[i], int | float) or row[i] is None for row in table.rows)
        printed.add_column(cell(name), justify="right" if numbers else "left", overflow="fold")
    for row in table.rows:
        texts = (text(value, name) for name, value in zip(table.header, row, strict=True))
        printed.add_row(*map(cell, texts))
    # On a terminal rich fits the width; in a file nothing may be cut off.
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 400
    console.print(printable(title(table)), markup=False, emoji=False)
    console.print(printed)


def _beginning(table: Comparison, suffix: str) -> str:
    """A pattern of the first line of such a table: with these columns, or any results."""
    if suffix == ".md":
        return r"\d+ runs; final and best"
    line = as_csv(table).partition("\n")[0]
    return rf"({re.escape(line)}|run,(.*,)?({'|'.join(RESULTS)}))[,_\s]"


def compare(runs: Sequence[Run], *, output: str | None, **settings: Any) -> None:
    """Prints the table, and writes it to a file if one is given.

    Args:
      runs: at least one.
      output: a file that ends in .csv or .md; None: no file.
      **settings: of `tabulate`.

    Raises:
      RunError: a setting does not fit; says what exists instead.
    """
    target = None if output is None else Path(output)
    if target is not None and target.suffix not in SUFFIXES:
        raise RunError(f"output={output!r}: give a file that ends in {' or '.join(SUFFIXES)}")
    table = tabulate(runs, **settings)
    if target is not None:
        figure_files.check_table(target, _beginning(table, target.suffix), output=output)
    show(table)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, (as_csv if target.suffix == ".csv" else as_markdown)(table))
        print(target)


@command
@hydra.main(version_base="1.3", config_path="conf", config_name="compare")
def main(cfg: DictConfig) -> None:
    """Hydra's entry."""

    def program():
        values = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(values, dict)
        del values[TRUST]  # `guarded` has read it
        runs, left_out = read_all(values.pop("runs"))
        for line in left_out:
            print(f"left out: {line}")
        with content_of(*(run.folder for run in runs)):
            compare(runs, **values)

    guarded(program, cfg)


if __name__ == "__main__":
    sys.argv[1:] = quote_folders(sys.argv[1:], keys=("runs", TRUST))
    main()
