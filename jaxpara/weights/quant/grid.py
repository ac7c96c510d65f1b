"""The integer grid of a quantised weight, computed in one place by training and by merging.

    scale = max |W| / q over the axes that share one,   q = 2^(bits-1) - 1
    integer = clip(round(W / scale), -q, q)             ties to even

Training multiplies the integers by the scale, deployment keeps both: they are equal bit for bit
because both call `integers` on equal input.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8


class Grid(NamedTuple):
    """A symmetric integer grid.

    Attributes:
      bits: 2 to 8.
      group: consecutive entries along the contraction axis -2 that share a scale; None: all.
      per_tensor: one scale for the last two axes together, instead of one an output channel.
    """

    bits: int
    group: int | None
    per_tensor: bool


def largest(grid: Grid) -> int:
    """The largest integer of the grid."""
    return 2 ** (grid.bits - 1) - 1


def _blocks(grid: Grid, w: jax.Array) -> jax.Array:
    """`[.., in, out]` as `[.., groups, group, out]`."""
    rows = w.shape[-2]
    group = rows if grid.group is None else grid.group
    if rows % group:
        divisors = [n for n in range(1, rows + 1) if rows % n == 0]
        raise ValueError(
            f"group={group} does not divide the {rows} rows of a weight of shape {w.shape}: "
            f"give one of {divisors}, or None"
        )
    return w.reshape(*w.shape[:-2], rows // group, group, w.shape[-1])


def absmax_scale(grid: Grid, w: Float[Array, "*lead rows columns"]) -> Float[Array, "*lead g 1 c"]:
    """The scale at which nothing is clipped.

    Args:
      grid: the grid.
      w: the weight; leading axes are batches.

    Returns:
      `[.., groups, 1, columns]`, or `[.., 1, 1, 1]` per tensor; never zero.
    """
    axes = (-3, -2, -1) if grid.per_tensor else (-2,)
    size = jnp.max(jnp.abs(_blocks(grid, w)), axis=axes, keepdims=True)
    # Of a weight of zeros every scale is right; the smallest normal number keeps it finite.
    tiny = jnp.finfo(w.dtype).tiny
    return jnp.maximum(size / largest(grid), tiny)


def integers(
    grid: Grid, w: Float[Array, "*lead rows columns"], scale: jax.Array
) -> Int8[Array, "*lead rows columns"]:
    """The nearest point of the grid, as an integer.

    Args:
      grid: the grid.
      w: the weight.
      scale: as `absmax_scale` gives it.

    Returns:
      Integers within the grid.
    """
    q = largest(grid)
    rounded = jnp.clip(jnp.round(_blocks(grid, w) / scale), -q, q)
    return rounded.reshape(w.shape).astype(jnp.int8)


def dequantised(grid: Grid, values: jax.Array, scale: jax.Array) -> jax.Array:
    """Integers times their scale, in the dtype of the scale.

    Args:
      grid: the grid.
      values: integers `[.., rows, columns]`.
      scale: as `absmax_scale` gives it.

    Returns:
      `[.., rows, columns]`.
    """
    return (_blocks(grid, values.astype(scale.dtype)) * scale).reshape(values.shape)
