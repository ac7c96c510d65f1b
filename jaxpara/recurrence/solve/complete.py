"""Exact completion: steps that a solver's budget left open are done one by one.

One loop over chunks, from the first that any lane redoes, each run step by step from
the exact state before it. With everything converged the loop makes no trip. Lanes
that are already exact keep their rows by a select, and under `vmap` the loop has one
predicate for all lanes (see `lanes`); differentiation never enters it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.recurrence.lanes import min_lane, select, vary_like
from jaxpara.recurrence.solve.sharded_time import Along
from jaxpara.recurrence.system import Leaves, System


def complete(
    system: System,
    rows: Any,
    xs: Any,
    valid: jax.Array | None,
    starts: Leaves,
    done: jax.Array,
    opening: jax.Array,
    axis: Along | None,
    shape: tuple[int, int],
) -> tuple[Any, jax.Array]:
    """Recomputes the chunks from `opening` on unless `done`.

    Args:
      rows: `(states, ys)`, each leaf `[count, length, ...]`.
      xs, valid: as cut by `shooting.cut`, `[length, count, ...]`.
      starts: chunk starts `[count, *leaf]`; those up to `opening` are exact.
      done: whether everything has converged, over all devices.
      opening: the first chunk to redo.
      shape: `(count, length)`.

    Returns:
      The rows and the number of steps that were redone.
    """
    count, length = shape
    if axis is None:
        begin = jnp.where(done, count, opening)
        rows = _redo(system, rows, xs, valid, starts, begin, [s[0] for s in starts], count)[0]
        steps = jnp.maximum(system.length - begin * length, 0)
        return rows, steps.astype(jnp.int32)

    def device(carry):
        rank, state, rows = carry
        entered = [s.at[0].set(i) for s, i in zip(starts, state, strict=True)]
        fresh, end = _redo(system, rows, xs, valid, entered, zero, state, count)
        mine = axis.rank() == rank
        rows = jax.tree.map(lambda a, b: jnp.where(mine & ~done, a, b), fresh, rows)
        state = vary_like(axis.from_rank(end, rank), state)
        return rank + 1, state, rows

    zero = jnp.zeros((), jnp.int32)
    from_device = min_lane(jnp.where(done, axis.size, 0).astype(jnp.int32))
    first = vary_like(axis.from_rank([s[0] for s in starts], 0), starts)
    carry = (from_device, first, rows)
    carry = lax.while_loop(lambda c: c[0] < axis.size, device, carry)
    return carry[2], jnp.where(done, 0, axis.size * system.length).astype(jnp.int32)


def _redo(system: System, rows, xs, valid, starts, begin, state, count):
    """Runs chunks `begin` to `count - 1` one after another; returns rows and last state."""

    def chunk(carry):
        c, state, rows = carry
        start = [lax.dynamic_index_in_dim(s, c, keepdims=False) for s in starts]
        state = select(c <= begin, start, state)
        take = lambda leaf: lax.dynamic_index_in_dim(leaf, c, axis=1, keepdims=False)  # noqa: E731
        inputs = jax.tree.map(take, (xs, valid))

        def step(state, inputs):
            x, present = inputs
            new, ys = system.step(state, x)
            new = new if present is None else select(present, new, state)
            return list(new), (list(new), ys)

        state, fresh = lax.scan(step, state, inputs)
        redo = c >= begin

        def put(row, new):
            old = lax.dynamic_index_in_dim(row, c, keepdims=False)
            return lax.dynamic_update_index_in_dim(row, jnp.where(redo, new, old), c, axis=0)

        return c + 1, state, jax.tree.map(put, rows, fresh)

    first = min_lane(begin)
    carry = (first, vary_like(list(state), starts), (list(rows[0]), rows[1]))
    _, state, rows = lax.while_loop(lambda c: c[0] < count, chunk, carry)
    return rows, state
