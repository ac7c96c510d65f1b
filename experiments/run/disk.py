"""Orbax on this machine's disks: quietly, and under any path."""

import asyncio
import errno
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import args as items

from experiments.run.folders import CONFIG, RunError
from experiments.run.seals import Damaged

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_MEMORY = "RESOURCE_EXHAUSTED"  # in what XLA says
# What a disk, or the server that it is on, refuses.
_GONE = (errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENODEV)
UNWRITABLE = (*NO_ROOM, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, *_GONE)


@contextmanager
def by_plain_name(path: Path) -> Iterator[Path]:
    """Gives the path a name that Orbax and TensorStore take as it is.

    Orbax would take glob characters for patterns; TensorStore refuses bytes that are no text, such
    as of `é` where the system has only ASCII.

    Args:
      path: of a folder.

    Yields:
      The path; or that of a link to it.
    """
    name = str(path.absolute())
    if not set(name) & set("*?[]\\") and not re.search("[\ud800-\udfff]", name):
        yield path.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="jaxpara-") as place:
        link = Path(place) / "folder"
        link.symlink_to(path.absolute(), target_is_directory=True)
        yield link


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what Orbax and TensorStore log about a failure; the error itself is raised once.

    They log it from each of their threads and callbacks, which may speak long after the error was
    raised: after one, it stays quiet.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, call = [logger.level for logger in loggers], asyncio.BaseEventLoop.call_soon_threadsafe
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)

    def call_if_open(loop, callback, *args, **kwargs):
        # TensorStore's threads call back into the event loop that Orbax has closed after the first
        # failure, and print a traceback for each call that it refuses.
        return None if loop.is_closed() else call(loop, callback, *args, **kwargs)

    asyncio.BaseEventLoop.call_soon_threadsafe = call_if_open
    yield
    asyncio.BaseEventLoop.call_soon_threadsafe = call
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


class Unlike(RunError, ValueError):
    """The saved data belongs to another model or optimiser than the one to be read."""


def read_items(path: Path, **what: Any) -> Any:
    """Reads items of a folder that Orbax wrote.

    Args:
      path: of the folder.
      **what: how each item is restored.

    Returns:
      The items by name.

    Raises:
      Unlike: the data on disk has another structure or other shapes.
      Damaged: Orbax cannot read it.
    """
    with (
        quiet(),
        by_plain_name(path) as place,
        ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader,
    ):
        try:
            return reader.restore(place, items.Composite(**what))
        except ValueError as error:
            raise Unlike(
                f"{path} does not fit what {CONFIG} beside it describes, or is damaged: "
                f"{_told(error)};\n"
                f"put back the {CONFIG} that the run started with, or give another run"
            ) from error
        except Exception as error:  # Orbax and TensorStore raise many kinds for bytes of others
            of_this_machine = isinstance(error, OSError) and not isinstance(
                error, FileNotFoundError
            )
            if of_this_machine or isinstance(error, MemoryError) or NO_MEMORY in str(error):
                raise
            raise Damaged(
                f"{path} is damaged: it cannot be read ({type(error).__name__}: {_told(error)})"
            ) from error


def read_record(path: Path, name: str) -> Any:
    """Reads plain values that were saved beside arrays.

    Args:
      path: of the folder.
      name: of the item.

    Returns:
      The values.

    Raises:
      Damaged: Orbax cannot read them.
    """
    try:
        return read_items(path, **{name: items.JsonRestore()})[name]
    except Unlike as error:  # it has no other structure: it was not asked for one
        raise Damaged(f"{path / name} is damaged: {_told(error.__cause__ or error)}") from error


def _told(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def target(like: Any) -> Any:
    """Describes what to restore: shapes, dtypes and places; the default is the first device.

    Args:
      like: a tree of arrays or of their shapes.

    Returns:
      A tree for Orbax.
    """
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or first
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, like)


def reason(error: Exception) -> str:
    """Extracts the operating system's message from an error that a library has wrapped.

    Args:
      error: from Orbax.

    Returns:
      One line.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    code = re.search(r"\[Errno (\d+)\]", str(error))  # of another thread, as text
    if code:
        return os.strerror(int(code[1]))
    return str(error).strip().partition("\n")[0] or type(error).__name__


def remedy(said: str) -> str:
    """Says what to do after a failed write.

    Args:
      said: from `reason`, or of an `OSError`.

    Returns:
      The beginning of a sentence.
    """
    full = any(os.strerror(code) in said for code in NO_ROOM)
    return "Make room there" if full else "Check that it can be written to"
