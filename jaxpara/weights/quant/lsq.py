"""Learned step size: the scale of the grid is trained with the weight. [lsq], [lsqplus]

    v = (W - b) / s,   W_q = s round(clip(v, low, high)) + b

    dW_q/dW = 1 inside the grid, 0 outside;   dW_q/ds = round(v) - v inside, low or high outside;
    dW_q/db = 0 inside, 1 outside

"Inside" is `low <= v <= high`, of the value before rounding.
"""

import math

import jax.numpy as jnp
from jax import lax

from jaxpara.tree import Where
from jaxpara.weights.lora import lora
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
from jaxpara.weights.weight import Method, dense


def _init(grid: Grid, key, base):
    w = blocks(grid, dense(base))
    axes, (low, high) = shared_axes(grid), limits(grid)
    if not grid.affine:
        # The paper's start, 2 <|W|> / sqrt(q): it clips the tails.
        mean = jnp.mean(jnp.abs(w), axis=axes, keepdims=True)
        return base, {"scale": never_zero(2 * mean / math.sqrt(high))}
    # Nothing is clipped at the start: low s + b <= W <= high s + b with b = 0.
    least, most = (f(w, axis=axes, keepdims=True) for f in (jnp.min, jnp.max))
    scale = jnp.maximum(jnp.abs(least / low), jnp.abs(most / high))
    return base, {"scale": never_zero(scale), "offset": jnp.zeros_like(scale)}


def _effective(grid: Grid, w, parts):
    low, high = limits(grid)
    scale = never_zero(parts["scale"])
    whole = blocks(grid, w)
    v = (whole - parts["offset"] if grid.affine else whole) / scale
    # where, not clip: a weight on the bound is inside, with the whole gradient.
    clipped = jnp.where(v < low, low, jnp.where(v > high, high, v))
    derivative = clipped * scale + (parts["offset"] if grid.affine else 0)
    # d(s round(c))/ds = round(c), and the rest through c.
    error = lax.stop_gradient(jnp.round(clipped) - clipped) * scale
    smooth = (derivative + error).reshape(w.shape)
    on_grid = dequantised(grid, integers(grid, w, parts), parts)
    # The value is exactly the grid's, the derivative that of the formulas above.
    return lax.stop_gradient(on_grid) + (smooth - lax.stop_gradient(smooth))


def _merge(grid: Grid, w, parts):
    kept = {**parts, "scale": never_zero(parts["scale"])}
    return store(grid, integers(grid, w, parts), kept)


def lsq(
    *,
    bits: int = 4,
    group: int | None = None,
    per_tensor: bool = False,
    affine: bool = False,
    where: Where = None,
) -> Reparam:
    """Trains a weight on an integer grid whose scale, and offset, are trained too.

    Args:
      bits: 2 to 8.
      group: consecutive entries along the contraction axis -2 that share a scale; None: all.
      per_tensor: one scale for both last axes.
      affine: with an offset as well [lsqplus].
      where: the leaves, see `jaxpara.tree.matcher`.

    Returns:
      The reparameterisation; `merge` reproduces the forward pass bit for bit. Gradients of the
      scale are the paper's without its factor `1 / sqrt(numbers * q)`: give the scales a smaller
      learning rate, for example by `optax.multi_transform`.

    Raises:
      ValueError: as for `fake_quant`.

    References: [lsq], [lsqplus].
    """
    method = Method(
        name=f"lsq(bits={bits})",
        settings=make_grid(bits, group, per_tensor, affine),
        init=_init,
        effective=_effective,
        factors=None,
        axes=part_axes,
        separable=separable,
        freezes=False,
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

    `W_q = Q(W + s A B)`: what is merged are the integers that were trained, with nothing left over.
    It is `chain(lora(...), lsq(affine=True, ...))`.

    Args:
      bits, group: of the grid.
      rank, alpha: of the adapters.
      where: the leaves, see `jaxpara.tree.matcher`.

    Returns:
      The reparameterisation.

    Raises:
      ValueError: as for `lora` and `lsq`.

    References: [l4q].
    """
    adapters = lora(rank=rank, alpha=alpha, where=where)
    return chain(adapters, lsq(bits=bits, group=group, affine=True, where=where))
