"""Finds the files that a user names by file, folder or glob, and reads their text with checks."""

import glob
import os
from pathlib import Path

from experiments.run import litter, trust
from experiments.run.memory import machine_bytes, readable

# How much of a file an error message quotes.
QUOTED = 40
SURELY_FITS = 2**28  # bytes
PACKED = frozenset(".gz .bz2 .xz .zst .zstd .lz4 .zip .eval .tar .tgz .7z .rar".split())
# How compressed files begin, whatever they are called.
MARKS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"(\xb5/\xfd", b'\x04"M\x18', b"PK\3\4", b"PK\5\6")
PLAIN = frozenset(".txt .csv .tsv .json .jsonl".split())  # never unpacked


def find_files(path: str, *, endings: tuple[str, ...]) -> list[Path]:
    """Finds files by name, folder or glob.

    Args:
      path: a file; a folder, of which all files with one of the endings are taken, at any depth;
        or a glob, in which `**` stands for any depth. Folders and globs leave out hidden files
        and folders.
      endings: such as ".txt".

    Returns:
      The files, sorted.

    Raises:
      FileNotFoundError: there is none; says what to give instead.
    """
    path = str(path)  # a file may be called 2024
    place = Path(os.path.expanduser(path))
    if place.is_file():
        return [place]
    if place.is_dir():
        found = [
            file
            for file in place.rglob("*")
            if file.suffix.lower() in endings
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(place).parts)
        ]
        if not found:
            raise FileNotFoundError(
                f"no {' or '.join('*' + ending for ending in endings)} file in the folder "
                f"data.path={path!r}: give a glob of the files you mean, "
                f"such as data.path='{place}/**/*.md'"
            )
        return sorted(found)
    matches = litter.without(map(Path, glob.glob(str(place), recursive=True)))
    found = [file for file in matches if file.is_file()]
    if not found:
        raise FileNotFoundError(
            f"data.path={path!r} is neither a file nor a folder, and no file matches it as a "
            "glob: give a path that exists (seen from the folder where you start), in quotes "
            "if it holds * or ?"
        )
    return sorted(found)


def read_text(file: Path, *, encoding: str) -> str:
    """Reads the text of a file.

    Args:
      file: to read.
      encoding: a codec of Python, such as "utf-8" or "latin-1".

    Returns:
      The text, with its line ends.

    Raises:
      ValueError: it is not text, or has another encoding; gives file, line and what to do.
      FileNotFoundError: it cannot be read.
    """
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise FileNotFoundError(f"{file} cannot be read: {error.strerror}") from error
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        if b"\0" in raw and not encoding.lower().startswith("utf-16"):
            raise ValueError(_binary(file, raw.index(b"\0"))) from error
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file}, line {line}: byte 0x{raw[error.start]:02x} at offset {error.start} is not "
            f"{encoding}: convert the file (iconv -f latin-1 -t utf-8), "
            "or give its encoding, for example data.encoding=latin-1"
        ) from error
    except (LookupError, ValueError) as error:  # "undefined" is a codec that refuses all text
        raise ValueError(
            f"data.encoding={encoding!r} is not an encoding of text that Python knows: "
            "give for example utf-8, latin-1 or utf-16"
        ) from error
    if "\0" in text:
        raise ValueError(_binary(file, raw.index(b"\0")))
    return text.removeprefix("\ufeff")  # the byte order mark


def check_size(file: Path, size: int) -> None:
    """Refuses a compressed file that unpacks to too much.

    Args:
      file: the compressed file.
      size: bytes found in it so far, or claimed by it.

    Raises:
      ValueError: `size` is more than half of the memory, or a thousand times the file.
    """
    there, packed = machine_bytes(), file.stat().st_size
    much = there is not None and size > there // 2
    if much or (size > SURELY_FITS and size > 1000 * packed):
        raise ValueError(
            f"{file} of {readable(packed)} unpacks to {readable(size)} or more: leave it out with "
            "a glob, or split it"
        )


def check_unpacked(file: Path) -> None:
    """Refuses a compressed file of a run's folder: nothing bounds what it unpacks to.

    Args:
      file: that a library would unpack; one that is not in the folder of a run is the user's own.

    Raises:
      ValueError: says what to do instead.
    """
    if not trust.is_of_a_run(file):
        return
    packed = file.suffix.lower() in PACKED
    if not packed and file.suffix.lower() not in PLAIN and file.is_file():
        with file.open("rb") as raw:
            packed = raw.read(max(map(len, MARKS))).startswith(MARKS)
    if packed:
        raise ValueError(
            f"{file} is compressed, and what it unpacks to has no bound: unpack it "
            "(gunzip, unzstd, unzip), or put it outside of the run's folder if it is yours"
        )


def _binary(file: Path, offset: int) -> str:
    return (
        f"{file} is not a text file: it has a NUL byte at offset {offset}. Unpack it if it is "
        "compressed, give data.encoding=utf-16 if it is UTF-16, or leave it out with a glob such "
        f"as data.path='{file.parent}/*.txt'"
    )


def check_string(value: object, *, field: str, where: str) -> bytes:
    """Checks the text of a record's field.

    Args:
      value: of the field; None is empty text.
      field: its name.
      where: file and line, for the message.

    Returns:
      The text as UTF-8; an unpaired surrogate in it becomes `?`.

    Raises:
      ValueError: it is not text.
    """
    if value is None:
        return b""
    if not isinstance(value, str):
        shown = repr(value)
        shown = shown if len(shown) <= QUOTED else shown[:QUOTED] + "..."
        raise ValueError(
            f"{where}: the field {field!r} holds {shown} ({type(value).__name__}), not text: "
            "give data.field=NAME of a field with text"
        )
    return value.encode(errors="replace")
