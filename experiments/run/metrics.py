"""A run's numbers as CSV: written row by row, so a killed run keeps its measurements."""

import codecs
import contextlib
import csv
import io
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.run.plain_files import (
    LARGEST_TABLE,
    open_to_append,
    read_bytes,
    regular,
    replacing,
)


def start(path: Path, columns: Sequence[str]) -> None:
    """Creates a table with its header.

    Args:
      path: the file.
      columns: names, in order.

    Raises:
      FileExistsError: the file exists already.
    """
    with path.open("x", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(columns)


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Adds one row and closes the file; missing columns stay empty, new names become columns.

    Args:
      path: a file made by `start`. One that was emptied or removed since then begins anew, with the
        columns of the row.
      row: values by name.
    """
    columns: list[str] | None = None
    with contextlib.suppress(FileNotFoundError):
        with regular(path).open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file), None)
    if not columns:
        print(f"{path} was emptied or taken away meanwhile: it begins anew", file=sys.stderr)
        columns = sorted(row, key=lambda name: name != "step")
        with replacing(path) as fresh:
            start(fresh, columns)
    new = [name for name in row if name not in columns]
    if new:
        columns += new
        _widen(path, columns)
    with open_to_append(path) as file:
        csv.DictWriter(file, columns, restval="").writerow(row)


def _widen(path: Path, columns: Sequence[str]) -> None:
    """Adds columns, empty in the old rows, to a table; a kill meanwhile leaves the old file."""
    _, *rows = read_rows(path)
    with replacing(path) as fresh, fresh.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([*row, *[""] * (len(columns) - len(row))] for row in rows)


def read(path: Path) -> dict[str, list[float | None]]:
    """Reads a table of numbers.

    Args:
      path: the file.

    Returns:
      Columns by name; None where a cell is empty. A last line without a line end, left by a
      killed process, is not read.

    Raises:
      ValueError: names the line that is not a row of numbers.
    """
    header, *rows = read_rows(path) or [[]]
    columns: dict[str, list[float | None]] = {name: [] for name in header}
    if len(columns) < len(header):
        raise ValueError(f"two columns have the same name: {', '.join(header)}")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(f"line {number} has {len(row)} cells, the header {len(header)}")
        for name, cell in zip(header, row, strict=True):
            try:
                columns[name].append(float(cell) if cell else None)
            except ValueError:
                raise ValueError(f"line {number}, column {name}: {cell[:40]!r}") from None
    return columns


def read_rows(path: Path) -> list[list[str]]:
    """Reads the cells of a table, its header first.

    Args:
      path: a CSV file; a byte order mark and the line ends of any system are accepted.

    Returns:
      Rows of text, without empty ones and without a last row that a killed process left unfinished.

    Raises:
      ValueError: it is not text, not CSV, or larger than any that a run writes.
    """
    try:
        text = read_bytes(path, most=LARGEST_TABLE).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    if "\0" in text:
        raise ValueError(f"line {text.count(chr(10), 0, text.index(chr(0))) + 1} has a NUL byte")
    whole = text[: text.rfind("\n") + 1]
    try:
        return [row for row in csv.reader(io.StringIO(whole, newline="")) if row]
    except csv.Error as error:
        raise ValueError(str(error)) from error


def readable(path: Path, *, key: str) -> tuple[list[str], list[list[str]], str]:
    """Reads the rows of numbers of a table that may be damaged.

    Args:
      path: a CSV file.
      key: a column in which every row has a finite number.

    Returns:
      The header, empty if it cannot be read; the readable rows; and why another line is none,
      empty if all are rows. A last line without a line end counts as unfinished, not as damaged.
    """
    try:
        content = read_bytes(path, most=LARGEST_TABLE).removeprefix(codecs.BOM_UTF8)
    except ValueError as error:
        return [], [], str(error)
    *lines, _ = re.split(rb"\r\n|\n|\r", content)  # a cell never holds a line end
    cells = [(number, _cells(line)) for number, line in enumerate(lines, start=1) if line]
    if not cells:
        return [], [], ""
    (first, header), *others = cells
    if key not in header or "" in header or len(set(header)) < len(header):
        return [], [], f"line {first} is not its header"
    rows, lost = [], ""
    for number, row in others:
        if len(row) == len(header) and _are_numbers(row, header.index(key)):
            rows.append(row)
        else:
            lost = lost or f"line {number} is not a row of numbers"
    return header, rows, lost


def _cells(line: bytes) -> list[str]:
    """Reads one line; no cells if it is not CSV."""
    try:
        return next(csv.reader([line.decode()], strict=True), []) if b"\0" not in line else []
    except (UnicodeDecodeError, csv.Error):
        return []


def _are_numbers(row: Sequence[str], key: int) -> bool:
    try:
        numbers = [float(cell) if cell else None for cell in row]
        return (number := numbers[key]) is not None and math.isfinite(number)
    except ValueError:
        return False
