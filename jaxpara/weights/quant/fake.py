"""Fake quantisation: the forward pass sees the grid, the gradient passes straight through. [ste]"""

from jax import lax

from jaxpara.tree import Where
from jaxpara.weights.quant.array import part_axes, quantised_array, separable
from jaxpara.weights.quant.grid import (
    Grid,
    absmax_scale,
    check_group,
    dequantised,
    integers,
    make_grid,
)
from jaxpara.weights.reparam import Reparam, reparam
from jaxpara.weights.weight import Method, shape_of


def _init(grid: Grid, key, base):
    check_group(grid, shape_of(base).shape)
    return base, {}


def _effective(grid: Grid, w, parts):
    scale = {"scale": absmax_scale(grid, w)}
    on_grid = dequantised(grid, integers(grid, w, scale), scale)
    # Straight through: the value is exactly the grid's, the derivative that of the identity.
    return lax.stop_gradient(on_grid) + (w - lax.stop_gradient(w))


def _merge(grid: Grid, w, parts):
    scale = {"scale": absmax_scale(grid, w)}
    return quantised_array(grid, integers(grid, w, scale), scale)


def fake_quant(
    *,
    bits: int = 4,
    group: int | None = None,
    per_tensor: bool = False,
    where: Where = None,
) -> Reparam:
    """Trains a weight as the nearest point of a symmetric integer grid.

    The scale is the largest magnitude over the contraction axis -2, over `q = 2^(bits-1) - 1`, of
    the weight as it is at each step; leading axes are batches. Every floating leaf is trained.

    Args:
      bits: 2 to 8.
      group: consecutive entries along the axis -2 that share a scale; None: the whole axis.
      per_tensor: one scale for both last axes.
      where: the leaves, see `jaxpara.tree.matcher`.

    Returns:
      The reparameterisation; `merge` gives integers and scales that reproduce the forward pass
      bit for bit.

    Raises:
      ValueError: the bits are not 2 to 8, or `group` with `per_tensor`; when attached: the group
        does not divide a leaf's rows.

    References: [ste].
    """
    method = Method(
        name=f"fake_quant(bits={bits})",
        settings=make_grid(bits, group, per_tensor),
        init=_init,
        effective=_effective,
        factors=None,
        axes=part_axes,
        separable=separable,
        freezes=False,
        merge=_merge,
    )
    return reparam(method, where)
