"""Recurrent layers on batches of sequences of unequal length, padded at the end.

Time leads. `lengths[*batch]` counts the valid steps; padding stays at the end when a sequence is
turned around, and the final carry of a sequence is the one after its last valid step.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree


def flip(tree: PyTree, lengths: Int[Array, "*batch"] | None) -> PyTree:
    """Each sequence backwards, its padding still at the end."""
    if lengths is None:
        return jax.tree.map(lambda x: x[::-1], tree)

    def one(x):
        steps = jnp.arange(x.shape[0] - 1, -1, -1).reshape((-1,) + (1,) * lengths.ndim)
        return _take(x, (steps + lengths) % x.shape[0])

    return jax.tree.map(one, tree)


def at_end(tree: PyTree, lengths: Int[Array, "*batch"]) -> PyTree:
    """What `tree[time, *batch, ...]` holds at the last valid step of each sequence."""
    return jax.tree.map(lambda x: _take(x, lengths[None] - 1)[0], tree)


def solve_padded(
    solve: Callable[[PyTree, bool], tuple[PyTree, Any]],
    xs: PyTree,
    lengths: Int[Array, "*batch"] | None,
    *,
    reverse: bool,
    keep_order: bool,
    return_carry: bool,
) -> tuple[PyTree, PyTree]:
    """`(carry, ys)` of a layer over padded sequences.

    Args:
      solve: `(xs, keep) -> (carry, ys)`, or `(carry, (carries, ys))` if `keep`, where
        `carries` are the states after every step.
      xs: inputs, time first.
      lengths: valid steps of each sequence, or None if all are.
      reverse: read each sequence backwards.
      keep_order: turn the outputs of a reversed reading around again.
      return_carry: whether the carry is wanted: with `lengths` it costs all states.
    """
    xs = flip(xs, lengths) if reverse else xs
    if lengths is not None and return_carry:
        _, (carries, ys) = solve(xs, True)
        carry = at_end(carries, lengths)
    else:
        carry, ys = solve(xs, False)
    return carry, flip(ys, lengths) if reverse and keep_order else ys


def _take(x, index):
    index = index.reshape(index.shape + (1,) * (x.ndim - index.ndim))
    return jnp.take_along_axis(x, index, axis=0)
