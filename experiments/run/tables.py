"""Printed tables: bits per byte beside the baselines, sequential beside parallel."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.run.plain_files import printable, printable_lines

COMPRESSORS = {"gzip -9": "zlib", "xz -9e": "lzma"}


def cell(text: str) -> str:
    """Prepares a text for rich, whose markup and whose terminal must not obey it.

    Args:
      text: perhaps of somebody's folder.

    Returns:
      One line.
    """
    return escape(printable(text))


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table under a title.

    Args:
      title: printed above it.
      columns: names.
      rows: with one cell for each column; columns of numbers are right-aligned.
    """
    table = Table()
    for i, column in enumerate(columns):
        numbers = all(row[i][:1] in "-+0123456789" for row in rows)
        table.add_column(cell(column), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(cell, row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 400  # a file has no width: nothing is folded
    console.print(printable_lines(title), markup=False, emoji=False)
    console.print(table)


def show_quality(
    scored: Mapping[str, float], rulers: Mapping[str, float | None], *, where: str
) -> None:
    """Prints the bits per byte of models beside those of other methods.

    Args:
      scored: bits per byte by model.
      rulers: bits per byte by method; None if this Python lacks its module.
      where: names the bytes, for the title.
    """
    rows = [(name, f"{bits:.3f}") for name, bits in scored.items()]
    for name, bits in rulers.items():
        missing = f"not measured: this Python has no {COMPRESSORS.get(name, 'module for it')}"
        rows.append((name, missing if bits is None else f"{bits:.3f}"))
    rows.sort(key=lambda row: row[1])
    show(f"Bits per byte on {where}", ("method", "bits per byte"), rows)


def show_solvers(rows: Sequence[Mapping[str, Any]], *, shape: str) -> None:
    """Prints how well parallel and sequential solves agree, and the cost of each.

    Args:
      rows: from `solver_check.compare`.
      shape: of the batch, for the title.
    """
    columns = (
        "solver",
        "values differ by",
        "gradients by (relative)",
        "iterations a layer",
        "forward, ms",
        "with gradient, ms",
    )
    cells = [
        (
            row["solver"],
            f"{row['value_difference']:.1e}",
            f"{row['gradient_difference']:.1e}",
            ", ".join(map(str, row["iterations"])) or "-",
            f"{row['forward_ms']:.1f}",
            f"{row['gradient_ms']:.1f}",
        )
        for row in rows
    ]
    show(f"Sequential against parallel, {shape}", columns, cells)
