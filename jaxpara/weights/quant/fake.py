"""Fake quantisation: the forward pass sees the grid, the gradient passes straight through. [ste]"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.tree import Where
from jaxpara.weights.method import computed
from jaxpara.weights.precision import multiplied_as, narrowed, wide_dtype
from jaxpara.weights.quant.activations import (
    NOT_QUANTISED,
    check_activations,
    fake_activations,
)
from jaxpara.weights.quant.array import part_axes, separable, store
from jaxpara.weights.quant.grid import Grid, check_group, dequantised, integers, make_grid
from jaxpara.weights.quant.ranges import check_ranges, fit
from jaxpara.weights.reparam import Reparam, reparam
from jaxpara.weights.sampling import by_layer, keys_of_layers
from jaxpara.weights.weight import dense, shape_of


class _Settings(NamedTuple):
    grid: Grid
    ranges: str
    activations: int | None
    rounding: str = "nearest"


def _init(settings: _Settings, key, base):
    check_group(settings.grid, shape_of(base).shape)
    return base, {}


def _on_grid(settings: _Settings, w, keys=None):
    parts = fit(settings.grid, w, settings.ranges)
    uniform = None if keys is None else by_layer(_uniform, keys, w)
    return integers(settings.grid, w, parts, uniform), parts


def _uniform(key, w):
    return jax.random.uniform(key, w.shape, wide_dtype(w.dtype))


def _sample(settings: _Settings, key, shape: tuple[int, ...], parts):
    return {**parts, "key": keys_of_layers(key, shape)}


def _effective(settings: _Settings, w, parts):
    fixed = lax.stop_gradient(w)
    on_grid = narrowed(
        dequantised(settings.grid, *_on_grid(settings, fixed, parts.get("key"))), w.dtype
    )
    # Straight through: the value is exactly the grid's, the derivative that of the identity.
    return on_grid + (w - fixed)


def _merge(settings: _Settings, w, parts):
    return store(settings.grid, *_on_grid(settings, w), settings.activations, dtype=w.dtype)


def _axes(settings: _Settings, ndim: int):
    return {**part_axes(settings.grid, ndim), "key": tuple(range(-ndim, -2))}


def _separable(settings: _Settings, ndim: int):
    every = separable(settings.grid, ndim)
    return every if settings.rounding == "nearest" else every - {-1}


def _product(settings: _Settings, x, base, parts, cast, **options):
    bits = settings.activations
    assert bits is not None

    @jax.checkpoint
    def run(x, base, parts):
        w = cast(_effective(settings, dense(base), parts))
        groups = len(w) // check_group(settings.grid, w.shape)
        x = x.astype(multiplied_as(x.dtype, w.dtype))
        return jnp.matmul(fake_activations(x, bits, groups), w, **options)

    return run(x, base, parts)


def fake(
    name: str,
    grid: Grid,
    ranges: str,
    activations: int | None,
    where: Where,
    *,
    rounding: str = "nearest",
) -> Reparam:
    """Fake quantisation on any grid.

    Args:
      name: for reports.
      grid, ranges: of the weight.
      activations: bits of what it is multiplied with, or None.
      where: the leaves.
      rounding: "nearest" or "stochastic".

    Returns:
      The reparameterisation.
    """
    method = computed(
        name,
        _Settings(grid, ranges, activations, rounding),
        init=_init,
        effective=_effective,
        axes=_axes,
        separable=_separable,
        merge=_merge,
        product=None if activations is None else _product,
        sample=_sample if rounding == "stochastic" else None,
        beyond="" if activations is None else NOT_QUANTISED,
    )
    return reparam(method, where)


def fake_quant(
    *,
    bits: int = 4,
    group: int | None = None,
    per_tensor: bool = False,
    affine: bool = False,
    ranges: str = "absmax",
    activations: int | None = None,
    rounding: str = "nearest",
    where: Where = None,
) -> Reparam:
    """Trains a weight as the nearest point of an integer grid.

    The grid follows the current weight at each step. There is one scale over the contraction axis
    -2 for each output channel; leading axes are batches. Every floating leaf is trained.

    Args:
      bits: 2 to 8.
      group: consecutive entries along the axis -2 that share a scale; None: the whole axis.
      per_tensor: one scale for both last axes.
      affine: a grid with an offset, of all `2^bits` integers; else a symmetric one with
        `2^bits - 1`.
      ranges: what the grid covers: "absmax", from minus to plus the largest magnitude; "minmax",
        from the least to the largest entry; "mse", of twenty that shrink from there (from absmax
        where the grid is symmetric) the one with the least squared error.
      activations: bits of a symmetric grid for what the weight is multiplied with, one scale a row
        and group, taken from it as it comes. It acts where a matmul contracts the axis -2 of the
        weight, which `report` calls "rule"; elsewhere only the weight is quantised.
      rounding: "nearest"; or "stochastic", to one of the two neighbours, so that the mean is the
        weight, where a call is given a key (see `t.sample`). Without one, and in `merge`, the
        nearest is taken.
      where: the leaves: a glob (`*` within a name, `**` across names), a compiled regular
        expression, or a function of (path, leaf); None: floating leaves of two or more axes.

    Returns:
      The reparameterisation; `merge` gives integers and scales that reproduce the forward pass
      bit for bit.

    Raises:
      ValueError: bits or ranges are out of range, or `group` with `per_tensor`; when attached: the
        group does not divide a leaf's rows.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxpara as jp
      >>> t = jp.fake_quant(bits=2)
      >>> state = t.attach(jax.random.key(0), {"w": jnp.array([[1.0], [0.2], [-0.7]])})
      >>> t.effective(state)["w"].ravel().tolist()
      [1.0, 0.0, -1.0]
      >>> merged = t.merge(state)["w"]  # integers and a scale
      >>> jp.lift(lambda p, x: x @ p["w"])({"w": merged}, jnp.ones((1, 3))).tolist()
      [[0.0]]

    References: [ste], [flexq].
    """
    check_ranges(ranges)
    activations = check_activations(activations)
    more = "" if activations is None else f", activations={activations}"
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding={rounding!r}: give 'nearest' or 'stochastic'")
    grid = make_grid(bits, group, per_tensor, affine)
    name = f"fake_quant(bits={grid.bits}{more})"
    return fake(name, grid, ranges, activations, where, rounding=rounding)


def ternary(*, group: int | None = None, where: Where = None) -> Reparam:
    """Trains a weight as -1, 0 or 1 times the mean magnitude, as BitNet and BitCPM do.

    `W_q = s clip(round(W / s), -1, 1)` with `s = mean |W|`; the gradient passes straight through.

    Args:
      group: consecutive entries along the contraction axis -2 that share a scale, one for each
        output channel; None: one scale for both last axes, as in BitNet.
      where: the leaves: a glob (`*` within a name, `**` across names), a compiled regular
        expression, or a function of (path, leaf); None: floating leaves of two or more axes.

    Returns:
      The reparameterisation; `merge` gives integers of two bits with scales.

    Raises:
      ValueError: when attached: the group does not divide a leaf's rows.

    References: [bitnet158], [minicpm4].
    """
    grid = make_grid(2, group, per_tensor=group is None)
    return fake("ternary", grid, "absmean", None, where)
