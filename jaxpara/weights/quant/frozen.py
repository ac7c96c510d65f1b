"""Weights rounded once and kept as integers: the bases of QLoRA, and post-training quantisation.

The floats are gone after `attach`. What a later member of a chain freezes is not trained; alone,
such a base trains its scales and nothing else, which is PEQA. [qlora], [peqa]
"""

from typing import NamedTuple

import jax.numpy as jnp

from jaxpara.tree import Where
from jaxpara.weights.quant.activations import check_activations
from jaxpara.weights.quant.array import Stored, packed_values, store, stored_method, stored_values
from jaxpara.weights.quant.grid import Grid, check_group, integers, make_grid, never_zero
from jaxpara.weights.quant.ranges import check_ranges, fit
from jaxpara.weights.reparam import Reparam, reparam
from jaxpara.weights.weight import Method, Weight, dense


def _rounded(stored: Stored, key, base):
    w = jnp.asarray(dense(base))
    check_group(stored.grid, w.shape)
    parts = fit(stored.grid, w, stored.ranges or "absmax")
    return packed_values(stored.grid, integers(stored.grid, w, parts)), parts


def _merge_rounded(stored: Stored, base, parts):
    return store(stored.grid, base, parts, stored.activations)


def rtn(
    *,
    bits: int = 4,
    group: int | None = None,
    affine: bool = False,
    ranges: str = "absmax",
    activations: int | None = None,
    where: Where = None,
) -> Reparam:
    """Rounds a weight to the nearest point of an integer grid, once, and keeps the integers.

    Post-training quantisation without data, and an integer base for adapters:
    `chain(rtn(), lora())` is QLoRA on integers. Integers are packed where the rows allow it.

    Args:
      bits, group, affine, ranges, activations: as for `fake_quant`.
      where: the leaves, see `jaxpara.tree.matcher`.

    Returns:
      The reparameterisation; nothing but scales and offsets is left to train.

    Raises:
      ValueError: as for `fake_quant`.

    References: [qlora], [peqa].
    """
    check_ranges(ranges)
    check_activations(activations)
    stored = Stored(make_grid(bits, group, False, affine), activations, ranges)
    return reparam(stored_method(f"rtn(bits={bits})", stored, _rounded, _merge_rounded), where)


# Quantiles of the normal distribution, eight of them positive, zero among them. [qlora]
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


class _Blocks(NamedTuple):
    block: int


def _in_blocks(settings: _Blocks, w):
    """`[.., blocks, block, columns]`, the last block filled up with zeros."""
    *lead, rows, columns = w.shape
    block = min(settings.block, rows)
    fill = -rows % block
    filled = jnp.pad(w, [(0, 0)] * len(lead) + [(0, fill), (0, 0)]) if fill else w
    return filled.reshape(*lead, (rows + fill) // block, block, columns)


def _nf4_init(settings: _Blocks, key, base):
    w = jnp.asarray(dense(base))
    blocks = _in_blocks(settings, w)
    scale = never_zero(jnp.max(jnp.abs(blocks), axis=-2, keepdims=True))
    levels = jnp.asarray(NF4, w.dtype)
    # The nearest level: how many midpoints lie below.
    codes = jnp.searchsorted((levels[1:] + levels[:-1]) / 2, blocks / scale)
    *lead, rows, columns = w.shape
    codes = codes.reshape(*lead, -1, columns)[..., :rows, :]
    return packed_values(_CODES, (codes - 8).astype(jnp.int8)), {"scale": scale}


def _nf4_effective(settings: _Blocks, base, parts):
    codes = stored_values(_CODES, base).astype(jnp.int32) + 8
    values = _in_blocks(settings, jnp.asarray(NF4, parts["scale"].dtype)[codes])
    *lead, rows, columns = codes.shape
    scaled = values * never_zero(parts["scale"])
    return scaled.reshape(*lead, -1, columns)[..., :rows, :]


def _nf4_axes(settings: _Blocks, ndim: int):
    return {"scale": (*range(-ndim, -2), "blocks", "entry", -1)}


def _nf4_separable(settings: _Blocks, ndim: int):
    return frozenset({*range(-ndim, -2), -1})


def _nf4_merge(settings: _Blocks, base, parts):
    return Weight(base, parts, _nf4_method(settings))


def _nf4_method(settings: _Blocks) -> Method:
    return Method(
        name=f"nf4(block={settings.block})",
        settings=settings,
        init=_nf4_init,
        effective=_nf4_effective,
        factors=None,
        axes=_nf4_axes,
        separable=_nf4_separable,
        freezes=True,
        merge=_nf4_merge,
    )


def nf4(*, block: int = 64, where: Where = None) -> Reparam:
    """Rounds a weight to the 16 levels of NormalFloat, once: `chain(nf4(), lora())` is QLoRA.

    The levels are quantiles of a normal distribution, stretched to the largest magnitude of each
    block. Codes are packed two in a byte where the number of rows is even; scales are floats (the
    paper's second quantisation, of the scales, is not made).

    Args:
      block: consecutive entries along the contraction axis -2 that share a scale, for each output
        channel; the last block may be shorter.
      where: the leaves, see `jaxpara.tree.matcher`.

    Returns:
      The reparameterisation; `merge` keeps codes and scales.

    Raises:
      ValueError: the block is not positive.

    References: [qlora].
    """
    if block < 1:
        raise ValueError(f"block={block}: give at least 1")
    return reparam(_nf4_method(_Blocks(block)), where)
