"""The integer grid of a quantised weight, computed in one place by training and by merging.

    integer = clip(round((W - offset) / scale), low, high)      ties to even
    value   = integer * scale + offset

A symmetric grid has no offset and runs from `-q` to `q = 2^(bits-1) - 1`, a full one from
`-q - 1`; an affine grid is full and has an offset.
Scales and offsets are float32, or float64 for float64 weights, and so is all arithmetic with them.
Training multiplies the integers by the scale, deployment keeps both. Both call `integers`, so they
are equal bit for bit on equal input; docs/methods/weights.md says when inputs differ.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from jaxpara.sizes import flag, needed, whole
from jaxpara.weights.precision import quotient, share_of, unfused, wide

Parts = dict[str, jax.Array]


class Grid(NamedTuple):
    """An integer grid.

    Attributes:
      bits: 2 to 8.
      group: consecutive entries along the contraction axis -2 that share a scale; None: all.
      per_tensor: one scale for the last two axes together, instead of one an output channel.
      affine: whether there is an offset.
      full: whether a grid without an offset has the integer `-2^(bits-1)` too.
    """

    bits: int
    group: int | None = None
    per_tensor: bool = False
    affine: bool = False
    full: bool = False


def make_grid(
    bits: int,
    group: int | None,
    per_tensor: bool,
    affine: bool = False,
    full: bool = False,
) -> Grid:
    """A grid whose settings are possible.

    Args:
      bits, group, per_tensor, affine, full: see `Grid`.

    Returns:
      The grid.

    Raises:
      ValueError: a size is not a whole number, a switch no boolean, the bits are not 2 to 8, or
        `group` with `per_tensor`.
    """
    bits, group = needed(bits=bits), whole(group=group)
    per_tensor, affine, full = flag(per_tensor=per_tensor), flag(affine=affine), flag(full=full)
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits}: give 2 to 8")
    if group is not None and group < 1:
        raise ValueError(f"group={group}: give at least 1, or None")
    if per_tensor and group is not None:
        raise ValueError(f"per_tensor=True with group={group}: choose one of them")
    return Grid(bits, group, per_tensor, affine, full)


def limits(grid: Grid) -> tuple[int, int]:
    """The smallest and the largest integer of the grid."""
    q = 2 ** (grid.bits - 1) - 1
    return (-q - 1 if grid.affine or grid.full else -q), q


def check_group(grid: Grid, shape: tuple[int, ...]) -> int:
    """The rows that share a scale.

    Args:
      grid: the grid.
      shape: of a weight.

    Returns:
      Their number.

    Raises:
      ValueError: the group does not divide the rows.
    """
    rows = shape[-2]
    group = rows if grid.group is None else grid.group
    if rows % group:
        divisors = [n for n in range(1, rows + 1) if rows % n == 0]
        raise ValueError(
            f"group={group} does not divide the {rows} rows of a weight of shape {shape}: "
            f"give one of {divisors}, or None"
        )
    return group


def blocks(grid: Grid, w: jax.Array) -> jax.Array:
    """`[.., rows, columns]` as `[.., groups, group, columns]`.

    Args:
      grid: the grid.
      w: a weight; leading axes are batches.

    Returns:
      The weight, reshaped: a scale of `[.., groups, 1, columns]` broadcasts over it.
    """
    group = check_group(grid, w.shape)
    return w.reshape(*w.shape[:-2], w.shape[-2] // group, group, w.shape[-1])


def shared_axes(grid: Grid) -> tuple[int, ...]:
    """The axes of `blocks` over which one scale is shared."""
    return (-3, -2, -1) if grid.per_tensor else (-2,)


def never_zero(scale: jax.Array) -> jax.Array:
    """A scale that one may divide by, whatever an optimiser made of it."""
    tiny = jnp.finfo(scale.dtype).tiny
    return jnp.where(jnp.abs(scale) < tiny, tiny, scale)


def absmax_scale(grid: Grid, w: Float[Array, "*lead rows columns"]) -> Float[Array, "*lead g 1 c"]:
    """The scale at which a symmetric grid clips nothing.

    Args:
      grid: the grid.
      w: the weight; leading axes are batches.

    Returns:
      `[.., groups, 1, columns]`, or `[.., 1, 1, 1]` per tensor; never zero.
    """
    size = jnp.max(jnp.abs(blocks(grid, wide(w))), axis=shared_axes(grid), keepdims=True)
    # XLA divides a single number by a constant as a product with its reciprocal, but not when the
    # division is a program of its own: this is the product everywhere.
    return never_zero(size * (1 / limits(grid)[1]))


def integers(
    grid: Grid,
    w: Float[Array, "*lead rows columns"],
    parts: Parts,
    uniform: Float[Array, "*lead rows columns"] | None = None,
) -> Int8[Array, "*lead rows columns"]:
    """The nearest point of the grid, as an integer; or one of two neighbours, by chance.

    Args:
      grid: the grid.
      w: the weight.
      parts: `scale`, and `offset` if the grid is affine, both `[.., groups, 1, columns]`.
      uniform: random numbers in [0, 1) for stochastic rounding: the upper neighbour is taken with
        the probability of the distance to the lower one.

    Returns:
      Integers within the grid.
    """
    centred = blocks(grid, wide(w))
    if grid.affine:
        centred = centred - wide(parts["offset"])
    steps = quotient(centred, never_zero(wide(parts["scale"])))
    if uniform is None:
        whole_steps = jnp.round(steps)
    else:
        below = jnp.floor(steps)
        whole_steps = below + (blocks(grid, uniform) < steps - below)
    rounded = jnp.clip(whole_steps, *limits(grid))
    return rounded.reshape(w.shape).astype(jnp.int8)


def dequantised(grid: Grid, values: jax.Array, parts: Parts) -> jax.Array:
    """The numbers that integers represent, in the wider of float32 and the dtype of the scale.

    Args:
      grid: the grid.
      values: integers `[.., rows, columns]`.
      parts: as for `integers`.

    Returns:
      `[.., rows, columns]`.
    """
    scale = never_zero(wide(parts["scale"]))
    whole = blocks(grid, values.astype(scale.dtype))
    if not grid.affine:
        return unfused(whole * scale).reshape(values.shape)
    # Rounded before the sum in every program, as in `weight.dense`. Near the end of the range the
    # products do not fit where their sums with the offset do.
    share = share_of(jnp.abs(scale))
    scaled = unfused(whole * (scale * share)) + wide(parts["offset"]) * share
    return unfused(scaled / share).reshape(values.shape)
