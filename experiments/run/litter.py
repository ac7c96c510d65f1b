"""Files that file managers and other systems leave in every folder: they are nobody's data."""

from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import TypeVar

NAMES = frozenset(
    {".ds_store", ".localized", ".directory", "thumbs.db", "ehthumbs.db", "desktop.ini"}
)
APPLE_DOUBLE = "._"  # before the name of the file that they describe

Place = TypeVar("Place", bound=PurePath)


def is_litter(path: PurePath) -> bool:
    """Whether a path is named as what file managers leave.

    Args:
      path: of anything.
    """
    return path.name.startswith(APPLE_DOUBLE) or path.name.lower() in NAMES


def without(paths: Iterable[Place]) -> Iterator[Place]:
    """Leaves out what file managers leave.

    Args:
      paths: of a listing.

    Yields:
      The others, in order.
    """
    return (path for path in paths if not is_litter(path))
