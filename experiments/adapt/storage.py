"""The storage of weights, in bits."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxpara.weights.pools import resolved
from jaxpara.weights.weight import Weight, dense, is_weight

FLOAT_BITS = 32


def stored_bits(leaf: Any, *, merged: bool = False) -> float:
    """Counts the bits that store a weight for deployment without changing its value.

    Integers count the bits of their grid and every other number counts 32. An adapter on integers
    is kept beside them; an adapter on floating numbers is merged into them.

    Args:
      leaf: an array, or a `Weight` of a state; or their shapes.
      merged: whether it comes from `merge`.

    Returns:
      Bits.
    """
    if not is_weight(leaf):
        return _bits_of(leaf)
    method = leaf.method
    if method.merge is not None and not merged:
        return stored_bits(jax.eval_shape(_merged, leaf), merged=True)
    beside = sum(map(_bits_of, jax.tree.leaves(leaf.parts)))
    count = math.prod(jax.eval_shape(dense, leaf).shape)
    if not is_weight(leaf.base) and jnp.issubdtype(leaf.base.dtype, jnp.integer):
        grid = getattr(method.settings, "grid", method.settings)
        # Whether packed or not: they can be packed.
        own = _bits_of(leaf.base) if not hasattr(grid, "bits") else grid.bits * count
        return min(own, _bits_of(leaf.base)) + beside
    whole = FLOAT_BITS * count
    return whole if method.factors is None else min(whole, stored_bits(leaf.base) + beside)


def _bits_of(leaf: Any) -> int:
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.size * (FLOAT_BITS if floating else 8 * leaf.dtype.itemsize)


def _merged(weight: Weight) -> Any:
    assert weight.method.merge is not None
    return weight.method.merge(weight.method.settings, dense(weight.base), weight.parts)


def bits_per_weight(state: Any) -> float:
    """Computes the mean bits over the reparameterised weights of a state.

    Args:
      state: from `t.attach`, or merged; or its shapes.

    Returns:
      Bits for each number of the effective weights; 32 if nothing is reparameterised.
    """
    leaves = jax.tree.leaves(resolved(state), is_leaf=is_weight)
    weights = [leaf for leaf in leaves if is_weight(leaf)]
    count = sum(math.prod(jax.eval_shape(dense, leaf).shape) for leaf in weights)
    return sum(map(stored_bits, weights)) / count if weights else float(FLOAT_BITS)
