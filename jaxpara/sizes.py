"""Numbers that a user gives: Python's, or NumPy's; never a boolean, which would count as 1."""

import math
import operator
from typing import Any

import numpy as np


def whole(**size: Any) -> Any:
    """A size as a Python integer, which hashes, prints and multiplies as one.

    Args:
      size: one, by the name that the user knows; None stays None.

    Returns:
      The integer.

    Raises:
      ValueError: it is not a whole number.
    """
    ((name, value),) = size.items()
    if value is None:
        return None
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}: give a whole number, such as 8") from None


def needed(**size: Any) -> int:
    """`whole`, of a size that must be given.

    Args:
      size: one, by the name that the user knows.

    Returns:
      The integer.

    Raises:
      ValueError: it is None, or not a whole number.
    """
    found = whole(**size)
    if found is None:
        raise ValueError(f"{next(iter(size))}=None: give a whole number, such as 8")
    return found


def positive(**sizes: Any) -> None:
    """Refuses sizes that are not whole numbers from 1 on.

    Args:
      sizes: by the names that the user knows.

    Raises:
      ValueError: one is None, not a whole number, or less than 1.
    """
    for name, value in sizes.items():
        if needed(**{name: value}) < 1:
            raise ValueError(f"{name}={value!r}: give a whole number, at least 1")


def flag(**switch: Any) -> bool:
    """A switch as a Python boolean, since any text is true, "no" and "false" among them.

    Args:
      switch: one, by the name that the user knows.

    Returns:
      The boolean.

    Raises:
      ValueError: it is neither True nor False.
    """
    ((name, value),) = switch.items()
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={value!r}: give True or False")
    return bool(value)


def finite(**number: Any) -> float:
    """A number as Python's.

    Args:
      number: one, by the name that the user knows.

    Returns:
      The number.

    Raises:
      ValueError: it is not a number, or is infinite or NaN.
    """
    ((name, value),) = number.items()
    try:
        found = math.nan if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{name}={value!r}: give a finite number, such as 16")
    return found
