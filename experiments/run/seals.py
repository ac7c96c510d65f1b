"""Digests of files and arrays, kept beside them: they tell whether the data is what was written.

A sealed folder holds `digests.json`, with a digest of every file below it and one of itself.
Digests of arrays are taken in memory before they are written, so they also find faults on the way
to the disk. All are BLAKE2b, of 128 bits.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.run import litter
from experiments.run.folders import RunError
from experiments.run.plain_files import (
    OTHER,
    is_plain,
    printable,
    printable_lines,
    read_bytes,
    regular,
    write_text,
)

SEAL = "digests.json"
# Files that Orbax writes after its last callback; sealed a moment later.
LATE = ("_CHECKPOINT_METADATA", "commit_success.txt")
CHUNK = 1 << 20


class Damaged(RunError):
    """Something on disk is not what was written; the text, one line, names it.

    The name may be anybody's: a line end in it makes no line of its own.
    """

    def __init__(self, text: str):
        super().__init__(printable(text))


def of_text(value: Any) -> str:
    """Computes the digest of plain values.

    Args:
      value: JSON-able.

    Returns:
      Hexadecimal digits.
    """
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def of_file(path: Path) -> str:
    """Computes the digest of a file's content.

    Args:
      path: of the file.

    Returns:
      Hexadecimal digits.
    """
    found = hashlib.blake2b(digest_size=16)
    with regular(path).open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()


def of_arrays(tree: Any) -> dict[str, str]:
    """Computes the digests of arrays.

    Args:
      tree: of arrays. Arrays that are partly in other processes are left out.

    Returns:
      Digits by path in the tree; they depend on dtype, shape and every bit.
    """
    found = {}
    for keys, leaf in jax.tree.leaves_with_path(tree):
        if getattr(leaf, "is_fully_addressable", True):
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            array = np.ascontiguousarray(leaf)
            digest = hashlib.blake2b(f"{array.dtype} {array.shape} ".encode(), digest_size=16)
            digest.update(array.reshape(-1).view(np.uint8))
            found[jax.tree_util.keystr(keys)] = digest.hexdigest()
    return found


def check_arrays(tree: Any, known: Mapping[str, str], where: str) -> None:
    """Refuses arrays that differ from their digests.

    Args:
      tree: as read.
      known: from `of_arrays`, before writing; arrays that it left out are not checked.
      where: their place, for the message.

    Raises:
      Damaged: names the first array that differs.
    """
    for path, digest in of_arrays(tree).items():
        if known.get(path, digest) != digest:
            raise Damaged(f"{where}: the array {path} is damaged: it is not what was saved")


def seal(folder: Path, *, late: bool = True) -> None:
    """Writes the digests of all files below a folder.

    Args:
      folder: complete, and not being written to.
      late: whether `LATE` is already written.
    """
    found = litter.without(sorted(folder.rglob("*")))
    files = {str(p.relative_to(folder)): p for p in found if p.is_file()}
    left_out = {SEAL} if late else {SEAL, *LATE}
    digests = {name: of_file(path) for name, path in files.items() if name not in left_out}
    write_text(folder / SEAL, _text(digests))


def is_sealed(folder: Path) -> bool:
    """Whether a folder's seal covers the files that Orbax writes late.

    Args:
      folder: of a checkpoint.

    Returns:
      False also if there is no seal, or it cannot be read.
    """
    try:
        return LATE[0] in json.loads(read_bytes(folder / SEAL))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check(folder: Path, parts: Sequence[str] | None = None) -> None:
    """Refuses a folder that has changed since it was sealed.

    Args:
      folder: sealed.
      parts: the folders in it that are checked, besides the files at its top; None: all.

    Raises:
      Damaged: names the first file that is changed, missing or added.
    """
    known = _read(folder)
    for path in folder.rglob("*"):
        if not is_plain(path):
            raise Damaged(f"{path} is {OTHER}")
    for name, digest in known.items():
        if litter.is_litter(PurePath(name)):  # of an older seal
            continue
        if parts is not None and "/" in name and name.partition("/")[0] not in parts:
            continue
        if not _is_below(folder, name):
            raise Damaged(f"{folder / SEAL} is damaged: it names {name!r}, outside of its folder")
        try:
            found = of_file(folder / name)
        except FileNotFoundError:
            raise Damaged(f"{folder / name} is missing") from None
        except OSError as error:
            raise Damaged(f"{folder / name} cannot be read: {error.strerror}") from error
        if found != digest:
            raise Damaged(f"{folder / name} is damaged: it is not what was written")
    for path in litter.without(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in (*known, SEAL, f"{SEAL}.part", *LATE):
            raise Damaged(f"{path} was not written with the rest of {folder}")


def _is_below(folder: Path, name: str) -> bool:
    """Whether a name in a seal is that of a file in the sealed folder."""
    path = PurePath(name)
    if "\0" in name or not path.parts or path.is_absolute() or ".." in path.parts:
        return False
    try:
        return (folder / path).resolve().is_relative_to(folder.resolve())
    except (RuntimeError, OSError):  # a link to itself, or a name that is too long
        return False


def _text(digests: Mapping[str, str]) -> str:
    """The text of a seal."""
    return json.dumps({"files": digests, "digest": of_text(digests)}, indent=1) + "\n"


def _read(folder: Path) -> dict[str, str]:
    """Reads a seal; refuses one that is damaged."""
    path = folder / SEAL
    try:
        content = read_bytes(path)
        digests = dict(json.loads(content)["files"])
        whole = content == _text(digests).encode()  # to the last blank
    except FileNotFoundError:
        raise Damaged(f"{path} is missing: {folder} was not written completely") from None
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise Damaged(f"{path} is damaged: it is not what was written")
    return digests


def first_whole(order: Sequence[int], read: Callable[[int], Any]) -> Any:
    """Reads the first intact checkpoint; says which were damaged.

    Args:
      order: steps, the preferred one first.
      read: takes a step; raises `Damaged`.

    Returns:
      What `read` returns.

    Raises:
      Damaged: none is intact; names what is damaged in the first.
    """
    damage: list[Damaged] = []
    for step in order:
        try:
            found = read(step)
        except Damaged as error:
            damage.append(error)
            continue
        if damage:
            say(f"{damage[0]}; the checkpoint of step {step} is read instead")
        return found
    raise Damaged(
        f"{damage[0]}; no other checkpoint is intact. "
        "Restore the run's folder from a copy, or start a new run"
    ) from damage[0]


def say(text: str) -> None:
    """Prints lines for the user; what they name may be of somebody's folder.

    Args:
      text: the lines.
    """
    print(printable_lines(text), file=sys.stderr, flush=True)
