"""Leaves that have tangents and leaves that have none, side by side in one list."""

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero


def differentiable(leaf: Any) -> bool:
    """Whether a leaf (or its shape) has a floating dtype."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def shapes_of(tree: Any) -> Any:
    """Shapes and dtypes of every leaf."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def as_float(leaf):
    """A floating leaf as it is, any other one as floats that hold its bits."""
    if differentiable(leaf):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype.itemsize < 4:
        return leaf.astype(jnp.float32)
    return lax.bitcast_convert_type(leaf, f"float{8 * leaf.dtype.itemsize}")


def as_before(leaf, like):
    """The inverse of `as_float`."""
    if differentiable(like):
        return leaf
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        data = lax.bitcast_convert_type(leaf, jnp.uint32)
        return jax.random.wrap_key_data(data, impl=_key_impl(like))
    if like.dtype.itemsize < 4:
        return leaf.astype(like.dtype)
    return lax.bitcast_convert_type(leaf, like.dtype)


def _key_impl(like):
    """The implementation of a key, of which JAX knows only where it sees an array."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), like)
    return found[0]


def without_zeros(tangents):
    """Tangents with None for those that are known to be zero."""

    def one(tangent):
        zero = isinstance(tangent, SymbolicZero) or tangent.dtype == jax.dtypes.float0
        return None if zero else tangent

    return [one(t) for t in tangents]


def known(leaves: Sequence[Any]) -> list[int]:
    """Positions of the leaves that are not None; None means zero."""
    return [i for i, leaf in enumerate(leaves) if leaf is not None]


def only(leaves: Sequence[Any], chosen: Collection[int]) -> list[Any]:
    """The chosen leaves, and None in place of all others."""
    return [leaf if i in chosen else None for i, leaf in enumerate(leaves)]


def jvp(f, primals, tangents):
    """Tangent of `f(*primals)`; the primals are lists, and None is a zero tangent."""
    leaves, tree = jax.tree.flatten(primals)
    slopes = jax.tree.leaves(tangents, is_leaf=lambda t: t is None)
    moving = [i for i, slope in enumerate(slopes) if slope is not None]

    def moved(values):
        new = list(leaves)
        for i, value in zip(moving, values, strict=True):
            new[i] = value
        return f(*jax.tree.unflatten(tree, new))

    if not moving:
        return jax.tree.map(jnp.zeros_like, f(*primals))
    return jax.jvp(moved, ([leaves[i] for i in moving],), ([slopes[i] for i in moving],))[1]


def floating(trees):
    """Floating leaves of `(consts, xs)`, and a function that puts new ones in their place."""
    leaves, tree = jax.tree.flatten(trees)
    chosen = [i for i, leaf in enumerate(leaves) if differentiable(leaf)]

    def fill(values):
        new = list(leaves)
        for i, value in zip(chosen, values, strict=True):
            new[i] = value
        return jax.tree.unflatten(tree, new)

    first = [leaf for leaf in trees[0] if differentiable(leaf)]
    rest = [leaf for leaf in trees[1] if differentiable(leaf)]
    return (first, rest), fill


def unfill(trees, grads):
    """Gradients of the floating leaves in the shape of `trees`, None elsewhere."""
    leaves, tree = jax.tree.flatten(trees)
    grads = iter(grads)
    rows = [next(grads) if differentiable(leaf) else None for leaf in leaves]
    return jax.tree.unflatten(tree, rows)
