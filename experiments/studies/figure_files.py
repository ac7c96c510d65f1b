"""A figure on disk with its numbers beside it. They replace an earlier figure's, no other file."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.run import figures
from experiments.run.drawing import Figure
from experiments.run.folders import RunError
from experiments.run.plain_files import replacing, write_text
from experiments.run.unicode import SHOWN

SUFFIXES = (".png", ".pdf", ".svg")


def check_output(output: str | Path, columns: Sequence[str], *, markdown: bool = False) -> Path:
    """Refuses a figure that cannot be written, or beside which there is somebody else's table.

    Args:
      output: the figure's file, as given.
      columns: of its table, at least the first two.
      markdown: a table in Markdown is written, too.

    Returns:
      The figure's file.

    Raises:
      RunError: says what was given and what was expected.
    """
    target = Path(output)
    if target.suffix.lower() not in SUFFIXES:
        raise RunError(f"output={str(output)!r}: give a file that ends in {', '.join(SUFFIXES)}")
    first = columns[:2]  # tell tables apart
    check_table(target.with_suffix(".csv"), ",".join(first), output=output)
    if markdown:
        check_table(target.with_suffix(".md"), f"| {' | '.join(first)} |", output=output)
    return target


def check_table(path: Path, header: str, *, output: str | Path) -> None:
    """Refuses to write over a file that is no such table.

    Args:
      path: of the table; it may be missing.
      header: with which one of its first three lines begins: Markdown has a title above.
      output: what was given.

    Raises:
      RunError: the file is another one.
    """
    if not (path.exists() or path.is_symlink()):
        return
    if path.is_file() and not path.is_symlink():
        with path.open("rb") as file:
            if any(file.readline(10_000).startswith(header.encode()) for _ in range(3)):
                return
    raise RunError(
        f"output={output} would write over {path}, which is another kind of file;\ngive a new name"
    )


def write(
    figure: Figure,
    target: Path,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    markdown: str | None = None,
) -> None:
    """Writes a figure and its table.

    Args:
      figure: drawn.
      target: from `check_output`.
      columns: all of the table's.
      rows: of the table.
      markdown: the table for people; None: there is none.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    figures.save(figure, target)
    with (
        replacing(target.with_suffix(".csv")) as fresh,
        fresh.open("w", newline="", encoding="utf-8", errors=SHOWN) as file,
    ):
        csv.writer(file).writerows([columns, *rows])
    if markdown is not None:
        write_text(target.with_suffix(".md"), markdown)
