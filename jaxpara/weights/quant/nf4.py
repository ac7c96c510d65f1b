"""NF4: a weight rounded once to 16 quantiles of a normal distribution. [qlora]

W ~ c level[code]     c the largest magnitude of a block of 64
c ~ step q + mean     if scales are kept in bytes: q of 8 bits, a step for 256 of them
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpara.sizes import needed, whole
from jaxpara.tree import Where
from jaxpara.weights.method import Method, computed
from jaxpara.weights.precision import narrowed, quotient, unfused, unit_of, wide
from jaxpara.weights.quant.array import packed_values, stored_values
from jaxpara.weights.quant.grid import Grid, never_zero
from jaxpara.weights.reparam import Reparam, reparam
from jaxpara.weights.weight import Weight, dense

# Eight of them positive, zero among them.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_CODES = Grid(4)  # how codes of 0 to 15 are packed: the sign is added and taken away again


class _Settings(NamedTuple):
    block: int
    scale_block: int | None
    dtype: str = "float32"


def _in_blocks(settings: _Settings, w):
    """`[.., blocks, block, columns]`, the last block filled up with zeros."""
    *lead, rows, columns = w.shape
    block = min(settings.block, rows)
    fill = -rows % block
    filled = jnp.pad(w, [(0, 0)] * len(lead) + [(0, fill), (0, 0)]) if fill else w
    return filled.reshape(*lead, (rows + fill) // block, block, columns)


def _in_bytes(scale: jax.Array, size: int) -> dict[str, jax.Array]:
    """Scales as bytes; those of one matrix have a mean, `size` of them a step."""
    *lead, blocks, _, columns = scale.shape
    flat = scale.reshape(*lead, blocks * columns)
    unit = unit_of(jnp.max(flat, axis=-1, keepdims=True))
    mean = unit * jnp.mean(flat / unit, axis=-1, keepdims=True)
    size = min(size, blocks * columns)
    fill = [(0, 0)] * len(lead) + [(0, -flat.shape[-1] % size)]
    groups = jnp.pad(flat - mean, fill).reshape(*lead, -1, size)
    step = never_zero(jnp.max(jnp.abs(groups), axis=-1, keepdims=True) / 127)
    q = jnp.clip(jnp.round(quotient(groups, step)), -127, 127).astype(jnp.int8)
    q = q.reshape(*lead, -1)[..., : flat.shape[-1]].reshape(scale.shape)
    return {"scale": q, "step": step[..., 0], "mean": mean[..., 0]}


def _scales(settings: _Settings, parts):
    """`[.., blocks, 1, columns]`, one for each block."""
    scale = parts["scale"]
    if settings.scale_block is not None:
        *lead, blocks, _, columns = scale.shape
        flat = scale.reshape(*lead, blocks * columns)
        size = min(settings.scale_block, flat.shape[-1])
        step = jnp.repeat(parts["step"], size, axis=-1)[..., : flat.shape[-1]]
        # Rounded before the sum in every program, as in `weight.dense`.
        whole = unfused(flat.astype(step.dtype) * step) + parts["mean"][..., None]
        scale = whole.reshape(scale.shape)
    return never_zero(scale)


def _init(settings: _Settings, key, base):
    own = jnp.asarray(dense(base))
    w = wide(own)
    blocks = _in_blocks(settings, w)
    scale = never_zero(jnp.max(jnp.abs(blocks), axis=-2, keepdims=True))
    levels = jnp.asarray(NF4, w.dtype)
    # The nearest level: how many midpoints lie below.
    codes = jnp.searchsorted((levels[1:] + levels[:-1]) / 2, quotient(blocks, scale))
    *lead, rows, columns = w.shape
    codes = codes.reshape(*lead, -1, columns)[..., :rows, :]
    size = settings.scale_block
    parts = {"scale": scale} if size is None else _in_bytes(scale, size)
    kept = packed_values(_CODES, (codes - 8).astype(jnp.int8))
    return kept, parts, _method(settings._replace(dtype=own.dtype.name))


def _effective(settings: _Settings, base, parts):
    scale = _scales(settings, parts)
    codes = stored_values(_CODES, base).astype(jnp.int32) + 8
    values = _in_blocks(settings, jnp.asarray(NF4, scale.dtype)[codes])
    *lead, rows, columns = codes.shape
    whole = (values * scale).reshape(*lead, -1, columns)[..., :rows, :]
    return narrowed(whole, settings.dtype)


def _axes(settings: _Settings, ndim: int):
    lead = tuple(range(-ndim, -2))
    return {"scale": (*lead, "blocks", "entry", -1), "step": (*lead, "steps"), "mean": lead}


def _separable(settings: _Settings, ndim: int):
    # A step is shared by scales of neighbouring columns.
    return frozenset({*range(-ndim, -2), *(() if settings.scale_block else (-1,))})


def _merge(settings: _Settings, base, parts):
    return Weight(base, parts, _method(settings))


def _method(settings: _Settings) -> Method:
    more = "" if settings.scale_block is None else f", scale_block={settings.scale_block}"
    return computed(
        f"nf4(block={settings.block}{more})",
        settings,
        init=_init,
        effective=_effective,
        axes=_axes,
        separable=_separable,
        freezes=True,
        merge=_merge,
    )


def nf4(*, block: int = 64, scale_block: int | None = None, where: Where = None) -> Reparam:
    """Rounds a weight to the 16 levels of NormalFloat, once: `chain(nf4(), lora())` is QLoRA.

    The levels are quantiles of a normal distribution, stretched to the largest magnitude of each
    block. Codes are packed two in a byte where the number of rows is even.

    Args:
      block: consecutive entries along the contraction axis -2 that share a scale, for each output
        channel; the last block may be shorter.
      scale_block: the scales are kept as bytes, less their mean over the matrix, and this many of
        them, row by row of blocks, share a step (double quantisation; the paper has 256 and floats
        of 8 bits, here they are integers); None: the scales are floats.
      where: the leaves: a glob (`*` within a name, `**` across names), a compiled regular
        expression, or a function of (path, leaf); None: floating leaves of two or more axes.

    Returns:
      The reparameterisation; `merge` keeps codes and scales. Without an adapter it trains the
      scales, or their steps and mean.

    Raises:
      ValueError: a block is not positive.

    References: [qlora].
    """
    block, scale_block = needed(block=block), whole(scale_block=scale_block)
    if block < 1 or (scale_block is not None and scale_block < 1):
        raise ValueError(f"block={block}, scale_block={scale_block}: give at least 1")
    return reparam(_method(_Settings(block, scale_block)), where)
