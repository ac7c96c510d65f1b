"""`vmap` of a kernel over sequences: the new axis joins B, since all lanes are independent.

A kernel that is called once for each sequence would leave most of a device idle. Mosaic GPU kernels
have no batching rule at all.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def folded(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run(init, timed, params)` with a batching rule.

    Args:
      run: takes trees of arrays whose last two axes are `[B, D]`; `params` may have one row for
        all. Results have B as their last axis but one, or as the only one.

    Returns:
      The same function; under `vmap` it is called once, with more rows.
    """

    @custom_vmap
    def call(init, timed, params):
        return run(init, timed, params)

    @call.def_vmap
    def _rule(size, batched, init, timed, params):
        rows = jax.tree.leaves(init)[0].shape[-2]

        def join(leaf, has):
            if not has:
                leaf = jnp.broadcast_to(leaf, (size, *leaf.shape))
            leaf = jnp.moveaxis(leaf, 0, -3)
            return leaf.reshape(*leaf.shape[:-3], -1, leaf.shape[-1])

        def join_param(leaf, has):
            if not has and leaf.shape[-2] == 1:
                return leaf
            whole = (*leaf.shape[:-2], rows, leaf.shape[-1])
            return join(jnp.broadcast_to(leaf, whole), has)

        def part(leaf):
            axis = max(leaf.ndim - 2, 0)
            shape = (*leaf.shape[:axis], size, rows, *leaf.shape[axis + 1 :])
            return jnp.moveaxis(leaf.reshape(shape), axis, 0)

        out = call(
            jax.tree.map(join, init, batched[0]),
            jax.tree.map(join, timed, batched[1]),
            jax.tree.map(join_param, params, batched[2]),
        )
        out = jax.tree.map(part, out)
        return out, jax.tree.map(lambda _: True, out)

    return call
