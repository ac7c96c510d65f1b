"""Warnings about weights: a method that does not do what it is for, and too many parts."""

import inspect
import math
import os
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpara import compat
from jaxpara.tree import path_of
from jaxpara.weights.matrices import matrices_of
from jaxpara.weights.pools import is_pooled, resolved
from jaxpara.weights.walk import Use
from jaxpara.weights.weight import is_weight, shape_of

# Neither this library's lines nor those of JAX's transforms are the caller's.
_OURS = tuple(
    os.path.dirname(os.path.abspath(file)) + os.sep for file in (compat.__file__, jax.__file__)
)
PASS = "pass attach function= and inputs=, which say what is summed over"


def warn(message: str) -> None:
    """A `UserWarning` at the caller's line outside this library.

    Args:
      message: says the leaf, the method, the reason and what to pass instead.
    """
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def about_uses(uses: Iterable[Use], told: bool) -> list[str]:
    """What methods did not do in the uses of a report.

    Args:
      uses: of the report.
      told: whether the leaves' layouts were given.

    Returns:
      One line for each leaf and method.
    """
    found: dict[tuple[str, str, str], list[str]] = {}
    for use in uses:
        for method, lost in use.lost:
            places = found.setdefault((use.path, method, lost), [])
            if use.primitive not in places:
                places.append(use.primitive)
    advice = "write that use as a product, or narrow where=" if told else PASS
    return [
        f"{path!r}: {method} meets no rule in {', '.join(places)}: {lost}; {advice}"
        for (path, method, lost), places in found.items()
    ]


def about_sizes(state: Any, told: Iterable[str]) -> list[str]:
    """Parts that hold more numbers than their weight.

    Args:
      state: from `attach`.
      told: paths of leaves whose layout was given.

    Returns:
      One line for each leaf and method, and for the pools.
    """
    lines, shared, told = [], 0, frozenset(told)
    pools = state.pools if is_pooled(state) else {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(resolved(state), is_leaf=is_weight):
        if not is_weight(leaf):
            continue
        path = path_of(keys)
        weight, _ = matrices_of(leaf)
        shape = shape_of(weight).shape
        size = math.prod(shape)
        shared += size if _shares(weight) else 0
        while is_weight(weight):
            common = dict(weight.shared)
            own = [part for name, part in weight.parts.items() if name not in common]
            parts = sum(math.prod(jnp.shape(part)) for part in own)
            if parts > size:
                advice = f"give a smaller rank, or {'narrow where=' if path in told else PASS}"
                lines.append(
                    f"{path!r}: {weight.method.name} has {parts:,} numbers for the {size:,} of the "
                    f"weight, as matrices {shape[-2:]} of {shape}; {advice}"
                )
            weight = weight.base
    total = sum(math.prod(jnp.shape(pool)) for pool in pools.values())
    if total > shared > 0:
        lines.append(
            f"pools {', '.join(pools)} have {total:,} numbers for the {shared:,} of their weights; "
            "give a smaller budget"
        )
    return lines


def _shares(weight: Any) -> bool:
    """Whether a weight has parts in a pool."""
    return is_weight(weight) and (bool(weight.shared) or _shares(weight.base))
