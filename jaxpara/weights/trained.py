"""Which parts of a state are trained: a method that freezes does so to the leaves it matched."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpara.weights.pools import Pooled, is_pooled
from jaxpara.weights.weight import Weight, is_weight


def _floating(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


def _freezes(weight: Any) -> bool:
    return is_weight(weight) and (weight.method.freezes or _freezes(weight.base))


def _mask(leaf: Any) -> Any:
    if not is_weight(leaf):
        return _floating(leaf)
    base = _mask(leaf.base)
    if leaf.method.freezes:
        base = jax.tree.map(lambda _: False, base)
    return dataclasses.replace(leaf, base=base, parts=jax.tree.map(_floating, leaf.parts))


def _pools(leaf: Any) -> set[str]:
    if not is_weight(leaf):
        return set()
    below = set() if leaf.method.freezes else _pools(leaf.base)
    return below | {name for _, name in leaf.shared}


def trainable(state: Any) -> Any:
    """The mask of what is trained, for `jp.split`.

    Args:
      state: from `t.attach`.

    Returns:
      Booleans in the structure of the state, true on floating arrays only: of a reparameterised
      leaf the parts that came after the last method which freezes, and the weight itself where
      none does; other leaves where no method of the state freezes.
    """
    params = state.params if is_pooled(state) else state
    leaves = jax.tree.leaves(params, is_leaf=is_weight)
    freezing = any(map(_freezes, leaves))

    def one(leaf):
        return _mask(leaf) if is_weight(leaf) else _floating(leaf) and not freezing

    mask = jax.tree.map(one, params, is_leaf=is_weight)
    if not is_pooled(state):
        return mask
    taken = set().union(*map(_pools, leaves))
    return Pooled(mask, {name: name in taken and _floating(p) for name, p in state.pools.items()})


def trains_itself(mask: Any) -> bool:
    """Whether the array below a weight is marked in its mask."""
    return trains_itself(mask.base) if isinstance(mask, Weight) else bool(mask)
