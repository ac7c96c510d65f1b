"""A matmul with integer weights in one Mosaic TPU kernel: only the bytes are read from memory.

A block of weights is unpacked, converted and multiplied in VMEM; the scale of its group is applied
to the product of the block, in float32. Two integers of a byte lie half of the rows apart, so
a block of bytes is two blocks of consecutive rows, each with its own block of `x`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantised_dot.packing import refusal
from pallas_kernels.quantised_dot.reference import wide, with_offset
from pallas_kernels.tiles import widest


def quantised_dot(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    offset: jax.Array | None = None,
    *,
    bits: int,
    precision: Any = None,
    interpret: Any = False,
) -> jax.Array:
    """`x @ (values * scale + offset)`; float32 operands are multiplied at the highest precision.

    Args:
      x, values, scale, offset, bits: as for `reference.quantised_dot`.
      precision: not used; it is there for the sake of `reference.quantised_dot`.
      interpret: as for `pl.pallas_call`.

    Returns:
      `[m, columns]`, float32.

    Raises:
      NotImplementedError: `x` is neither float32 nor bfloat16, integers are packed otherwise than
        two in a byte, or the sizes are no multiples of 128.
    """
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"x of {x.dtype}: this kernel takes float32 and bfloat16")
    packed = values.dtype == jnp.uint8
    reason = refusal(values.shape, groups=scale.shape[0], packed=packed, bits=bits)
    if reason:
        raise NotImplementedError(reason)
    halves = 2 if packed else 1
    (m, rows), columns = x.shape, values.shape[1]
    group, span = rows // scale.shape[0], rows // halves
    deep = _largest((512, 256, 128), group, span)
    across = _largest((512, 256, 128), columns)
    # 16 rows of bfloat16 share a tile.
    tall = min(256, -(-m // 16) * 16)
    padded = jnp.pad(x, ((0, -m % tall), (0, 0)))
    steps = span // deep

    def operand(half):
        return pl.BlockSpec((tall, deep), lambda i, j, k: (i, k + half * steps))

    def scales(half):
        first = half * span
        # A third axis: blocks of one row are not allowed on the last two.
        return pl.BlockSpec((1, 1, across), lambda i, j, k: ((first + k * deep) // group, 0, j))

    spread = wide(scale, columns).astype(jnp.float32)[:, None]
    out = pl.pallas_call(
        functools.partial(_kernel, halves),
        grid=(padded.shape[0] // tall, columns // across, steps),
        in_specs=[operand(half) for half in range(halves)]
        + [pl.BlockSpec((deep, across), lambda i, j, k: (k, j))]
        + [scales(half) for half in range(halves)],
        out_specs=pl.BlockSpec((tall, across), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct(
            (padded.shape[0], columns),
            jnp.float32,
            manual_axis_type=widest([padded, jnp.asarray(values), spread]),
        ),
        scratch_shapes=[pltpu.VMEM((tall, across), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="quantised_dot",
    )(
        *[padded] * halves,
        lax.bitcast_convert_type(values, jnp.int8),
        *[spread] * halves,
    )
    return with_offset(out[:m], x, offset)


def _largest(sizes: tuple[int, ...], *lengths: int) -> int:
    """The largest size that divides all lengths; the last one always does."""
    return next(size for size in sizes if all(length % size == 0 for length in lengths))


def _kernel(halves: int, *refs: Any) -> None:
    xs, bytes_, scales = refs[:halves], refs[halves], refs[halves + 1 : 2 * halves + 1]
    out, total = refs[-2:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    # Shifts are made on 32 bits; the second takes the sign along.
    word = bytes_[...].astype(jnp.int32)
    for half in range(halves):
        value = word if halves == 1 else (word << (28 - 4 * half)) >> 28
        x = xs[half][...]
        product = jnp.dot(
            x,
            value.astype(jnp.float32).astype(x.dtype),
            precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        total[...] += product * scales[half][0]

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        out[...] = total[...]
