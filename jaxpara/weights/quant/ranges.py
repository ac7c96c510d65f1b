"""Where the grid lies: its scales, and offsets, from the weight itself.

    absmax    [-a, a], a the largest magnitude
    minmax    [least, largest]
    mse       the interval, of twenty that shrink towards its middle, with the least squared error
    absmean   scale = mean |W|, whatever is clipped

A symmetric grid takes the larger end of the interval, an affine one both.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.weights.precision import mean_size, share_of, unfused, unit_of, wide
from jaxpara.weights.quant.grid import (
    Grid,
    Parts,
    blocks,
    dequantised,
    integers,
    limits,
    never_zero,
    shared_axes,
)

RANGES = ("absmax", "minmax", "mse")  # and "absmean", which is for ternary weights


def check_ranges(ranges: str) -> None:
    """Refuses an unknown range.

    Args:
      ranges: a name.

    Raises:
      ValueError: it is not one of `RANGES`.
    """
    if ranges not in RANGES:
        raise ValueError(f"ranges={ranges!r}: expected one of {', '.join(RANGES)}")


def fit(grid: Grid, w: jax.Array, ranges: str) -> Parts:
    """Scales, and offsets if the grid is affine.

    Args:
      grid: the grid.
      w: `[.., rows, columns]`.
      ranges: one of `RANGES`, or "absmean" on a symmetric grid.

    Returns:
      `scale` and perhaps `offset`, `[.., groups, 1, columns]`; scales are never zero.
    """
    w = wide(w)
    whole, axes = blocks(grid, w), shared_axes(grid)
    if ranges == "absmean":
        return {"scale": never_zero(mean_size(whole, axes))}
    if ranges == "minmax" or (ranges == "mse" and grid.affine):
        ends = (jnp.min(whole, axis=axes, keepdims=True), jnp.max(whole, axis=axes, keepdims=True))
    else:
        most = jnp.max(jnp.abs(whole), axis=axes, keepdims=True)
        ends = (-most, most)
    return searched(grid, w, ends, power=2) if ranges == "mse" else between(grid, *ends)


def between(grid: Grid, least: jax.Array, most: jax.Array) -> Parts:
    """The parts of a grid that covers an interval.

    Args:
      grid: the grid.
      least, most: the ends, `[.., groups, 1, columns]`.

    Returns:
      As for `fit`.
    """
    low, high = limits(grid)
    # Products with reciprocals, as in `absmax_scale`.
    if not grid.affine:
        return {"scale": never_zero(jnp.maximum(jnp.abs(least), jnp.abs(most)) * (1 / high))}
    share = share_of(jnp.maximum(jnp.abs(least), jnp.abs(most)))
    least, most = least * share, most * share
    scale = never_zero((most - least) * (1 / (high - low)))
    # Rounded before the difference in every program, as in `weight.dense`.
    return {"scale": scale / share, "offset": (least - unfused(low * scale)) / share}


def searched(grid: Grid, w: jax.Array, ends: tuple[jax.Array, jax.Array], *, power: int) -> Parts:
    """The grid with the least sum of powers of the error, over twenty intervals.

    Args:
      grid: the grid.
      w: the weight.
      ends: of the widest interval.
      power: of the error, even.

    Returns:
      As for `fit`; the widest interval where none is better.
    """
    w = wide(w)
    middle, half = ends[0] / 2 + ends[1] / 2, ends[1] / 2 - ends[0] / 2
    # Powers of errors in units of the interval neither overflow nor vanish.
    unit = unit_of(half)

    def again(i, carry):
        best, least = carry
        share = (1 - 0.04 * i).astype(w.dtype)
        parts = between(grid, middle - share * half, middle + share * half)
        error = blocks(grid, dequantised(grid, integers(grid, w, parts), parts) - w) / unit
        error = jnp.sum(error**power, axis=shared_axes(grid), keepdims=True)
        better = error < least
        best = {name: jnp.where(better, parts[name], best[name]) for name in best}
        return best, jnp.where(better, error, least)

    start = between(grid, *ends)
    worst = jnp.full(start["scale"].shape, jnp.inf, w.dtype)
    return lax.fori_loop(0, 20, again, (start, worst))[0]
