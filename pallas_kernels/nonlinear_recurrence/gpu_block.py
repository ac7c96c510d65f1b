"""What one block of threads of the forward kernel works on, and how it reads and stages it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.cell import ElementwiseCell
from pallas_kernels.compat import mosaic_gpu
from pallas_kernels.nonlinear_recurrence.windows import Plan


class Block(NamedTuple):
    """What one block of threads works on: static settings, then refs.

    Attributes:
      cell, plan, max_iters, reverse: as the op was given them.
      limits: of a correction in one pass, and in two in a row; zeros for bitwise agreement only.
      rough: the cell to about 1e-3, for first guesses; None where the cell has no such form.
      unroll: steps of a rollout that are unrolled where it divides the chunk's length.
      steps: T where the last window is padded, else None.
      dtypes: of the states.
      xs, params, init, states, report: device memory.
      staged: inputs of windows, `[slots, C, L, block]` each.
      ends, products, starts: summaries of the chunks. Where they end, `[K, C, block]`; the product
        of their Jacobians, `[K * K, C, block]`; and two sets of starts, of `[K, C, block]`.
      rows: the flags, where the last chunk should end, and the exact state before the window,
        `[3 + 3 K, block]`; see `gpu_link`.
      arrived, copied: barriers of the warpgroups, and of the copies into each slot.
      heights, peaks: the largest magnitudes on the way through a chunk: of the states, for an
        affine step; of the product's entries, or what those may be, in bfloat16, if corrections
        bound the error. None otherwise.
      sizes, lacking: what the magnitudes of a chunk's states have become at its end, and what the
        rows of its product may lack, in bfloat16; for a step that is not affine, if corrections
        bound the error. None otherwise.
    """

    cell: ElementwiseCell
    rough: ElementwiseCell | None
    plan: Plan
    limits: tuple[float, float]
    max_iters: int
    reverse: bool
    unroll: int
    steps: int | None
    dtypes: Sequence[Any]
    xs: Sequence[Any]
    params: Sequence[Any]
    init: Sequence[Any]
    states: Sequence[Any]
    report: Sequence[Any]
    staged: Sequence[Any]
    ends: Any
    products: Any
    starts: Any
    rows: Any
    arrived: Any
    copied: Any
    heights: Any = None
    peaks: Any = None
    sizes: Any = None
    lacking: Any = None


def carried(block: Block, state: int) -> Any:
    """The row that holds a state as it is before the window."""
    return block.rows.at[block.rows.shape[0] - block.cell.states + state]


def bounded(block: Block) -> bool:
    """Whether corrections bound the error; else only bitwise agreement counts."""
    return block.limits[1] > 0


def channels(block: Block) -> Any:
    """The block's slice of the channels."""
    return pl.ds(lax.axis_index("d") * block.plan.block, block.plan.block)


def in_memory(block: Block, index: Any, count: int) -> Any:
    """Scan order to memory order: a reversed solve walks the same arrays from their ends."""
    return count - 1 - index if block.reverse else index


def own_rows(block: Block) -> Any:
    """Rows of the tiles that this warpgroup holds."""
    rows = block.plan.chunks // block.plan.warpgroups
    return pl.ds(lax.axis_index("wg") * rows, rows)


def load_row(block: Block, ref: Any) -> jax.Array:
    """A row `[block]`, in float32."""
    return mosaic.load(ref, mosaic.row_layout(block.plan.block))


def load_tile(block: Block, ref: Any) -> jax.Array:
    """A tile of this warpgroup's rows, `[rows, block]`, in float32."""
    return mosaic.load(ref, mosaic.tile_layout(block.plan.block))


def zeros(block: Block) -> jax.Array:
    """A row of zeros."""
    return mosaic.full((block.plan.block,), 0.0, mosaic.row_layout(block.plan.block))


def stage(block: Block, w: Any) -> None:
    """Starts the copies of a window's inputs into its slot of shared memory."""
    b, slot = lax.axis_index("b"), w % block.plan.slots
    window = in_memory(block, w, block.plan.windows)
    for x, staged in zip(block.xs, block.staged, strict=True):
        mosaic_gpu().copy_gmem_to_smem(
            x.at[window, :, :, b, channels(block)], staged.at[slot], block.copied.at[slot]
        )
