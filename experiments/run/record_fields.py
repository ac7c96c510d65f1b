"""What a run writes into its records, by field; of other fields only the size of numbers counts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.run.fits import (
    Fits,
    is_flag,
    is_number,
    is_text,
    mapping_of,
    one_of,
    or_null,
    pair,
)
from experiments.run.folders import RunError
from experiments.run.limits import BIGGEST, shortened

Field = tuple[Fits, str]
NUMBER: Field = (or_null(is_number), "a number")
ANY: Field = (lambda v: not isinstance(v, int) or abs(v) < BIGGEST, "a number that a float holds")
RESULTS: dict[str, Field] = {
    "status": (is_text, "a text"),
    "judged_by": (pair(is_text, one_of("min", "max")), 'a column and "min" or "max"'),
    "baselines": (mapping_of(or_null(is_number)), "numbers by name"),
    **dict.fromkeys(("steps", "parameters", "memory_bytes", "seconds"), NUMBER),
    **dict.fromkeys(("training_seconds", "tokens_per_second", "compile_seconds"), NUMBER),
    **dict.fromkeys(("model_flops_per_token", "model_flops_per_second"), NUMBER),
}
MACHINE: dict[str, Field] = {
    "git_commit": (or_null(is_text), "a text"),
    "git_dirty": (or_null(is_flag), "true or false"),
}
SETTINGS: dict[str, Field] = {
    "optim.learning_rate": NUMBER,
    "contender": (is_text, "a text"),
}


def check(path: Path, values: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    """Refuses a record with a value that no run writes.

    Args:
      path: of the record.
      values: in it.
      fields: what each may be; others as `ANY`.

    Raises:
      RunError: names the first one, and what was expected.
    """
    for name, value in values.items():
        fits, expected = fields.get(name, ANY)
        if not fits(value):
            shown = shortened(repr(value))
            raise RunError(f"{path} is damaged: {name}={shown}; expected {expected}")
