"""A lock on a run's folder: only one process at a time trains in it.

The lock is the operating system's (`flock`, by the library filelock). It ends with its process, so
a killed run leaves no lock behind.
"""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from experiments.run import trust
from experiments.run.folders import RunError
from experiments.run.plain_files import read_text, regular, write_text

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
LOCK, HOLDER = ".lock", ".lock.json"
# The lock files that this process holds, by folder: the numbers of their disk and of themselves.
_HELD: dict[Path, tuple[int, int]] = {}


class InUse(RunError):
    """Another process holds the folder: nothing may be written to it."""


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Locks a run's folder, which is made if missing; nothing is written if its links lead out.

    Args:
      folder: of the run. One that this process has locked already stays locked.

    Raises:
      InUse: another process holds it; at once.
      RunError: it cannot be written to, or as `trust.check_links`.
    """
    trust.check_links(folder, written=True)
    if folder in _HELD:
        check_ours(folder)
        yield
        return
    lock = FileLock(folder / LOCK)
    try:
        _take(folder, lock)
        try:
            yield
        finally:
            with contextlib.suppress(OSError, RunError):
                check_ours(folder)
                (folder / HOLDER).unlink(missing_ok=True)
    finally:
        if lock.is_locked:  # otherwise what is known of the folder is somebody else's
            _HELD.pop(folder, None)
        lock.release()


def _take(folder: Path, lock: FileLock) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            regular(folder / LOCK)
            lock.acquire(timeout=0)
            _HELD[folder] = _number(folder / LOCK)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"{folder}: its file system has no locks, so nothing keeps other processes out")
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.ctime()}
        write_text(regular(folder / HOLDER), json.dumps(about) + "\n")
    except Timeout:  # an OSError, so before it
        raise InUse(
            f"{folder} is in use{_holder(folder)}, and only one process at a time trains in a "
            "folder: wait for it, stop it, or give another folder"
        ) from None
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written to: {error.strerror}; give another hydra.run.dir"
        ) from error


def in_use(folder: Path) -> bool:
    """Whether another process trains in a folder at this moment.

    Args:
      folder: of a run; nothing is written.
    """
    if folder in _HELD or not (folder / LOCK).is_file():
        return False
    try:
        with FileLock(folder / LOCK).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # no locks, or not ours to open: nobody is kept out
        return False


def unclaim(folder: Path) -> None:
    """Takes the lock's files out of a folder that is to be removed.

    Args:
      folder: which this process holds; the next process makes new ones.
    """
    for name in (LOCK, HOLDER):
        (folder / name).unlink(missing_ok=True)


def _number(path: Path) -> tuple[int, int]:
    known = path.stat()
    return known.st_dev, known.st_ino


def check_ours(folder: Path) -> None:
    """Refuses to write to a folder that is no longer the one that was locked.

    Args:
      folder: of a run; one that this process has not locked passes.

    Raises:
      RunError: it was moved away or replaced.
    """
    try:
        same = folder not in _HELD or _number(folder / LOCK) == _HELD[folder]
    except OSError:
        same = False
    if not same:
        raise RunError(
            f"{folder} was moved, removed or replaced while its run was training: the run stops, "
            "and continues with resume=FOLDER from where it is now"
        )


def _holder(folder: Path) -> str:
    """Names the process that holds it, if that can be read."""
    try:
        about = json.loads(read_text(folder / HOLDER))
        return f" by process {int(about['pid'])} on {about['host']} since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
