"""What a checkpoint holds besides arrays: its fields, and what each of them may be.

A sealed record may still be of another program, or somebody's own: it is checked here, once, before
anything uses it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.run import disk
from experiments.run.fits import (
    Fits,
    fields,
    is_count,
    is_flag,
    is_number,
    is_text,
    list_of,
    mapping_of,
    one_of,
    or_null,
    pair,
    some,
)
from experiments.run.limits import shortened
from experiments.run.seals import Damaged, of_text

is_digests = mapping_of(is_text)
# The fields of `loop.Memory`; a missing one has its default.
_MEMORY: dict[str, Fits] = {
    "losses": list_of(is_number),
    "seconds": is_number,
    "timed": pair(is_count, is_number),
    "enough": is_flag,
    "others": mapping_of(some(is_number)),
}
# By field: whether a value fits, and what was expected. Other fields are the caller's.
FIELDS: dict[str, tuple[Fits, str]] = {
    "key_impl": (is_text, "the name of a random generator"),
    "best": (pair(is_text, one_of("min", "max")), 'a column and "min" or "max"'),
    "figures": (or_null(mapping_of(is_number)), "numbers by name, or null"),
    "digests": (
        fields({"params": is_digests, "rest": is_digests}, all_of_them=True),
        "digests of params and of rest",
    ),
    "data": (lambda v: isinstance(v, dict), "a position in the data"),
    "memory": (fields(_MEMORY, all_of_them=False), f"values of {', '.join(_MEMORY)}"),
    "frozen": (or_null(is_text), "a digest, or null"),
    "settings": (lambda v: isinstance(v, dict), "settings by name"),
}
SAVED = ("key_impl", "best", "figures", "digests")  # in every checkpoint
CONTINUED = ("data", "memory")  # in one from which training continues


def read(path: Path) -> dict[str, Any]:
    """Reads the values that a step was saved with besides arrays.

    Args:
      path: of the step; its files must be checked.

    Returns:
      The values by field.

    Raises:
      Damaged: they are not what was saved, or of another step.
    """
    where = path / "run"
    try:
        run = disk.read_record(path, "run")
        whole = isinstance(run, dict) and run.pop("digest", None) == of_text(run)
    except RecursionError:
        whole = False
    if not whole:
        raise Damaged(f"{where} is damaged: it is not what was saved")
    check(run, str(where))
    if "data" in run:
        check_position(run["data"], int(path.name), str(path))
    return run


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


def check_position(data: Mapping[str, Any], step: int, where: str) -> None:
    """Refuses a position in the data whose numbers are no counts, or that is not of a step.

    Args:
      data: the position, as a source of data gave it.
      step: of the checkpoint; a batch is read for each.
      where: its place, for the message.

    Raises:
      Damaged: names the number.
    """
    for name, value in _numbers({key: one for key, one in data.items() if key != "in"}):
        if not is_count(value) or (name == "next_index" and value != step):
            expected = f"{step}, its step" if name == "next_index" else "a count"
            raise Damaged(f"{where} is damaged: data has {name}={value}; expected {expected}")


def _numbers(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers of plain values, by the last name of each."""
    if isinstance(node, Mapping | list):
        pairs = node.items() if isinstance(node, Mapping) else ((name, one) for one in node)
        for key, child in pairs:
            yield from _numbers(child, str(key))
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield name, node
