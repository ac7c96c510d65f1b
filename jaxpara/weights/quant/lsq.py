"""Learned step size: the scale of the grid is trained with the weight. [lsq], [lsqplus]

    v = (W - b) / s,   W_q = s round(clip(v, low, high)) + b

    dW_q/dW = 1 inside the grid, 0 outside;   dW_q/ds = round(v) - v inside, low or high outside;
    dW_q/db = 0 inside, 1 outside

"Inside" is `low <= v <= high`, of the value before rounding.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.tree import Where
from jaxpara.weights.lora import lora
from jaxpara.weights.method import computed
from jaxpara.weights.precision import mean_size, narrowed, quotient, wide
from jaxpara.weights.quant.array import part_axes, separable, store
from jaxpara.weights.quant.grid import (
    Grid,
    blocks,
    dequantised,
    integers,
    limits,
    make_grid,
    never_zero,
    shared_axes,
)
from jaxpara.weights.reparam import Reparam, chain, reparam
from jaxpara.weights.weight import dense, shape_of


def _init(grid: Grid, key, base):
    w = blocks(grid, wide(jnp.asarray(dense(base))))
    axes, (low, high) = shared_axes(grid), limits(grid)
    if not grid.affine:
        # The paper's start, 2 <|W|> / sqrt(q): it clips the tails. All levels are finite numbers.
        scale = mean_size(w, axes) / (math.sqrt(high) / 2)
        most = float(jnp.finfo(shape_of(base).dtype).max) / max(-low, high)
        return base, {"scale": never_zero(jnp.minimum(scale, jnp.asarray(most, scale.dtype)))}
    # Nothing is clipped at the start: low s + b <= W <= high s + b with b = 0.
    least, most = (f(w, axis=axes, keepdims=True) for f in (jnp.min, jnp.max))
    scale = jnp.maximum(jnp.abs(least / low), jnp.abs(most / high))
    return base, {"scale": never_zero(scale), "offset": jnp.zeros_like(scale)}


def _effective(grid: Grid, w, parts):
    low, high = limits(grid)
    still, still_parts = lax.stop_gradient((w, parts))
    whole, scale = blocks(grid, wide(w)), never_zero(wide(parts["scale"]))
    v = lax.stop_gradient(whole)
    v = v - wide(still_parts["offset"]) if grid.affine else v
    v = quotient(v, lax.stop_gradient(scale))
    # A weight on the bound is inside, with the whole gradient.
    inside = (v >= low) & (v <= high)
    slope = jnp.where(inside, jnp.round(v) - v, jnp.where(v < low, low, high))
    terms = [(inside, whole), (slope, scale)]
    if grid.affine:
        terms.append((~inside, wide(parts["offset"])))
    value = dequantised(grid, integers(grid, still, still_parts), still_parts)
    return narrowed(_following(blocks(grid, value), terms).reshape(w.shape), w.dtype)


@jax.custom_jvp
def _following(value, terms):
    """`value`, with the derivative `sum c dp` over the terms `(c, p)`.

    No quotient by a scale is differentiated, so no square of a tiny scale is divided by.
    """
    del terms
    return value


@_following.defjvp
def _(primals, tangents):
    (value, terms), moves = primals, tangents[1]
    moved = [c.astype(value.dtype) * dp for (c, _), (_, dp) in zip(terms, moves, strict=True)]
    return _following(value, terms), sum(moved[1:], moved[0])


def _merge(grid: Grid, w, parts):
    kept = {**parts, "scale": never_zero(wide(parts["scale"]))}
    return store(grid, integers(grid, w, parts), kept, dtype=w.dtype)


def lsq(
    *,
    bits: int = 4,
    group: int | None = None,
    per_tensor: bool = False,
    affine: bool = False,
    full: bool = False,
    where: Where = None,
) -> Reparam:
    """Trains a weight on an integer grid whose scale, and offset, are trained too.

    Args:
      bits: 2 to 8.
      group: consecutive entries along the contraction axis -2 that share a scale; None: all.
      per_tensor: one scale for both last axes.
      affine: with an offset as well [lsqplus].
      full: without an offset, the integers `-2^(bits-1)` to `2^(bits-1) - 1`, as in the paper: at
        2 bits four levels, where a symmetric grid has three. With an offset it is always so.
      where: the leaves: a glob (`*` within a name, `**` across names), a compiled regular
        expression, or a function of (path, leaf); None: floating leaves of two or more axes.

    Returns:
      The reparameterisation; `merge` reproduces the forward pass bit for bit. Gradients of the
      scale are the paper's without its factor `1 / sqrt(numbers * q)`: give the scales a smaller
      learning rate, for example by `optax.multi_transform`.

    Raises:
      ValueError: as for `fake_quant`.

    References: [lsq], [lsqplus].
    """
    grid = make_grid(bits, group, per_tensor, affine, full)
    method = computed(
        f"lsq(bits={grid.bits})",
        grid,
        init=_init,
        effective=_effective,
        axes=part_axes,
        separable=separable,
        merge=_merge,
    )
    return reparam(method, where)


def l4q(
    *,
    bits: int = 4,
    rank: int = 8,
    alpha: float | None = None,
    group: int | None = None,
    where: Where = None,
) -> Reparam:
    """L4Q: adapters inside a quantiser with learned scales and offsets, the base frozen.

    `W_q = Q(W + s A B)`: merging gives the integers that were trained, with nothing left over.
    It is `chain(lora(...), lsq(affine=True, ...))`.

    Args:
      bits, group: of the grid.
      rank, alpha: of the adapters.
      where: the leaves: a glob (`*` within a name, `**` across names), a compiled regular
        expression, or a function of (path, leaf); None: floating leaves of two or more axes.

    Returns:
      The reparameterisation.

    Raises:
      ValueError: as for `lora` and `lsq`.

    References: [l4q].
    """
    adapters = lora(rank=rank, alpha=alpha, where=where)
    return chain(adapters, lsq(bits=bits, group=group, affine=True, where=where))
