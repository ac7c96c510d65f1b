"""What a block of threads does in the backward kernel: windows of the adjoint, last step first.

Tiles `[C / warpgroups, block]` live in registers and every warpgroup runs its own chunks. Only
warpgroup 0 goes from chunk to chunk, on rows. Its four warps all do the same and write the same
values; it reads and writes different buffers, so that no warp reads what another one has
already replaced.

There is a `sync` wherever one thread reads what another one wrote, or writes over what another one
reads: simulated without any one of them, the kernel races or is wrong. The simulator knows nothing
of warps, nor of the copy engine's own order (`commit_smem`, `wait_smem_to_gmem`).
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.cell import Arrays
from pallas_kernels.compat import mosaic_gpu
from pallas_kernels.nonlinear_recurrence.gpu_adjoint_block import (
    Block,
    channels,
    fetch,
    in_memory,
    is_copier,
    load_row,
    load_tile,
    operands,
    own_rows,
    send,
)

# Rows of `entering` that are computed together, from loads that are issued together; divides C.
_TOGETHER = 4


def _add(left: Arrays, right: Arrays) -> list:
    return [a + b for a, b in zip(left, right, strict=True)]


def _skipped(block: Block, n: Any) -> Any:
    """How many chunks of the adjoint's n-th window do not exist: its first ones."""
    missing = block.plan.chunks - block.short
    return lax.select(n == block.plan.windows - 1, missing, 0) if missing else 0


def _choose_existing(block: Block, n: Any) -> Callable[[Any, Arrays, Arrays], list]:
    """`(m, new, old) -> new`, with their layout, but `old` where the m-th step of a chunk of mine
    does not exist: nothing happens there."""
    own, layout, plan = own_rows(block), mosaic.tile_layout(block.plan.block), block.plan
    shape = (own.size, plan.block)
    if not block.missing and block.short == plan.chunks:
        return lambda m, new, old: mosaic.settle(new, shape, layout)
    row = mosaic.row_numbers(shape, layout) + own.start
    first = in_memory(block, row, plan.chunks) * plan.length  # in the adjoint's order
    begin = _skipped(block, n) * plan.length + lax.select(n == 0, block.missing, 0)

    def choose(m, new, old):
        there = first + m >= begin
        new = mosaic.settle(new, shape, layout)
        return [jnp.where(there, a, b) for a, b in zip(new, old, strict=True)]

    return choose


def _chunks_alone(block: Block, slot: Any, params: Arrays, choose: Callable) -> None:
    """Fills my rows of `alone` and `products`."""
    cell, plan, own = block.cell, block.plan, own_rows(block)
    leaves, shape = range(cell.states), (own.size, plan.block)

    def advance(n, carry):
        adjoint, columns = carry
        step = in_memory(block, n, plan.length)
        h, x, given = operands(block, slot, own, step)
        pulled = cell.pull_state(h, x, params, _add(adjoint, given))
        turned = [choose(n, cell.pull_state(h, x, params, c), c) for c in columns]
        return choose(n, pulled, adjoint), turned

    layout = mosaic.tile_layout(plan.block)
    zero = [mosaic.full(shape, 0.0, layout) for _ in leaves]
    identity = [[mosaic.full(shape, float(i == j), layout) for i in leaves] for j in leaves]
    adjoint, columns = lax.fori_loop(0, plan.length, advance, (zero, identity))
    for i in leaves:
        mosaic.store(block.alone.at[i, own], adjoint[i])
        for j in leaves:
            mosaic.store(block.products.at[j * cell.states + i, own], columns[j][i])


def _chunk_to_chunk(block: Block, n: Any, slot: Any, params: Arrays) -> Any:
    """Fills `entering`, for warpgroup 0; returns whether it had to take every step to do so."""
    plan, count = block.plan, block.cell.states
    leaves = range(count)
    last = in_memory(block, plan.chunks - 1, plan.chunks)
    arriving = [load_row(block, block.leaving.at[i, last]) for i in leaves]
    zero = mosaic.full((plan.block,), 0.0, mosaic.row_layout(plan.block))

    def some(g, carry):
        adjoint, bad = carry
        places = [in_memory(block, g * _TOGETHER + j, plan.chunks) for j in range(_TOGETHER)]
        ends = [[load_row(block, block.alone.at[i, c]) for i in leaves] for c in places]
        maps = [[load_row(block, block.products.at[i, c]) for i in range(count**2)] for c in places]
        for place, end, columns in zip(places, ends, maps, strict=True):
            for i in leaves:
                mosaic.store(block.entering.at[i, place], adjoint[i])
            adjoint = [
                sum((columns[j * count + i] * adjoint[j] for j in leaves), end[i]) for i in leaves
            ]
            for value in adjoint:  # NaN fails the comparison, too
                bad = jnp.where(jnp.abs(value) < jnp.inf, bad, zero + 1.0)
        return adjoint, bad

    _, bad = lax.fori_loop(0, plan.chunks // _TOGETHER, some, (arriving, zero))
    # Each warp holds the whole row, so they all come to the same answer. They need not come to it
    # at once: what a warp writes to `entering` last is right, whoever's write is the last of all.
    overflowed = jnp.max(bad) > 0.0

    def chunk(c, adjoint):
        place = in_memory(block, c, plan.chunks)
        for i in leaves:
            mosaic.store(block.entering.at[i, place], adjoint[i])

        def advance(m, adjoint):
            step = in_memory(block, m, plan.length)
            h, x, given = operands(block, slot, place, step)
            new = block.cell.pull_state(h, x, params, _add(adjoint, given))
            new = mosaic.settle(new, (plan.block,), mosaic.row_layout(plan.block))
            if block.missing:
                there = (n > 0) | (c > skipped) | (m >= block.missing)
                new = [jnp.where(there, a, b) for a, b in zip(new, adjoint, strict=True)]
            return new

        return lax.fori_loop(0, plan.length, advance, adjoint)

    skipped = _skipped(block, n)
    lax.fori_loop(skipped, lax.select(overflowed, plan.chunks, skipped), chunk, arriving)
    return overflowed


def _chunks_again(block: Block, slot: Any, params: Arrays, choose: Callable, totals: Arrays) -> Any:
    """My chunks from what enters them: inputs' cotangents in place, parameters' added to `totals`,
    my rows of `leaving`."""
    cell, plan, own = block.cell, block.plan, own_rows(block)
    shape, layout = (own.size, plan.block), mosaic.tile_layout(plan.block)

    def advance(n, carry):
        adjoint, totals = carry
        step = in_memory(block, n, plan.length)
        h, x, given = operands(block, slot, own, step)
        d_h, d_x, d_p = cell.pull(h, x, params, _add(adjoint, given))
        for near, value in zip(block.near_xs, mosaic.settle(d_x, shape, layout), strict=True):
            # Each entry is read and written by the one thread that holds it.
            mosaic.store(near.at[slot, own, step], value)
        grown = _add(totals, mosaic.settle(d_p, shape, layout))
        return choose(n, d_h, adjoint), choose(n, grown, totals)

    adjoint = [load_tile(block, block.entering.at[i, own]) for i in range(cell.states)]
    adjoint, totals = lax.fori_loop(0, plan.length, advance, (adjoint, list(totals)))
    for i, value in enumerate(adjoint):
        mosaic.store(block.leaving.at[i, own], value)
    return totals


def solve(block: Block) -> None:
    """The kernel's body: all windows of one block of channels of one sequence."""
    gpu, plan, own = mosaic_gpu(), block.plan, own_rows(block)
    b, d, wg = lax.axis_index("b"), lax.axis_index("d"), lax.axis_index("wg")
    leaves, here, copier = range(block.cell.states), channels(block), is_copier(block)
    layout = mosaic.tile_layout(plan.block)
    rows = [load_row(block, p.at[b if p.shape[0] > 1 else 0, here]) for p in block.params]
    tiles = [mosaic.spread(p, own.size, layout) for p in rows]
    zero = mosaic.full((own.size, plan.block), 0.0, layout)
    for i in leaves:
        mosaic.store(block.leaving.at[i, own], zero)

    @pl.when(copier)
    def _():
        fetch(block, 0)

    # All read the row before the first window, which the copier wrote.
    mosaic.sync(block.arrived)

    def advance(n, carry):
        totals, walked = carry
        slot, choose = n % 2, _choose_existing(block, n)
        # Every thread waits for the copies itself: that is what makes them visible to it.
        gpu.barrier_wait(block.copied.at[slot])
        _chunks_alone(block, slot, tiles, choose)
        # Warpgroup 0 reads `alone` and `products` of all. And all have come from the last window,
        # which ended with a sync: nobody reads the other slot any more.
        mosaic.sync(block.arrived)

        @pl.when(copier)
        def _():
            # The copy engine is done reading the other slot's inputs' cotangents, on their way
            # out. What the threads wrote there was handed over to it then (`commit_smem`); what
            # they have only read needs no fence.
            gpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(n + 1 < plan.windows)
            def _():
                fetch(block, n + 1)

        overflowed = lax.cond(wg == 0, lambda: _chunk_to_chunk(block, n, slot, rows), lambda: False)
        # All read `entering`, and write over the `leaving` that warpgroup 0 began with.
        mosaic.sync(block.arrived)
        totals = _chunks_again(block, slot, tiles, choose, totals)
        # Each thread hands the inputs' cotangents that it wrote over to the copy engine, and then
        # the copier knows that all have.
        gpu.commit_smem()
        # Besides: warpgroup 0 reads the `leaving` of all; all read the next window's row before.
        mosaic.sync(block.arrived)

        @pl.when(copier)
        def _():
            send(block, n)

        steps = (plan.chunks - _skipped(block, n)) * plan.length
        steps = steps - lax.select(n == 0, block.missing, 0)
        return totals, walked + lax.select(overflowed, steps, 0)

    start = ([zero] * block.cell.params, jnp.int32(0))
    totals, walked = lax.fori_loop(0, plan.windows, advance, start)

    @pl.when(wg == 0)
    def _():
        block.walked[d, b] = walked
        last = in_memory(block, plan.chunks - 1, plan.chunks)
        for i in leaves:
            mosaic.store(block.d_init[i].at[b, here], load_row(block, block.leaving.at[i, last]))

    for total, result in zip(totals, block.d_params, strict=True):
        mosaic.store(block.alone.at[0, own], total)
        # Warpgroup 0 adds the rows of all ...
        mosaic.sync(block.arrived)

        @pl.when(wg == 0)
        def _(result=result):
            def add(c, row):
                return row + load_row(block, block.alone.at[0, c])

            none = mosaic.full((plan.block,), 0.0, mosaic.row_layout(plan.block))
            mosaic.store(result.at[b, here], lax.fori_loop(0, plan.chunks, add, none))

        # ... and the next parameter takes their place.
        mosaic.sync(block.arrived)

    @pl.when(copier)
    def _():
        # Shared memory outlives the copies out of it.
        gpu.wait_smem_to_gmem(0)
