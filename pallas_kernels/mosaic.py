"""What the Mosaic GPU kernels share: layouts of tiles and rows, loads and stores, the launch.

A warpgroup (128 threads, Pallas's `thread`) holds a tile `[rows, block]` in registers: rows are
chunks of time, the block is 16 or 32 channels. A row `[block]` is held whole by each of its four
warps. Nothing here orders memory: the automatic barriers around every store are turned off
(`launch`), so a kernel says itself, with `sync`, where one thread may read what another wrote.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import mosaic_gpu

# Shared memory that a block of threads may use on Hopper, less what Pallas keeps for barriers and
# for its own scratch.
SHARED_MEMORY = 227 * 1024 - 3072


def rows_of(block: int) -> int:
    """Rows that one pass over a warpgroup's threads holds: chunks come in multiples of it."""
    return 128 // block


def tile_layout(block: int) -> Any:
    """Layout of `[rows, block]`: neighbouring lanes hold neighbouring channels."""
    gpu = mosaic_gpu()
    if block == 32:  # a warp holds one row
        tiling = gpu.Tiling(((4, 32), (1,)))
        return gpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    if block == 16:  # a warp holds two rows
        tiling = gpu.Tiling(((8, 16), (2, 16), (1,)))
        return gpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
    raise ValueError(f"block={block} channels; expected 16 or 32.")


def row_layout(block: int) -> Any:
    """Layout of `[block]`: `tile_layout` without its rows, so it broadcasts."""
    gpu = mosaic_gpu()
    warps = (gpu.Replicated(4),)
    if block == 32:
        tiling = gpu.Tiling(((32,), (1,)))
        return gpu.Layout.TILED(tiling, warp_dims=warps, lane_dims=(-2,), vector_dim=-1)
    if block == 16:
        tiling = gpu.Tiling(((16,), (1,)))
        lanes = (gpu.Replicated(2), -2)
        return gpu.Layout.TILED(tiling, warp_dims=warps, lane_dims=lanes, vector_dim=-1)
    raise ValueError(f"block={block} channels; expected 16 or 32.")


def load(ref: Any, layout: Any) -> jax.Array:
    """Reads a ref, from shared or device memory, as float32 registers."""
    value = mosaic_gpu().load(ref, layout=layout, optimized=False)
    return value if value.dtype == jnp.float32 else value.astype(jnp.float32)


def store(ref: Any, value: jax.Array) -> None:
    """Writes registers to a ref, rounded to the ref's dtype; a row is written by every warp."""
    value = value.astype(ref.dtype)
    gpu = mosaic_gpu()
    if hasattr(gpu, "store"):
        gpu.store(ref, value, optimized=False)
    else:  # JAX 0.11
        ref[...] = value


def full(shape: Sequence[int], value: float, layout: Any) -> jax.Array:
    """A constant with a layout, which a loop may carry."""
    return mosaic_gpu().layout_cast(jnp.full(tuple(shape), value, jnp.float32), layout)


def spread(row: jax.Array, rows: int, layout: Any) -> jax.Array:
    """A row repeated down a tile; no data moves, each thread already holds its channel."""
    wide = lax.broadcast_in_dim(row, (rows, row.shape[0]), (1,))
    return mosaic_gpu().layout_cast(wide, layout)


def settle(values: Sequence[Any], shape: Sequence[int], layout: Any) -> list[jax.Array]:
    """A cell's result in the layout that a loop carries: it may have returned a constant."""
    wide = [jnp.broadcast_to(jnp.asarray(v, jnp.float32), tuple(shape)) for v in values]
    return [mosaic_gpu().layout_cast(v, layout) for v in wide]


def row_numbers(shape: Sequence[int], layout: Any) -> jax.Array:
    """The number of its row, int32, in every entry of a tile."""
    return mosaic_gpu().broadcasted_iota(jnp.int32, tuple(shape), 0, layout=layout)


def sync(barrier: Any) -> None:
    """All threads of the block arrive and wait: what each wrote before, every other sees after.

    The barrier counts one arrival for each warpgroup. Arriving releases and waiting acquires, for
    shared memory and, within the block, for device memory. It does not order against the copy
    engine's reads: before an asynchronous copy *out of* shared memory, `commit_smem` as well.
    """
    gpu = mosaic_gpu()
    gpu.barrier_arrive(barrier)
    gpu.barrier_wait(barrier)


def launch(
    body: Callable[..., None],
    *,
    out_type: Sequence[Any],
    scratch: Sequence[Any],
    grid: Sequence[int],
    grid_names: Sequence[str],
    warpgroups: int,
    interpret: Any = None,
) -> Callable[..., Any]:
    """A kernel of `warpgroups` warpgroups (axis `wg`) a block, with its barriers its own.

    Lane semantics: the default search for layouts does not end when a loop depends on data.
    """
    gpu = mosaic_gpu()
    return gpu.kernel(
        body,
        out_type=list(out_type),
        scratch_types=list(scratch),
        grid=tuple(grid),
        grid_names=tuple(grid_names),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=gpu.CompilerParams(
            lowering_semantics=gpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=interpret,
    )
