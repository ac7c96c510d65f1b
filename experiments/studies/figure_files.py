"""A figure on disk with its numbers beside it. They replace an earlier figure's, no other file."""

import csv
import errno
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.run import figures
from experiments.run.drawing import Figure
from experiments.run.folders import RunError
from experiments.run.outputs import check_not_kept
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
        raise RunError(
            f"output={str(output)!r}: give a file that ends in {', '.join(SUFFIXES)},\n"
            f"for example output={output}.png"
        )
    first = columns[:2]  # tell tables apart
    table = target.with_suffix(".csv")
    check_table(table, re.escape(",".join(first)) + r"(,|\s)", output=output)
    if markdown:
        head = re.escape(f"| {' | '.join(first)} |")
        check_table(target.with_suffix(".md"), head, line=2, output=output)
    if _there(target) and not (figures.is_ours(target) and table.exists()):
        raise RunError(
            f"output={output}: {target} is there, and no earlier figure of this command;\n"
            "give a new name"
        )
    return target


def _there(path: Path) -> bool:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return path.exists() or path.is_symlink()


def check_table(path: Path, header: str, *, output: str | Path, line: int = 0) -> None:
    """Refuses to write over a file that is no such table.

    Args:
      path: of the table; it may be missing.
      header: a pattern of the beginning of one of its lines.
      output: what was given.
      line: which one; Markdown has a title above.

    Raises:
      RunError: the file is another one.
    """
    check_not_kept(path)
    if not _there(path):
        return
    if path.is_file() and not path.is_symlink():
        with path.open("rb") as file:
            lines = [file.readline(10_000).decode(errors="replace") for _ in range(line + 1)]
        if re.match(header, lines[line]):
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
