"""Files of a run's folder, which may be anybody's: what is opened, how much is read, what is shown.

Only regular files are opened, no more of them is read than a run writes, nothing is written
through a link, and damaged ones are kept.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.run.unicode import SHOWN

OTHER = "neither a file nor a folder"
# Bytes that are read of one file: far more than a run of any length writes.
LARGEST_RECORD, LARGEST_TABLE = 64 << 20, 256 << 20
LONGEST_NAME = 80  # characters of a file's name that is made of others' words


def is_plain(path: Path) -> bool:
    """Whether a path leads to a file or a folder; a pipe, a socket or a device is neither.

    Args:
      path: of anything.
    """
    return path.is_file() or path.is_dir()


def regular(path: Path) -> Path:
    """Refuses what is neither a file nor a folder: reading a pipe or a device may never end.

    Args:
      path: of a file, which may be missing.

    Returns:
      The path.

    Raises:
      OSError: it is a pipe, a socket or a device.
    """
    if path.exists() and not is_plain(path):  # a folder has an error of its own
        raise OSError(errno.EINVAL, f"it is {OTHER}", str(path))
    return path


def read_bytes(path: Path, *, most: int = LARGEST_RECORD) -> bytes:
    """Reads a whole file, unless it is larger than any that a run writes.

    Args:
      path: of the file.
      most: bytes.

    Returns:
      Its content.

    Raises:
      OSError: it cannot be read, or is a pipe, a socket or a device.
      ValueError: it is larger; gives both numbers.
    """
    with regular(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > most else file.read(most + 1)  # it may not tell, or grow
    if max(size, len(content)) > most:
        raise ValueError(f"it has {max(size, len(content))} bytes, and at most {most} are read")
    return content


def read_text(path: Path, *, most: int = LARGEST_RECORD) -> str:
    """Reads a whole text file; a byte order mark and the line ends of any system are accepted.

    Args:
      path: of the file, in UTF-8.
      most: bytes.

    Returns:
      Its text.

    Raises:
      OSError: as `read_bytes`.
      ValueError: it is larger, or not UTF-8.
    """
    return read_bytes(path, most=most).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Writes a file completely or not at all; a link of its name is replaced, not followed.

    Args:
      path: of the file.

    Yields:
      The file to write; it takes the other's name when the block ends.
    """
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)  # a link too
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file, as `replacing`.

    Args:
      path: of the file.
      text: its content; what UTF-8 does not have is replaced.
    """
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", errors=SHOWN)


def open_to_append(path: Path) -> Any:
    """Opens a table to add rows to; a link is not followed.

    Args:
      path: of the file, which is made if missing.

    Returns:
      The open file.

    Raises:
      OSError: it cannot be written to, or is a link.
    """

    def without_links(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link, and rows are added only to files", str(path))
    return open(path, "a", newline="", encoding="utf-8", opener=without_links)


def aside(path: Path) -> Path:
    """Moves a damaged file aside, so that another one can be written in its place.

    Args:
      path: of the file, `STEM.SUFFIX`.

    Returns:
      Where it is kept, `STEM.damaged.SUFFIX`.
    """
    kept = path.with_name(f"{path.stem}.damaged{path.suffix}")
    os.replace(path, kept)
    return kept


def printable(text: str) -> str:
    """Shows control characters, which a terminal would obey, by their codes.

    Args:
      text: perhaps of somebody's folder.

    Returns:
      One line: `\\x1b` in place of an escape, `\\n` in place of a line end.
    """

    def shown(c: str) -> str:
        # A lone surrogate is a byte of a file's name that is no text, see `unicode`.
        as_it_is = c.isprintable() or "\ud800" <= c <= "\udfff"
        return c if as_it_is else c.encode("unicode_escape").decode("ascii")

    return "".join(map(shown, text))


def printable_lines(text: str) -> str:
    """Shows control characters by their codes, except the ends of lines.

    Args:
      text: a message of ours, perhaps with words of somebody's folder.

    Returns:
      As many lines.
    """
    return "\n".join(map(printable, text.split("\n")))


def for_terminal(text: str) -> str:
    """Shows control characters by their codes, except ends of lines and tabs.

    Args:
      text: as long as it may be, such as a model writes.

    Returns:
      Text that a terminal only shows.
    """
    return "\t".join(map(printable_lines, text.split("\t")))


def safe_name(text: str) -> str:
    """Makes a part of a file's name of any text; it never leads into another folder.

    Args:
      text: such as the name of a column.

    Returns:
      Letters, digits, `_`, `-`, `+` and `.`, without leading dots; `_` if nothing is left.
    """
    return re.sub(r"[^\w.+-]+", "_", text, flags=re.ASCII).lstrip(".")[:LONGEST_NAME] or "_"
