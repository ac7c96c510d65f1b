"""EasyQuant: post-training quantisation without data. [easyquant]

outliers   |W| >= n sigma of the layer: kept as they are, at most so many of a column or of a layer
the rest   s q with q = clip(round(W / s)), s by descent of E(s) = sum (s q - W)^2
           dE/ds = 2 sum (s q - W) q,   q held constant
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.sizes import finite, needed
from jaxpara.tree import Where
from jaxpara.weights.method import Method, computed
from jaxpara.weights.precision import unit_of, wide
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
    limits,
    make_grid,
    never_zero,
    shared_axes,
)
from jaxpara.weights.reparam import Reparam, reparam
from jaxpara.weights.weight import Weight, dense


class _Settings(NamedTuple):
    grid: Grid
    sigmas: float
    share: float
    steps: int
    by: str
    dtype: str = "float32"


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


def _columns(settings: _Settings, w: jax.Array) -> jax.Array:
    """A weight as the columns of which outliers are chosen: its own, or one for each matrix."""
    return w if settings.by == "column" else w.reshape(*w.shape[:-2], -1, 1)


def _outliers(settings: _Settings, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values and places of the outliers of each column; a slot without one is past the last row."""
    unit = unit_of(jnp.max(jnp.abs(w), axis=(-2, -1), keepdims=True))
    bound = settings.sigmas * unit * jnp.std(w / unit, axis=(-2, -1), keepdims=True)
    w = _columns(settings, w)
    slots = math.ceil(settings.share * w.shape[-2])
    sizes, index = lax.top_k(jnp.swapaxes(jnp.abs(w), -1, -2), slots)
    sizes, index = jnp.swapaxes(sizes, -1, -2), jnp.swapaxes(index, -1, -2)
    # A matrix of zeros has no outlier.
    chosen = (sizes >= bound) & (sizes > 0)
    values = jnp.where(chosen, jnp.take_along_axis(w, index, axis=-2), 0)
    return values, jnp.where(chosen, index, w.shape[-2])


def _placed(settings: _Settings, w: jax.Array, values: jax.Array, index: jax.Array) -> jax.Array:
    columns, options = _columns(settings, w), {"inplace": False, "mode": "drop"}
    return jnp.put_along_axis(columns, index, values, axis=-2, **options).reshape(w.shape)


def _init(settings: _Settings, key, base):
    own, grid = jnp.asarray(dense(base)), settings.grid
    w = wide(own)
    values, index = _outliers(settings, w)
    # Powers of two for units: squares of what is left neither overflow nor vanish.
    unit = unit_of(absmax_scale(grid, w))
    w = (blocks(grid, w) / unit).reshape(w.shape)
    rest = _placed(settings, w, jnp.zeros_like(values), index)
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
    # A scale that descent has made larger than the largest entry asks for: all levels are finite.
    most = float(jnp.finfo(own.dtype).max) / limits(grid)[1]
    scale = jnp.minimum(best * unit, jnp.asarray(most, w.dtype))
    parts = {"scale": scale, "outliers": values.astype(own.dtype), "rows": index}
    return kept, parts, _method(settings._replace(dtype=own.dtype.name))


def _effective(settings: _Settings, base, parts):
    stored = Stored(settings.grid, dtype=settings.dtype)
    on_grid = stored_effective(stored, base, {"scale": parts["scale"]})
    return _placed(settings, on_grid, parts["outliers"], parts["rows"])


def _axes(settings: _Settings, ndim: int):
    along = (*range(-ndim, -2), "slots", -1 if settings.by == "column" else "one")
    return {**part_axes(settings.grid, ndim), "outliers": along, "rows": along}


def _separable(settings: _Settings, ndim: int):
    every = separable(settings.grid, ndim)
    return every if settings.by == "column" else every - {-1}


def _merge(settings: _Settings, base, parts):
    return Weight(base, parts, _method(settings))


def _method(settings: _Settings) -> Method:
    return computed(
        f"easy_quant(bits={settings.grid.bits})",
        settings,
        init=_init,
        effective=_effective,
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
    by: str = "column",
    steps: int = 20,
    where: Where = None,
) -> Reparam:
    """Rounds a weight once, without data: outliers stay floats, scales descend the squared error.

    Args:
      bits: 2 to 8, symmetric.
      group: consecutive entries along the contraction axis -2 that share a scale; None: all.
      sigmas: an entry is an outlier from this many standard deviations of the layer on.
      share: at most this share of a column or layer, rounded up, is kept; the largest.
      by: "column", so that columns can be sliced and each has room for outliers; or "layer", as
        published: wherever in the matrix the outliers are.
      steps: of descent; each goes to the minimum for the integers that it finds. The best scale
        on the way is taken, so the error is never above that of `rtn`.
      where: the leaves: a glob (`*` within a name, `**` across names), a compiled regular
        expression, or a function of (path, leaf); None: floating leaves of two or more axes.

    Returns:
      The reparameterisation; `merge` keeps integers, scales and outliers.

    Raises:
      ValueError: a setting is out of range; when attached: the group does not divide the rows.

    References: [easyquant].
    """
    if by not in ("column", "layer"):
        raise ValueError(f"by={by!r}: give 'column' or 'layer'")
    steps, sigmas, share = needed(steps=steps), finite(sigmas=sigmas), finite(share=share)
    if not 0 < share <= 1 or sigmas <= 0 or steps < 0:
        raise ValueError(
            f"sigmas={sigmas}, share={share}, steps={steps}: give a positive number of sigmas, a "
            "share in (0, 1] and at least 0 steps"
        )
    grid = make_grid(bits, group, per_tensor=False)
    return reparam(_method(_Settings(grid, sigmas, share, steps, by)), where)
