"""Files of a run's folder: only regular ones are opened, and damaged ones are kept."""

import errno
import os
from pathlib import Path

OTHER = "neither a file nor a folder"


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
