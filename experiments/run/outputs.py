"""Files that a command is told to write: they are new, which is seen before the work begins."""

import os
from pathlib import Path

from experiments.run import checkpoints, frozen, records
from experiments.run.folders import CONFIG, ENVIRONMENT, METRICS, SUMMARY, RunError

# Folders of a run in which only it writes.
KEPT = (checkpoints.FOLDER, checkpoints.DAMAGED, frozen.FOLDER, "adapters", records.FOLDER)


def check_not_kept(place: Path) -> None:
    """Refuses a place among what a run keeps, such as its checkpoints: they would count as damaged.

    Args:
      place: to write to, a file or a folder.

    Raises:
      RunError: names the run.
    """
    whole = place.resolve()
    for outer in whole.parents:
        inner = whole.relative_to(outer).parts[0]
        if inner in KEPT and (outer / CONFIG).is_file():
            if any((outer / name).is_file() for name in (ENVIRONMENT, METRICS, SUMMARY)):
                raise RunError(f"{place} is among the {inner} of the run {outer}: give another")


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
    check_not_kept(target)
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
