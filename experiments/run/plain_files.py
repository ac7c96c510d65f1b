"""Only regular files of a run's folder are opened: a pipe or a device would never end."""

import errno
import stat
from pathlib import Path


def regular(path: Path) -> Path:
    """Refuses what is neither a file nor a folder, before it is opened.

    Args:
      path: of a file, which may be missing.

    Returns:
      The path.

    Raises:
      OSError: it is a pipe, a socket or a device.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return path
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a folder has an error of its own
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, not a file", str(path))
    return path
