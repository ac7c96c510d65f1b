"""A matmul with integer weights in one Mosaic GPU kernel for Hopper: only bytes are read.

A warpgroup owns a tile of the result. Blocks of bytes are copied to shared memory a step ahead,
converted in registers, written back as a block of `x`'s dtype, and multiplied on the tensor cores;
the scale of the block's group is applied to the product, in float32. Two integers of a byte
lie half of the rows apart: a block of bytes is two blocks of weights with two blocks of `x`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.compat import mosaic_gpu
from pallas_kernels.quantised_dot.packing import refusal
from pallas_kernels.quantised_dot.reference import wide, with_offset

# Rows of the result, columns of it, and rows of the weight in a step.
_TALL, _ACROSS, _DEEP = 64, 128, 128
# Rows that are converted at a time: what their registers hold beside the two sums.
_SLAB = 64


def quantised_dot(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    offset: jax.Array | None = None,
    *,
    bits: int,
    precision: Any = None,
    interpret: Any = None,
) -> jax.Array:
    """`x @ (values * scale + offset)`.

    Args:
      x, values, scale, offset, bits: as for `reference.quantised_dot`.
      precision: not used; it is there for the sake of `reference.quantised_dot`.
      interpret: None, or the parameters of Mosaic GPU's simulator.

    Returns:
      `[m, columns]`, float32.

    Raises:
      NotImplementedError: `x` is neither bfloat16 nor float16, integers are packed otherwise than
        two in a byte, the sizes are no multiples of 128, or JAX is older than 0.11.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"x of {x.dtype}: tensor cores take bfloat16 and float16")
    packed = values.dtype == jnp.uint8
    reason = refusal(values.shape, groups=scale.shape[0], packed=packed, bits=bits)
    if reason:
        raise NotImplementedError(reason)
    halves = 2 if packed else 1
    (m, rows), columns = x.shape, values.shape[1]
    group, span = rows // scale.shape[0], rows // halves
    padded = jnp.pad(x, ((0, -m % _TALL), (0, 0)))
    gpu = mosaic_gpu()

    def tiles(size):  # of numbers of that many bytes, as tensor cores and the copy engine like it
        return gpu.TilingTransform((8, 128 // size)), gpu.SwizzleTransform(128)

    out = gpu.kernel(
        functools.partial(_kernel, gpu, halves, span // _DEEP, group, tiles(2)),
        out_type=jax.ShapeDtypeStruct((padded.shape[0], columns), jnp.float32),
        scratch_types=[
            gpu.SMEM((_DEEP, _ACROSS), x.dtype, transforms=tiles(2)),
            gpu.SMEM((_TALL, _ACROSS), jnp.float32, transforms=tiles(4)),
        ],
        grid=(columns // _ACROSS, padded.shape[0] // _TALL),
        grid_names=("columns", "rows"),
        compiler_params=gpu.CompilerParams(lowering_semantics=gpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(
        padded,
        lax.bitcast_convert_type(values, jnp.int8),
        wide(scale, columns).astype(jnp.float32),
    )
    return with_offset(out[:m], x, offset)


def _kernel(gpu, halves, steps, group, tiles, x, values, scale, out, converted, result):
    i, j = lax.axis_index("rows"), lax.axis_index("columns")

    def step(index, *refs):
        xs, bytes_, scales, total = refs[:halves], refs[halves], refs[halves + 1 : -1], refs[-1]
        for half in range(halves):
            for first in range(0, _DEEP, _SLAB):
                slab = pl.ds(first, _SLAB)
                byte = gpu.load(bytes_.at[slab], layout=gpu.Layout.WGMMA, optimized=False)
                converted[slab] = _unpacked(byte, half, halves).astype(converted.dtype)
            gpu.commit_smem()

            def multiply(acc, half=half):
                gpu.wgmma(acc, xs[half], converted)
                gpu.wgmma_wait(0)
                return acc[...]

            product = pl.run_scoped(multiply, gpu.ACC((_TALL, _ACROSS), jnp.float32))
            row = gpu.load(scales[half].at[0], layout=gpu.Layout.WGMMA.reduce(0), optimized=False)
            spread = lax.broadcast_in_dim(row, (_TALL, _ACROSS), (1,))
            total = total + product * gpu.layout_cast(spread, gpu.Layout.WGMMA)
        return total

    operands = [
        gpu.BlockSpec((_TALL, _DEEP), lambda k, half=half: (i, k + half * steps), transforms=tiles)
        for half in range(halves)
    ]
    scales = [
        gpu.BlockSpec((1, _ACROSS), lambda k, half=half: ((k + half * steps) * _DEEP // group, j))
        for half in range(halves)
    ]
    none = jnp.zeros((_TALL, _ACROSS), jnp.float32)
    total = gpu.emit_pipeline(
        step,
        grid=(steps,),
        in_specs=[*operands, gpu.BlockSpec((_DEEP, _ACROSS), lambda k: (k, j)), *scales],
        max_concurrent_steps=2,
        init_carry=gpu.layout_cast(none, gpu.Layout.WGMMA),
    )(*[x] * halves, values, *[scale] * halves)
    result[...] = total
    gpu.commit_smem()
    place = out.at[pl.ds(i * _TALL, _TALL), pl.ds(j * _ACROSS, _ACROSS)]
    gpu.copy_smem_to_gmem(result, place)
    gpu.wait_smem_to_gmem(0)


def _unpacked(byte: jax.Array, half: int, halves: int) -> jax.Array:
    if halves == 1:
        return byte
    # Shifts are made on 32 bits; the second takes the sign along.
    return (byte.astype(jnp.int32) << (28 - 4 * half)) >> 28
