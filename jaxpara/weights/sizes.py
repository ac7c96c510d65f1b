"""Sizes that a user gives: Python's integers, or NumPy's."""

import operator
from typing import Any


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
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}: give a whole number, such as 8") from None
