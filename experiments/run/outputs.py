"""Files that a command is told to write: they are new, which is seen before the work begins."""

import os
from pathlib import Path

from experiments.run.folders import RunError


def new(path: str | Path, *, key: str = "output") -> Path:
    """Refuses a file that is there, or that cannot be made.

    Args:
      path: of a file to write, as given; its folder may be missing, and is not made here.
      key: the setting that names it.

    Returns:
      The path.

    Raises:
      RunError: says what to change.
    """
    target, shown = Path(path), f"{key}={str(path)!r}"
    if os.path.lexists(target):  # a link that leads nowhere, too
        raise RunError(f"{shown} exists: give another name, or remove it first")
    check_writable(target, shown)
    return target


def check_writable(path: Path, shown: str) -> None:
    """Refuses a file that cannot be made where it is to be, whether it is there or not.

    Args:
      path: of the file; its folder may be missing.
      shown: what was given, as `output=FILE`.

    Raises:
      RunError: the nearest folder that exists cannot be written to, or is a file.
    """
    folder = path.absolute().parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise RunError(f"{shown}: nothing can be written to {folder}: give another place")
