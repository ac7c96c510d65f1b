"""Reductions over everything that runs side by side: vmapped lanes and mesh devices.

A `while_loop` whose predicate is batched makes JAX carry a select over the *whole*
loop state, trajectories included. `any_lane` is the identity until it meets a
`vmap`; there it reduces over the mapped axis and returns an unmapped value, so the
loop of a vmapped solve has one predicate for all lanes and each lane freezes only
the few arrays that it must.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from jaxpara.compat import varying_axes


@custom_vmap
def any_lane(flag: jax.Array) -> jax.Array:
    """True if `flag[]` holds in any lane of every enclosing `vmap`."""
    return flag


@any_lane.def_vmap
def _any_lane_vmap(axis_size, in_batched, flag):
    del axis_size, in_batched
    return any_lane(jnp.any(flag, axis=0)), False


@custom_vmap
def min_lane(value: jax.Array) -> jax.Array:
    """The smallest `value[]` over the lanes of every enclosing `vmap`."""
    return value


@min_lane.def_vmap
def _min_lane_vmap(axis_size, in_batched, value):
    del axis_size, in_batched
    # Without lanes the largest number: nothing is left to do.
    most = jnp.iinfo(value.dtype).max
    return min_lane(jnp.min(value, axis=0, initial=most)), False


def vary_over(tree: Any, *axes: str) -> Any:
    """Marks every leaf of `tree` as varying over the mesh axes, if it is not already."""

    def one(leaf):
        missing = tuple(sorted(set(axes) - varying_axes(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(one, tree)


def vary_like(tree: Any, *references: Any) -> Any:
    """Marks `tree` as varying over every mesh axis over which a reference varies.

    Inside `shard_map` a loop carry must enter with the type it leaves with; fresh
    zeros do not vary over the mesh until they are told to.
    """
    return vary_over(tree, *set().union(*map(varying_axes, jax.tree.leaves(references)), ()))


def vary_alike(tree: Any) -> Any | None:
    """Marks every leaf as varying over the mesh axes of all leaves; None if every one does."""
    axes = [set(varying_axes(leaf)) for leaf in jax.tree.leaves(tree)]
    return None if all(one == axes[0] for one in axes) else vary_like(tree, tree)


def shaped(like: Any, shape: Sequence[int], dtype: Any) -> Any:
    """Something to trace with: of this shape and dtype, varying over the mesh as `like` does.

    A shape where nothing varies, else zeros: a shape cannot say over which axes it varies.
    """
    axes = varying_axes(like)
    if not axes:
        return jax.ShapeDtypeStruct(tuple(shape), dtype)
    return vary_over(jnp.zeros(tuple(shape), dtype), *axes)


def select(flag: jax.Array, on_true: Sequence[jax.Array], on_false: Sequence[jax.Array]):
    """`where` over a list of leaves, `flag` aligned with their leading axes."""

    def one(a, b):
        shape = flag.shape + (1,) * (a.ndim - flag.ndim)
        return jnp.where(flag.reshape(shape), a, b)

    return [one(a, b) for a, b in zip(on_true, on_false, strict=True)]
