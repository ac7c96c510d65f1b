"""LR-QAT: low-rank training on the integer grid itself. [lrqat]

    Phi = downcast(clip(W / s0, low, high))                 frozen, in units of the grid
    W_q = s clip(round(Phi + (alpha / r) A B), low, high)   A, B and s are trained

or, where the downcast is to the integers themselves,

    W_q = s clip(round(Phi) + round((alpha / r) A B), low, high)

Rounding passes gradients straight through, and clipping passes those of integers on the grid.
Merging gives the integers of the forward pass and `s`, with nothing left over.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.sizes import finite, needed
from jaxpara.tree import Where
from jaxpara.weights.method import Method, computed
from jaxpara.weights.precision import narrowed, quotient, unfused, wide, wide_dtype
from jaxpara.weights.quant.array import part_axes, separable, store
from jaxpara.weights.quant.grid import (
    Grid,
    absmax_scale,
    blocks,
    limits,
    make_grid,
    never_zero,
)
from jaxpara.weights.quant.ranges import searched
from jaxpara.weights.reparam import Reparam, reparam
from jaxpara.weights.weight import dense

DOWNCASTS = ("float32", "bfloat16", "fixed8", "int8")


class _Settings(NamedTuple):
    grid: Grid
    rank: int
    scale: float
    downcast: str
    dtype: str = "float32"


def _init(settings: _Settings, key, base):
    grid, own = settings.grid, jnp.asarray(dense(base))
    w = wide(own)
    most = absmax_scale(grid, w) * limits(grid)[1]
    scale = searched(grid, w, (-most, most), power=4)["scale"]
    phi = jnp.clip(quotient(blocks(grid, w), scale), *limits(grid)).reshape(w.shape)
    if settings.downcast == "fixed8":
        # bits before the point, 8 - bits behind it: the largest magnitude is 2^7 - 2^(8 - bits).
        kept = jnp.round(phi * 2 ** (8 - grid.bits)).astype(jnp.int8)
    elif settings.downcast == "int8":
        kept = jnp.round(phi).astype(jnp.int8)
    else:
        kept = narrowed(
            phi.astype(jnp.promote_types(settings.downcast, "float32")), settings.downcast
        )
    *lead, rows, columns = w.shape
    bound = rows**-0.5
    parts = {
        "a": jax.random.uniform(key, (*lead, rows, settings.rank), own.dtype, -bound, bound),
        "b": jnp.zeros((*lead, settings.rank, columns), own.dtype),
        "scale": scale,
    }
    return kept, parts, _method(settings._replace(dtype=own.dtype.name))


def _straight(x):
    """Rounded exactly, with the derivative of the identity."""
    return x + lax.stop_gradient(jnp.round(x) - x)


def _rounded(settings: _Settings, kept, parts):
    """The weight in units of the grid, rounded but not clipped."""
    dtype = wide_dtype(parts["scale"].dtype)
    update = jnp.matmul(wide(parts["a"]), wide(parts["b"]), precision=lax.Precision.HIGHEST)
    # Rounded before the sum in every program, as in `weight.dense`.
    update = unfused(settings.scale * update)
    if settings.downcast == "int8":
        return kept.astype(dtype) + _straight(update)
    unit = 2 ** (8 - settings.grid.bits) if settings.downcast == "fixed8" else 1
    return _straight(kept.astype(dtype) / unit + update)


def _effective(settings: _Settings, kept, parts):
    low, high = limits(settings.grid)
    v = _rounded(settings, kept, parts)
    # where, not clip: what is on the bound is inside, with the whole gradient.
    clipped = jnp.where(v < low, low, jnp.where(v > high, high, v))
    scaled = blocks(settings.grid, clipped) * never_zero(wide(parts["scale"]))
    return narrowed(scaled.reshape(v.shape), settings.dtype)


def _merge(settings: _Settings, kept, parts):
    grid = settings.grid
    values = jnp.clip(_rounded(settings, kept, parts), *limits(grid))
    scale = {"scale": never_zero(wide(parts["scale"]))}
    return store(grid, values.astype(jnp.int8), scale, dtype=settings.dtype)


def _axes(settings: _Settings, ndim: int):
    lead = tuple(range(-ndim, -2))
    adapters = {"a": (*lead, -2, "rank"), "b": (*lead, "rank", -1)}
    return {**part_axes(settings.grid, ndim), **adapters}


def _separable(settings: _Settings, ndim: int):
    return separable(settings.grid, ndim)


def lr_qat(
    *,
    bits: int = 4,
    rank: int = 8,
    alpha: float | None = None,
    group: int | None = None,
    full: bool = False,
    downcast: str = "float32",
    where: Where = None,
) -> Reparam:
    """Trains a low-rank update in units of the integer grid, and the scales.

    Args:
      bits: 2 to 8; with `downcast="fixed8"` 2 to 7.
      rank: of the update.
      alpha: the update is scaled by `alpha / rank`; None means `rank`, so 1.
      group: consecutive entries along the contraction axis -2 that share a scale; None: all.
      full: the integers `-2^(bits-1)` to `2^(bits-1) - 1`, as the authors' code has them, which are
        four at 2 bits; else the symmetric ones, which are three.
      downcast: how the frozen weight is stored: "float32", "bfloat16", "fixed8", a byte with
        `8 - bits` binary places, or "int8", its integers, to which the rounded update is added
        (the authors' `lr_qat_int`).
      where: the leaves: a glob (`*` within a name, `**` across names), a compiled regular
        expression, or a function of (path, leaf); None: floating leaves of two or more axes.

    Returns:
      The reparameterisation; `merge` gives the integers of the forward pass.

    Raises:
      ValueError: a setting is out of range; when attached: the group does not divide the rows.

    References: [lrqat].
    """
    if downcast not in DOWNCASTS:
        raise ValueError(f"downcast={downcast!r}: expected one of {', '.join(DOWNCASTS)}")
    rank = needed(rank=rank)
    if rank < 1:
        raise ValueError(f"rank={rank}: give at least 1")
    scale = (rank if alpha is None else finite(alpha=alpha)) / rank
    grid = make_grid(bits, group, per_tensor=False, full=full)
    if downcast == "fixed8" and grid.bits > 7:
        raise ValueError(f"bits={grid.bits} leave no binary place in a byte: downcast another way")
    return reparam(_method(_Settings(grid, rank, float(scale), downcast)), where)


def _method(settings: _Settings) -> Method:
    return computed(
        f"lr_qat(bits={settings.grid.bits}, rank={settings.rank}, {settings.downcast})",
        settings,
        init=_init,
        effective=_effective,
        axes=_axes,
        separable=_separable,
        freezes=True,
        merge=_merge,
    )
