"""What is left of the magnitudes that a state had before: the last word on a gap.

A gap counts by the recent magnitude of its element, since a sum keeps the rounding of its largest
part. A state may fall by much more than rounding, though, into steps that are flat on both sides of
the gap, and these hide it. A gap beyond `SLACK` limits of the state itself therefore counts only
within the limit of what the Jacobians make of earlier magnitudes: `s_t = max(|h_t|, |J_t|
s_{t-1})`. Elements that cross 0 have such gaps as well, here and there: those few rows are looked
at by themselves.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.recurrence.lanes import any_lane, select, vary_like
from jaxpara.recurrence.solve import jacobian_products
from jaxpara.recurrence.solve.certified import beside
from jaxpara.recurrence.solve.sharded_time import Along
from jaxpara.recurrence.system import Leaves, System
from pallas_kernels import certificate

# Rows that are looked at together.
_ROWS = 4


def own(ends: Leaves, starts: Leaves) -> list[jax.Array]:
    """`SLACK` times the larger magnitude, `[n, *leaf]`.

    A gap within the limit of it needs no look at earlier steps.
    """
    pairs = zip(ends, starts, strict=True)
    return [certificate.SLACK * jnp.maximum(jnp.abs(e), jnp.abs(s)) for e, s in pairs]


def unexplained(
    doubtful: jax.Array,
    test: Callable[[jax.Array], jax.Array],
    everywhere: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Which of the doubtful rows `[n]` fail a test of a few rows at a time, given their indices.

    `everywhere` is the largest of a number on all devices that share the solve.
    """
    count = doubtful.shape[0]

    def any_of(flags):
        return everywhere(jnp.any(flags).astype(jnp.float32)) > 0

    def body(carry):
        left, failed, _ = carry
        rows = jnp.nonzero(left, size=_ROWS, fill_value=count)[0]
        good = test(jnp.minimum(rows, count - 1))
        failed = failed.at[rows].max(~good, mode="drop")
        left = left.at[rows].set(False, mode="drop")
        return left, failed, any_of(left)

    none = jnp.zeros_like(doubtful)
    carry = vary_like((doubtful, none, any_of(doubtful)), doubtful)
    return lax.while_loop(lambda carry: any_lane(carry[2]), body, carry)[1]


def travelled(
    system: System,
    before: Leaves,
    states: Leaves,
    rows: jax.Array,
    steps: int,
    tol: float | None,
    axis: Along | None,
) -> list[jax.Array]:
    """What the magnitudes of the last `steps` states have become at `rows`, `[len(rows), *leaf]`.

    At a kink the larger of both sides' Jacobians counts.

    Args:
      system: the recurrence.
      before, states: before and after every (local) step.
      rows: the steps. With time sharded, -1 is the last one of the device before.
      steps: how many to look back on.
      tol: as in `Settings`.
      axis: the mesh axis over which time is sharded.
    """
    groups, steps = system.groups, min(steps, system.length)
    unit = jacobian_products.basis(groups, system.init)
    trajectory, first = (list(before), list(states), system.xs), 0
    if axis is not None:
        tail = jax.tree.map(lambda leaf: leaf[-steps:], trajectory)
        tail = axis.previous(tail, tail)
        trajectory = jax.tree.map(lambda *parts: jnp.concatenate(parts), tail, trajectory)
        rows, first = rows + steps, jnp.where(axis.rank() == 0, steps, 0)

    def matrices(state, x):
        columns = jax.vmap(lambda s, x: system.push(s, x, unit)[1])(state, x)
        gathered = jax.vmap(lambda *c: jacobian_products.gather_columns(groups, c))(*columns)
        return [jnp.abs(m) for m in gathered]

    def moved(matrix, size):
        pushed = jacobian_products.apply(matrix, jacobian_products.to_lanes(groups, size))
        return jacobian_products.from_lanes(groups, pushed, size)

    def step(size, back):
        at = rows - back
        state, new, x = jax.tree.map(lambda leaf: leaf[jnp.maximum(at, 0)], trajectory)
        size = [jnp.maximum(s, jnp.abs(b)) for s, b in zip(size, state, strict=True)]
        # As far as the corrections may have seen: they were moved by the recent magnitude.
        reach = [certificate.SLACK * s for s in size]
        sides = [
            matrices(s, x) for s in beside(system, state, reach, jnp.zeros((), jnp.int32), tol)
        ]
        largest = [functools.reduce(jnp.maximum, of_group) for of_group in zip(*sides, strict=True)]
        arrived = jax.vmap(moved)(largest, size)
        arrived = [jnp.maximum(jnp.abs(n), m) for n, m in zip(new, arrived, strict=True)]
        arrived = [jnp.where(jnp.isnan(a), jnp.inf, a) for a in arrived]
        return select(at >= first, arrived, [jnp.zeros_like(s) for s in size]), None

    start = [jnp.zeros((rows.shape[0], *leaf.shape[1:]), leaf.dtype) for leaf in states]
    start = vary_like(start, before, states, system.xs)
    return lax.scan(step, start, jnp.arange(steps - 1, -1, -1))[0]
