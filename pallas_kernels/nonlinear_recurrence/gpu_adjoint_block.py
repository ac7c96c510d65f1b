"""What one block of threads of the backward kernel works on, and how its windows come and go."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.cell import ElementwiseCell
from pallas_kernels.compat import mosaic_gpu
from pallas_kernels.nonlinear_recurrence.windows import Plan


class Block(NamedTuple):
    """What one block of threads works on: static settings, then refs.

    Attributes:
      cell, plan, reverse: as the op was given them.
      missing: steps that were added to make T a multiple of L; the adjoint starts with them.
      short: chunks of the window that the adjoint ends with, which may be fewer than C.
      xs, states, cotangents: device memory, `[T / L, L, B, D]` each.
      before: the state before each window, `[windows, B, D]` each.
      params: `[1 or B, D]` each.
      d_xs, d_init, d_params: results, in device memory.
      walked: steps that were taken one after the other, `[D / block, B]`.
      near_xs, near_states, near_cotangents: two windows of each in shared memory, `[2, C, L,
        block]`; the states have one chunk more, for the row before the window.
      alone: the adjoint that leaves each chunk if none enters, `[K, C, block]`.
      products: column j of each chunk's product of J^T in rows j K to j K + K, `[K K, C, block]`.
      entering, leaving: the adjoint that enters and leaves each chunk, `[K, C, block]`.
      arrived, copied: barriers of the warpgroups, and of the copies into each slot.
    """

    cell: ElementwiseCell
    plan: Plan
    reverse: bool
    missing: int
    short: int
    xs: Sequence[Any]
    states: Sequence[Any]
    cotangents: Sequence[Any]
    before: Sequence[Any]
    params: Sequence[Any]
    d_xs: Sequence[Any]
    d_init: Sequence[Any]
    d_params: Sequence[Any]
    walked: Any
    near_xs: Sequence[Any]
    near_states: Sequence[Any]
    near_cotangents: Sequence[Any]
    alone: Any
    products: Any
    entering: Any
    leaving: Any
    arrived: Any
    copied: Any


def channels(block: Block) -> Any:
    """The block's slice of the channels."""
    return pl.ds(lax.axis_index("d") * block.plan.block, block.plan.block)


def own_rows(block: Block) -> Any:
    """Rows of the tiles that this warpgroup holds."""
    rows = block.plan.chunks // block.plan.warpgroups
    return pl.ds(lax.axis_index("wg") * rows, rows)


def is_copier(block: Block) -> Any:
    """Whether this warpgroup speaks to the copy engine, whose stores are awaited by who issued
    them; not the one that goes from chunk to chunk meanwhile, if there are others."""
    return lax.axis_index("wg") == block.plan.warpgroups - 1


def in_memory(block: Block, index: Any, count: int) -> Any:
    """The adjoint's order to memory order: it runs against the recurrence."""
    return index if block.reverse else count - 1 - index


def load_row(block: Block, ref: Any) -> jax.Array:
    return mosaic.load(ref, mosaic.row_layout(block.plan.block))


def load_tile(block: Block, ref: Any) -> jax.Array:
    return mosaic.load(ref, mosaic.tile_layout(block.plan.block))


def _transfer(block: Block, n: Any, copy: Callable[[Any, Any], None]) -> None:
    """Calls `copy(chunks in device memory, chunks in shared memory)` for the adjoint's n-th window.

    The last one, if it is short, has its chunks beside the row before it.
    """
    plan, last = block.plan, block.plan.windows - 1
    many, few = plan.chunks, block.short

    @pl.when((n < last) | (few == many))
    def _():
        start = n * many if block.reverse else few + (last - 1 - n) * many
        copy(pl.ds(start, many), pl.ds(0, many))

    if few < many:

        @pl.when(n == last)
        def _():
            place = (last * many, many - few) if block.reverse else (0, 0)
            copy(*(pl.ds(start, few) for start in place))


def fetch(block: Block, n: Any) -> None:
    """Starts the copies of a window, and brings the row before it; for the copier.

    A copy lands on a multiple of 128 bytes, which is why chunks have a multiple of four steps.
    """
    gpu, plan, b, slot = mosaic_gpu(), block.plan, lax.axis_index("b"), n % 2
    margin = 0 if block.reverse else 1

    def copy(there, here):
        shifted = pl.ds(here.start + margin, here.size)
        pairs = [(x, near.at[slot, here]) for x, near in zip(block.xs, block.near_xs, strict=True)]
        for far, near in zip(block.states, block.near_states, strict=True):
            pairs.append((far, near.at[slot, shifted]))
        for far, near in zip(block.cotangents, block.near_cotangents, strict=True):
            pairs.append((far, near.at[slot, here]))
        for far, near in pairs:
            source = far.at[there, :, b, channels(block)]
            gpu.copy_gmem_to_smem(source, near, block.copied.at[slot])

    _transfer(block, n, copy)
    edge = (plan.chunks, 0) if block.reverse else (0, plan.length - 1)
    for far, near in zip(block.before, block.near_states, strict=True):
        row = load_row(block, far.at[n, b, channels(block)])
        mosaic.store(near.at[slot, *edge], row)


def send(block: Block, n: Any) -> None:
    """Starts the copies of a window's results; for the copier."""

    def copy(there, here):
        for near, far in zip(block.near_xs, block.d_xs, strict=True):
            target = far.at[there, :, lax.axis_index("b"), channels(block)]
            mosaic_gpu().copy_smem_to_gmem(near.at[n % 2, here], target)

    _transfer(block, n, copy)


def _row_before(block: Block, chunk: Any, step: Any) -> tuple[Any, Any]:
    """Where the state before a step is, in `near_states`: one row earlier in scan order."""
    length = block.plan.length
    if block.reverse:
        last = step == length - 1
        return chunk + last.astype(jnp.int32), lax.select(last, 0, step + 1)
    inner = step > 0
    return chunk + inner.astype(jnp.int32), lax.select(inner, step - 1, length - 1)


def operands(block: Block, slot: Any, chunk: Any, step: Any) -> tuple[list, list, list]:
    """States before, inputs and cotangents of a step: tiles of a slice of chunks, or one's row."""
    if isinstance(chunk, pl.Slice):
        start, row = _row_before(block, chunk.start, step)
        previous, load = (slot, pl.ds(start, chunk.size), row), load_tile
    else:
        previous, load = (slot, *_row_before(block, chunk, step)), load_row
    return (
        [load(block, ref.at[previous]) for ref in block.near_states],
        [load(block, ref.at[slot, chunk, step]) for ref in block.near_xs],
        [load(block, ref.at[slot, chunk, step]) for ref in block.near_cotangents],
    )
