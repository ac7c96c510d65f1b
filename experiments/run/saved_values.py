"""What a checkpoint holds besides arrays: its fields, and what each of them may be.

A sealed record may still be of another program, or somebody's own: it is checked here, once, before
anything uses it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from experiments.run.limits import BIGGEST, shortened
from experiments.run.seals import Damaged

Fits = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < BIGGEST
    return whole or isinstance(value, float)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < BIGGEST


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _list_of(fits: Fits) -> Fits:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _mapping_of(fits: Fits) -> Fits:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _either(*choices: Any) -> Fits:
    return lambda value: value in choices


def _pair(first: Fits, second: Fits) -> Fits:
    return lambda value: (
        isinstance(value, list) and len(value) == 2 and first(value[0]) and second(value[1])
    )


def _fields(rules: Mapping[str, Fits], *, all_of_them: bool) -> Fits:
    def fits(value: Any) -> bool:
        if not isinstance(value, dict) or not set(value) <= set(rules):
            return False
        return (len(value) == len(rules) or not all_of_them) and all(
            rules[name](one) for name, one in value.items()
        )

    return fits


is_digests = _mapping_of(_is_text)
# The fields of `loop.Memory`; a missing one has its default.
_MEMORY: dict[str, Fits] = {
    "losses": _list_of(_is_number),
    "seconds": _is_number,
    "timed": _pair(_is_count, _is_number),
    "enough": _is_flag,
    "others": _mapping_of(_list_of(_is_number)),
}
# By field: whether a value fits, and what was expected. Other fields are the caller's.
FIELDS: dict[str, tuple[Fits, str]] = {
    "key_impl": (_is_text, "the name of a random generator"),
    "best": (_pair(_is_text, _either("min", "max")), 'a column and "min" or "max"'),
    "figures": (lambda v: v is None or _mapping_of(_is_number)(v), "numbers by name, or null"),
    "digests": (
        _fields({"params": is_digests, "rest": is_digests}, all_of_them=True),
        "digests of params and of rest",
    ),
    "data": (lambda v: isinstance(v, dict), "a position in the data"),
    "memory": (_fields(_MEMORY, all_of_them=False), f"values of {', '.join(_MEMORY)}"),
    "frozen": (lambda v: v is None or _is_text(v), "a digest, or null"),
}
SAVED = ("key_impl", "best", "figures", "digests")  # in every checkpoint
CONTINUED = ("data", "memory")  # in one from which training continues


def check(run: Mapping[str, Any], where: str, *, need: tuple[str, ...] = SAVED) -> None:
    """Refuses a record that is not one of ours.

    Args:
      run: as read.
      where: its place, for the message.
      need: fields that must be there.

    Raises:
      Damaged: names the field.
    """
    for name in need:
        if name not in run:
            raise Damaged(f"{where} is damaged: it has no {name}")
    for name, (fits, expected) in FIELDS.items():
        if name in run and not fits(run[name]):
            shown = shortened(repr(run[name]))
            raise Damaged(f"{where} is damaged: {name} is {shown}; expected {expected}")
