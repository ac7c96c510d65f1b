"""Integers with their scales, standing in a parameter tree where a float weight stood."""

import jax

from jaxpara.weights.quant.grid import Grid, Parts, dequantised
from jaxpara.weights.weight import Method, Weight


def part_axes(grid: Grid, ndim: int):
    """The axes of scales and offsets, for `Method.axes`."""
    # They have one axis more: groups and entries of a group stand for the axis -2.
    along = (*range(-ndim, -2), "groups", "entry", "all" if grid.per_tensor else -1)
    return {"scale": along, "offset": along}


def separable(grid: Grid, ndim: int) -> frozenset[int]:
    """Batches, and output channels unless all share one scale."""
    return frozenset(range(-ndim, -2)) | (frozenset() if grid.per_tensor else frozenset({-1}))


def _none(grid: Grid, key, base):
    raise TypeError("integers are made by merging a quantised weight, not attached to one")


def quantised_array(grid: Grid, values: jax.Array, parts: Parts) -> Weight:
    """A weight held as integers.

    Args:
      grid: the grid.
      values: `[.., rows, columns]`, int8.
      parts: `scale`, and `offset` if the grid is affine.

    Returns:
      A weight that stands for `values * scale + offset`.
    """
    method = Method(
        name=f"int{grid.bits}",
        settings=grid,
        init=_none,
        effective=dequantised,
        factors=None,
        axes=part_axes,
        separable=separable,
        freezes=False,
    )
    return Weight(values, parts, method)
