"""Integers with their scales, standing in a parameter tree where a float weight stood."""

import jax

from jaxpara.weights.quant.grid import Grid, dequantised
from jaxpara.weights.weight import Method, Weight


def _effective(grid: Grid, values, parts):
    return dequantised(grid, values, parts["scale"])


def _axes(grid: Grid, ndim: int):
    # The scale has one axis more: groups and entries of a group stand for the axis -2.
    lead = tuple(range(-ndim, -2))
    return {"scale": (*lead, "groups", "entry", "all" if grid.per_tensor else -1)}


def separable(grid: Grid, ndim: int) -> frozenset[int]:
    """Batches, and output channels unless all share one scale."""
    return frozenset(range(-ndim, -2)) | (frozenset() if grid.per_tensor else frozenset({-1}))


def _none(grid: Grid, key, dense):
    raise TypeError("integers are made by merging a quantised weight, not attached to one")


def quantised_array(grid: Grid, values: jax.Array, scale: jax.Array) -> Weight:
    """A weight held as integers.

    Args:
      grid: the grid.
      values: `[.., rows, columns]`, int8.
      scale: `[.., groups, 1, columns]`.

    Returns:
      A weight that stands for `values * scale`.
    """
    method = Method(
        name=f"int{grid.bits}",
        settings=grid,
        init=_none,
        effective=_effective,
        factors=None,
        axes=_axes,
        separable=separable,
        freezes=False,
    )
    return Weight(values, {"scale": scale}, method)
