"""EasyQuant: post-training quantisation without data. [easyquant]

outliers   |W| >= n sigma of the layer: kept as they are
the rest   s q with q = clip(round(W / s)), s by descent of E(s) = sum (s q - W)^2
           dE/ds = 2 sum (s q - W) q,   q held constant
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.tree import Where
from jaxpara.weights.quant.array import (
    Stored,
    packed_values,
    part_axes,
    separable,
    stored_effective,
)
from jaxpara.weights.quant.grid import (
    Grid,
    absmax_scale,
    blocks,
    integers,
    make_grid,
    never_zero,
    shared_axes,
)
from jaxpara.weights.reparam import Reparam, reparam
from jaxpara.weights.weight import Method, Weight, dense


class _Settings(NamedTuple):
    grid: Grid
    sigmas: float
    share: float
    steps: int


def descent(grid: Grid, w: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The squared error of a scale, its derivative, and the derivative's.

    Args:
      grid: the grid.
      w: the weight.
      scale: one for each group and column.

    Returns:
      E, dE/ds with the integers held constant, and d2E/ds2, each in the shape of the scale.
    """
    axes, whole = shared_axes(grid), blocks(grid, w)
    q = blocks(grid, integers(grid, w, {"scale": scale}).astype(w.dtype))
    rest = scale * q - whole
    sums = (rest**2, 2 * rest * q, 2 * q**2)
    error, slope, curvature = (jnp.sum(x, axis=axes, keepdims=True) for x in sums)
    return error, slope, curvature


def _outliers(settings: _Settings, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values and rows of the outliers of each column; a slot without one is past the last row."""
    bound = settings.sigmas * jnp.std(w, axis=(-2, -1), keepdims=True)
    slots = math.ceil(settings.share * w.shape[-2])
    sizes, index = lax.top_k(jnp.swapaxes(jnp.abs(w), -1, -2), slots)
    sizes, index = jnp.swapaxes(sizes, -1, -2), jnp.swapaxes(index, -1, -2)
    chosen = sizes >= bound
    values = jnp.where(chosen, jnp.take_along_axis(w, index, axis=-2), 0)
    return values, jnp.where(chosen, index, w.shape[-2])


def _placed(w: jax.Array, values: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.put_along_axis(w, index, values, axis=-2, inplace=False, mode="drop")


def _init(settings: _Settings, key, base):
    w, grid = jnp.asarray(dense(base)), settings.grid
    values, index = _outliers(settings, w)
    rest = _placed(w, jnp.zeros_like(values), index)
    # It begins at rounding to nearest, and takes only what is better.
    best = absmax_scale(grid, w)

    def again(_, carry):
        scale, best, least = carry
        error, slope, curvature = descent(grid, rest, scale)
        best, least = jnp.where(error < least, scale, best), jnp.minimum(error, least)
        # The step length at which descent lands on the minimum for these integers.
        return never_zero(scale - slope / never_zero(curvature)), best, least

    start = absmax_scale(grid, rest), best, descent(grid, rest, best)[0]
    best = lax.fori_loop(0, settings.steps + 1, again, start)[1]
    kept = packed_values(grid, integers(grid, rest, {"scale": best}))
    return kept, {"scale": best, "outliers": values, "rows": index}


def _effective(settings: _Settings, base, parts):
    on_grid = stored_effective(Stored(settings.grid), base, {"scale": parts["scale"]})
    return _placed(on_grid, parts["outliers"], parts["rows"])


def _axes(settings: _Settings, ndim: int):
    along = (*range(-ndim, -2), "slots", -1)
    return {**part_axes(settings.grid, ndim), "outliers": along, "rows": along}


def _separable(settings: _Settings, ndim: int):
    return separable(settings.grid, ndim)


def _merge(settings: _Settings, base, parts):
    return Weight(base, parts, _method(settings))


def _method(settings: _Settings) -> Method:
    return Method(
        name=f"easy_quant(bits={settings.grid.bits})",
        settings=settings,
        init=_init,
        effective=_effective,
        factors=None,
        axes=_axes,
        separable=_separable,
        freezes=True,
        merge=_merge,
    )


def easy_quant(
    *,
    bits: int = 4,
    group: int | None = None,
    sigmas: float = 3.0,
    share: float = 0.01,
    steps: int = 20,
    where: Where = None,
) -> Reparam:
    """Rounds a weight once, without data: outliers stay floats, scales descend the squared error.

    Args:
      bits: 2 to 8, symmetric.
      group: consecutive entries along the contraction axis -2 that share a scale; None: all.
      sigmas: an entry is an outlier from this many standard deviations of the layer on.
      share: at most this share of a column, rounded up, is kept; the largest.
      steps: of descent; each goes to the minimum for the integers that it finds. The best scale
        on the way is taken, so the error is never above that of `rtn`.
      where: the leaves, see `jaxpara.tree.matcher`.

    Returns:
      The reparameterisation; `merge` keeps integers, scales and outliers.

    Raises:
      ValueError: a setting is out of range; when attached: the group does not divide the rows.

    References: [easyquant].
    """
    if not 0 < share <= 1 or sigmas <= 0 or steps < 0:
        raise ValueError(
            f"sigmas={sigmas}, share={share}, steps={steps}: give a positive number of sigmas, a "
            "share in (0, 1] and at least 0 steps"
        )
    grid = make_grid(bits, group, per_tensor=False)
    return reparam(_method(_Settings(grid, float(sigmas), float(share), steps)), where)
