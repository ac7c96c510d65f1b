"""Random choices of a reparameterisation: a key goes in, a state with the choices comes out.

Nothing is drawn while a weight is computed. The same state is the same weight at every use, and a
state without a key is deterministic.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import Any

import jax

from jaxpara.tree import path_of
from jaxpara.types import Key
from jaxpara.weights.pools import Pooled, is_pooled
from jaxpara.weights.weight import is_weight, shape_of


def key_of(key: Key, path: str) -> Key:
    """A key for one leaf, by its path."""
    number = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big")
    return jax.random.fold_in(key, number)


def sampled(state: Any, key: Key) -> Any:
    """A state in which every random choice is made.

    Args:
      state: from `t.attach`.
      key: random; each leaf draws from it by its path.

    Returns:
      The state, for one call of a lifted function.
    """
    if is_pooled(state):
        return Pooled(sampled(state.params, key), state.pools)

    def one(weight, own):
        if not is_weight(weight):
            return weight
        method, k_base = weight.method, jax.random.fold_in(own, 0)
        parts = weight.parts
        if method.sample is not None:
            k_parts = jax.random.fold_in(own, 1)
            parts = method.sample(method.settings, k_parts, shape_of(weight).shape, parts)
        return dataclasses.replace(weight, base=one(weight.base, k_base), parts=parts)

    def leaf(keys, weight):
        return one(weight, key_of(key, path_of(keys))) if is_weight(weight) else weight

    return jax.tree_util.tree_map_with_path(leaf, state, is_leaf=is_weight)


def keys_of_layers(key: Key, shape: tuple[int, ...]) -> jax.Array:
    """One key for each matrix of a stack `[.., rows, columns]`."""
    keys = jax.random.split(key, math.prod(shape[:-2]))
    return keys.reshape(*shape[:-2], *keys.shape[1:])  # keys of the older kind are arrays of two


def by_layer(function: Callable[..., Any], keys: jax.Array, w: jax.Array) -> Any:
    """`function(key, matrix)` for each matrix of a stack."""
    for _ in range(w.ndim - 2):
        function = jax.vmap(function)
    return function(keys, w)
