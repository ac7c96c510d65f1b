"""Whether a value that was read is of a type: the words in which tables of fields are written."""

from collections.abc import Callable, Mapping
from typing import Any

from experiments.run.limits import BIGGEST

Fits = Callable[[Any], bool]


def is_text(value: Any) -> bool:
    """A text."""
    return isinstance(value, str)


def is_flag(value: Any) -> bool:
    """True or false."""
    return isinstance(value, bool)


def is_number(value: Any) -> bool:
    """A number that a float holds; also not finite."""
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < BIGGEST
    return whole or isinstance(value, float)


def is_count(value: Any) -> bool:
    """A whole number from zero."""
    return is_number(value) and isinstance(value, int) and value >= 0


def list_of(fits: Fits) -> Fits:
    """A list, perhaps empty, of such values."""
    return lambda value: isinstance(value, list) and all(map(fits, value))


def some(fits: Fits) -> Fits:
    """A list of at least one such value."""
    return lambda value: list_of(fits)(value) and bool(value)


def mapping_of(fits: Fits) -> Fits:
    """A mapping to such values."""
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def one_of(*choices: Any) -> Fits:
    """One of these values."""
    return lambda value: isinstance(value, str) and value in choices


def or_null(fits: Fits) -> Fits:
    """Such a value, or null."""
    return lambda value: value is None or fits(value)


def pair(first: Fits, second: Fits) -> Fits:
    """A list of two such values."""
    return lambda value: (
        isinstance(value, list) and len(value) == 2 and first(value[0]) and second(value[1])
    )


def fields(rules: Mapping[str, Fits], *, all_of_them: bool) -> Fits:
    """A mapping with these keys, or some of them, and no others."""

    def fits(value: Any) -> bool:
        if not isinstance(value, dict) or not set(value) <= set(rules):
            return False
        return (len(value) == len(rules) or not all_of_them) and all(
            rules[name](one) for name, one in value.items()
        )

    return fits
