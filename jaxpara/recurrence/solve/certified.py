"""Which rows of a solve count as solved: the rule of `pallas_kernels.certificate`, on arrays.

Values are `[n, *leaf]`: what should be equal from row to row, how far the next Newton correction
would move them, and the magnitude that the correction is relative to.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.recurrence.lanes import vary_like
from jaxpara.recurrence.system import Leaves, System
from jaxpara.recurrence.wide import narrow
from pallas_kernels import certificate


def _wide(leaf: jax.Array) -> jax.Array:
    # Not by promotion, which 8-bit types have none of.
    return leaf.astype(jnp.float32) if narrow(leaf.dtype) else leaf


def scales(
    peaks: Leaves, ends: Leaves, first: Leaves, window: int = certificate.WINDOW
) -> list[jax.Array]:
    """The magnitude that every element has had lately, `[n, *leaf]`.

    Its peak over the last `window` rows, and no more than `SLACK` times its larger magnitude at the
    last two ends.

    Args:
      peaks: the largest magnitude of every element on its way to each row, `[n, *leaf]`.
      ends: where it arrives, `[n, *leaf]`.
      first: the state before row 0.
      window: rows to look back on at least; less than twice as many and a `_BLOCK` count.
    """

    def one(peak, end, before):
        peak, end, before = (jnp.abs(_wide(v)) for v in (peak, end, before))
        arrived = jnp.concatenate([before[None], end])
        scale = _lately(jnp.concatenate([before[None], jnp.maximum(peak, end)]), window)
        return jnp.minimum(scale[1:], certificate.SLACK * jnp.maximum(arrived[1:], arrived[:-1]))

    return [one(*leaves) for leaves in zip(peaks, ends, first, strict=True)]


# Rows whose peak a long window looks back on as one: a CPU pays for every pass over all rows.
_BLOCK = 8


def _lately(rows: jax.Array, window: int) -> jax.Array:
    """The largest of the last `window` magnitudes, at each row, in parallel."""
    if window < 2 * _BLOCK:
        return _looked_back(rows, window)
    count = rows.shape[0]
    blocks = -(-count // _BLOCK)
    rows = jnp.pad(rows, [(0, blocks * _BLOCK - count)] + [(0, 0)] * (rows.ndim - 1))
    rows = rows.reshape(blocks, _BLOCK, *rows.shape[1:])
    within = [rows[:, 0]]
    for i in range(1, _BLOCK):
        within.append(jnp.maximum(within[-1], rows[:, i]))
    # Magnitudes: zeros are never the largest.
    earlier = jnp.concatenate([jnp.zeros_like(rows[:1, 0]), within[-1][:-1]])
    earlier = _looked_back(earlier, window // _BLOCK)
    # The barrier: a CPU would ask every entry of whatever reads them which row it is of.
    found = lax.optimization_barrier(jnp.stack([jnp.maximum(r, earlier) for r in within], axis=1))
    return found.reshape(blocks * _BLOCK, *rows.shape[2:])[:count]


def _looked_back(rows: jax.Array, window: int) -> jax.Array:
    """The same, a pass over all rows for each doubling of `window`, which is rounded up to one."""
    shift = 1
    while shift < min(window, rows.shape[0]):
        earlier = jnp.concatenate([rows[:1]] * shift + [rows[:-shift]])
        rows, shift = jnp.maximum(rows, earlier), 2 * shift
    return rows


def carrying(states: Leaves, everywhere: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The factor that corrections of these states are multiplied by, see `gaps`.

    `everywhere` is the largest of a number on all devices that share the solve.
    """
    if any(narrow(leaf.dtype) for leaf in states):  # no correction bounds anything there
        return jnp.ones((), jnp.float32)
    sizes = [size.astype(jnp.float32) for size in magnitude(states)]
    largest = everywhere(functools.reduce(jnp.maximum, sizes))
    return jnp.where(largest < certificate.LARGE, certificate.RAISE, 1.0).astype(jnp.float32)


def gaps(ends: Leaves, starts: Leaves, carried: jax.Array) -> list[jax.Array]:
    """How far ends are from the starts that they should equal, times `carried`.

    Both are multiplied before the subtraction: the difference of two normal numbers may be
    subnormal, which a device may flush.
    """
    units = [carried.astype(e.dtype) for e in ends]
    return [u * e - u * s for u, e, s in zip(units, ends, starts, strict=True)]


def lowered(delta: jax.Array, carried: jax.Array) -> jax.Array:
    """A correction as carried, in the unit of the states."""
    return delta * (1 / carried).astype(delta.dtype)


def moved_by(value: jax.Array, delta: jax.Array, carried: jax.Array) -> jax.Array:
    """A value plus a correction as carried; where it stays, itself, with the sign of its zero."""
    unit = carried.astype(value.dtype)
    new = (unit * value + delta) * (1 / unit)
    return jnp.where(new == value, value, new)


def below(delta: jax.Array, relative: float, size: jax.Array, carried: jax.Array) -> jax.Array:
    """Where a correction, as carried, is at most `relative` times `size`, or is nothing."""
    info, unit = jnp.finfo(delta.dtype), carried.astype(delta.dtype)
    allowed = relative * jnp.minimum(unit * size, float(info.max))
    nothing = unit * (certificate.FLOOR / certificate.LEAST * float(info.tiny))
    return jnp.abs(delta) <= jnp.maximum(allowed, nothing)


def tested(
    ends: Leaves,
    starts: Leaves,
    deltas: Leaves,
    scale: Leaves,
    tol: float | None,
    carried: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """What of `starts` counts as solved, see `pallas_kernels.certificate`.

    Args:
      ends, starts: `[n, *leaf]`, what should be equal.
      deltas: the next corrections of the starts, as carried; infinite where one was dropped.
      scale: magnitudes, see `scales`.
      tol: as in `Settings`.
      carried: what `deltas` are times what they correct, see `carrying`.

    Returns:
      `[n]`, which rows have corrections within the limit; and which of those are `exact` as well.
      A NaN is not within it, nor is the other zero, of which no correction tells.
    """
    within = agreeing = jnp.ones(ends[0].shape[0], bool)
    for end, start, delta, size in zip(ends, starts, deltas, scale, strict=True):
        delta, same = _wide(delta), _same(end, start)
        small = (delta == 0) | below(delta, limit(delta.dtype, tol), size, carried)
        small &= jnp.isfinite(size) & jnp.isfinite(delta) & (same | (end != start))
        # One reduction for both, and of floats: a loop without one XLA may take for a small one,
        # which it runs on one thread of a CPU at up to 1.4 times the time.
        code = jnp.where(small, jnp.where(same, 0.0, 1.0), 2.0)
        code = jnp.max(code, axis=tuple(range(1, end.ndim)), initial=0.0)
        within = vary_like(within, code) & (code < 2)
        agreeing = vary_like(agreeing, code) & (code == 0)
    return within, agreeing


def limit(dtype: Any, tol: float | None) -> float:
    """Relative size of a correction that counts, after which it is applied once more.

    `COARSE` ulp; a `tol` is taken at its word where it is larger, or asks for less than `FINE` ulp.
    """
    return certificate.limits(dtype, tol)[1]


def exact(ends: Leaves, starts: Leaves) -> jax.Array:
    """`[n]`, which of the rows `[n, *leaf]` agree bit for bit.

    A NaN agrees with nothing, and the two zeros not with each other: their reciprocals do not.
    """
    every = jnp.ones(ends[0].shape[0], bool)
    for end, start in zip(ends, starts, strict=True):
        same = jnp.all(_same(end, start) & (end == end), axis=tuple(range(1, end.ndim)))
        every = vary_like(every, same) & same
    return every


def residual(ends: Leaves, starts: Leaves) -> jax.Array:
    """The largest distance of `ends` from the `starts` that they should equal; infinite for NaN."""
    worst = jnp.zeros((), jnp.float32)
    for end, start in zip(ends, starts, strict=True):
        difference = jnp.abs(_wide(end) - _wide(start))
        finite = jnp.where(jnp.isnan(difference), jnp.inf, difference)
        worst = jnp.maximum(worst, jnp.max(finite, initial=0.0).astype(jnp.float32))
    return worst


def _same(end: jax.Array, start: jax.Array) -> jax.Array:
    """Where two arrays have the same bits."""
    bits = jnp.dtype(f"uint{8 * end.dtype.itemsize}")
    return lax.bitcast_convert_type(end, bits) == lax.bitcast_convert_type(start, bits)


def beside(
    system: System, states: Leaves, scale: Leaves, number: jax.Array, tol: float | None
) -> tuple[Leaves, ...]:
    """Where the Jacobians of an attempt are taken: at its states, or on both sides of them.

    The derivative of a state that rests on a kink is that of one side, and only one that is done by
    both derivatives at the same states is done: an attempt later a state may have been moved.

    Args:
      system: the recurrence.
      states: `[n, *leaf]`.
      scale: their magnitudes; two to four limits of them are what a state may be off. Elements move
        by different amounts, or a kink where two of them are equal would stay where it is.
      number: of the attempt, in which the sides take turns to be the first, that corrects.
      tol: as in `Settings`.

    Returns:
      The states, or, where the step holds kinks, two variants of them.
    """
    if not system.kinks:
        return (list(states),)
    sizes = [math.prod(state.shape[1:]) for state in states]
    firsts = itertools.accumulate([0, *sizes])

    def one(state, size, first, side):
        share = _spread(first, math.prod(state.shape[1:])).reshape(state.shape[1:])
        moved = side * limit(state.dtype, tol) * (2 + 2 * share) * size
        return state + moved.astype(state.dtype)

    turn = jnp.where(number % 2 == 0, 1.0, -1.0)
    rows = list(zip(states, scale, firsts, strict=False))
    return tuple([one(*row, side) for row in rows] for side in (turn, -turn))


def _spread(first: int, count: int) -> jax.Array:
    """Numbers of `[0, 1)` for indices from `first` on, near ones far apart: golden sections."""
    index = jnp.arange(count, dtype=jnp.uint32) + jnp.uint32(first % 2**32)
    return (index * jnp.uint32(2654435769)).astype(jnp.float32) * 2.0**-32


def magnitude(leaves: Leaves) -> list[jax.Array]:
    """Largest finite magnitude of each leaf, `[]` each."""

    def one(leaf):
        finite = jnp.where(jnp.isfinite(leaf), jnp.abs(leaf), jnp.zeros_like(leaf))
        return jnp.max(finite, initial=0.0)

    return [one(leaf) for leaf in leaves]
