"""Warnings about weights: a method that does not do what it is for, and too many parts."""

import inspect
import math
import os
import warnings
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

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
MOST = 3  # leaves that a line names besides the first
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


class Notice(NamedTuple):
    """What is to be said of a leaf.

    Attributes:
      path: of the leaf; empty for pools.
      subject: what it is about; leaves with the same one share a line.
      said: of the leaf.
      advice: what to do.
    """

    path: str
    subject: Hashable
    said: str
    advice: str


def about_uses(uses: Iterable[Use], told: bool) -> list[Notice]:
    """What methods did not do in the uses of a report.

    Args:
      uses: of the report.
      told: whether the leaves' layouts were given.

    Returns:
      One for each leaf and method.
    """
    found: dict[tuple[str, str, str], list[str]] = {}
    for use in uses:
        for method, lost in use.lost:
            places = found.setdefault((use.path, method, lost), [])
            if use.primitive not in places:
                places.append(use.primitive)
    advice = "write that use as a product, or narrow where=" if told else PASS
    return [
        Notice(
            path,
            (method, lost, *places),
            f"{path!r}: {method} meets no rule in {', '.join(places)}: {lost}",
            advice,
        )
        for (path, method, lost), places in found.items()
    ]


def about_sizes(state: Any, told: bool, unknown: Collection[str] = ()) -> list[Notice]:
    """Parts that hold more numbers than their weight.

    Args:
      state: from `attach`.
      told: whether the leaves' layouts were given.
      unknown: leaves of which they were asked, and are not known.

    Returns:
      One for each leaf and method, and for the pools.
    """
    found, shared = [], 0
    pools = state.pools if is_pooled(state) else {}
    advice = "give a smaller rank, or narrow where=" + ("" if told else f", or {PASS}")
    layouts = ", or pass layout={{{!r}: jp.weights.Layout(inputs=.., outputs=..)}}"
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
                said = (
                    f"{path!r}: {weight.method.name} has {parts:,} numbers for the {size:,} of the "
                    f"weight, as matrices {shape[-2:]} of {shape}"
                )
                more = layouts.format(path) if path in unknown else ""
                found.append(Notice(path, (weight.method.name, bool(more)), said, advice + more))
            weight = weight.base
    total = sum(math.prod(jnp.shape(pool)) for pool in pools.values())
    if total > shared > 0:
        said = (
            f"pools {', '.join(pools)} have {total:,} numbers for the {shared:,} of their weights"
        )
        found.append(Notice("", "pools", said, "give a smaller budget"))
    return found


def about_layouts(
    method: str, leaves: Mapping[str, Any], unknown: Mapping[str, str]
) -> list[Notice]:
    """Leaves of which it was asked, and is not known, what is summed over.

    Args:
      method: its name.
      leaves: that it selects, by path.
      unknown: why, by path.

    Returns:
      One for each leaf.
    """
    return [
        Notice(
            path,
            method,
            f"{path!r} of shape {jnp.shape(leaf)}: {unknown[path]}; {method} takes axis "
            f"{jnp.ndim(leaf) - 2} as what is summed over",
            f"pass layout={{{path!r}: jp.weights.Layout(inputs=.., outputs=..)}}, or narrow where=",
        )
        for path, leaf in leaves.items()
        if path in unknown
    ]


def lines(*notices: Iterable[Notice]) -> list[str]:
    """What to print: a line for each subject, and for each leaf only what comes first.

    Args:
      *notices: the more important ones first.

    Returns:
      The line of the first leaf; the other leaves of the subject are named behind it.
    """
    groups: dict[tuple[int, Hashable], list[Notice]] = {}
    seen: set[str] = set()
    for kind, some in enumerate(notices):
        some = [one for one in some if one.path not in seen]
        seen.update(one.path for one in some if one.path)
        for one in some:
            groups.setdefault((kind, one.subject), []).append(one)
    found = []
    for first, *more in groups.values():
        others = [repr(path) for path in dict.fromkeys(o.path for o in more) if path != first.path]
        rest = f" and {len(others) - MOST} more" if len(others) > MOST else ""
        also = f" (likewise {', '.join(others[:MOST])}{rest})" if others else ""
        found.append(f"{first.said}{also}; {first.advice}")
    return found


def _shares(weight: Any) -> bool:
    """Whether a weight has parts in a pool."""
    return is_weight(weight) and (bool(weight.shared) or _shares(weight.base))
