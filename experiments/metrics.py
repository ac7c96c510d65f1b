"""A run's numbers as CSV: written row by row so that a killed run keeps what it measured."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def start(path: Path, columns: Sequence[str]) -> None:
    """Creates a table with its header.

    Args:
      path: the file.
      columns: names, in order.

    Raises:
      FileExistsError: the file is there already: one run, one folder.
    """
    with path.open("x", newline="") as file:
        csv.writer(file).writerow(columns)


def append(path: Path, columns: Sequence[str], row: Mapping[str, Any]) -> None:
    """Adds one row and closes the file; missing columns stay empty.

    Args:
      path: a file made by `start`.
      columns: the names given to `start`.
      row: values by name.

    Raises:
      ValueError: a name that is no column.
    """
    with path.open("a", newline="") as file:
        csv.DictWriter(file, columns, restval="").writerow(row)


def read(path: Path) -> dict[str, list[float | None]]:
    """Reads a table of numbers.

    Args:
      path: the file.

    Returns:
      Columns by name; None where a cell is empty.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        columns: dict[str, list[float | None]] = {name: [] for name in reader.fieldnames or ()}
        for row in reader:
            for name, cell in row.items():
                columns[name].append(float(cell) if cell else None)
    return columns
