"""Rows of a benchmark on disk: written one by one, so a killed run keeps them."""

import contextlib
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.points import Point
from pallas_kernels.shapes import Shape

KEY = ("op", "dtype", "pass", "T", "B", "D", "implementation")
FIELDS = (
    *KEY,
    "backend",
    "verdict",
    "ms",
    "ms_low",
    "ms_high",
    "samples",
    "sets",
    "cached",
    "compile_s",
    "gb_s",
    "floor_ms",
    "times_floor",
    "iterations",
    "fallback_steps",
    "value_error",
    "gradient_error",
    "copy_gb_s",
    "device",
    "jax",
    "commit",
    "date",
)


def key(point: Point) -> dict[str, Any]:
    """Makes the columns that name a point.

    Args:
      point: the point.

    Returns:
      Column -> value.
    """
    values = (point.op, point.dtype, point.which, *point.shape, point.implementation)
    return dict(zip(KEY, values, strict=True))


def point_of(row: dict[str, Any]) -> Point:
    """Inverts `key`.

    Args:
      row: of the file.

    Returns:
      The point.
    """
    shape = Shape(*(int(row[name]) for name in "TBD"))
    return Point(row["op"], row["dtype"], row["pass"], shape, row["implementation"])


def read(path: Path) -> list[dict[str, Any]]:
    """Reads all complete rows; numbers as floats, empty cells as None.

    Args:
      path: of a file that may be missing.

    Returns:
      The rows; of two for the same point, the later one.

    Raises:
      ValueError: the file has other columns.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise ValueError(
                f"{path} has the columns {reader.fieldnames}, expected those of benchmarks.rows. "
                "Give another file: --csv"
            )
        rows = {}
        for raw in reader:
            if None in raw.values() or None in raw:  # the last line of a run that was killed
                continue
            row = {name: _number(value) for name, value in raw.items()}
            rows[point_of(row)] = row
    return list(rows.values())


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds a row, and the header if the file is new.

    Args:
      path: of the file.
      row: column -> value; missing ones stay empty.
    """
    ends_whole = not path.exists() or path.read_bytes().endswith(b"\n")
    with path.open("a", newline="", encoding="utf-8") as file:
        if not ends_whole:
            file.write("\r\n")
        writer = csv.DictWriter(file, FIELDS)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow({name: _text(value) for name, value in row.items()})


@contextlib.contextmanager
def running(path: Path, row: dict[str, Any]) -> Iterator[None]:
    """Leaves a note beside the rows while a point is measured; a killed process leaves it behind.

    Args:
      path: of the rows.
      row: the columns that name the point and the machine.
    """
    note = path.with_suffix(".running")
    note.write_text(json.dumps(row), encoding="utf-8")
    yield
    note.unlink()


def ended(path: Path) -> dict[str, Any] | None:
    """Reads and removes the note of the point at which a run was killed, perhaps by a hang.

    Args:
      path: of the rows.

    Returns:
      The row, or None.
    """
    note = path.with_suffix(".running")
    if not note.exists():
        return None
    row = json.loads(note.read_text(encoding="utf-8"))
    note.unlink()
    return row | {"verdict": "failed: the process ended while this was measured"}


def _text(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def _number(text: str) -> Any:
    if text == "":
        return None
    try:
        return float(text)
    except ValueError:
        return text
