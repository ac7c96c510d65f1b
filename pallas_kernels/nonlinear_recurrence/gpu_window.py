"""One window of multiple shooting on Mosaic GPU: rollouts, passes until it is solved, the walk.

Tiles `[C / warpgroups, block]` live in registers and every warpgroup rolls its own chunks out.
Only warpgroup 0 does what concerns the chunks' order (`gpu_link`, the walk), on rows.

Functions of this file that hold a `sync` are called by all warpgroups, the others by any.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.cell import Arrays
from pallas_kernels.compat import mosaic_gpu
from pallas_kernels.nonlinear_recurrence.gpu_block import (
    Block,
    bounded,
    carried,
    channels,
    in_memory,
    load_row,
    load_tile,
    own_rows,
)
from pallas_kernels.nonlinear_recurrence.gpu_link import (
    CLOSED,
    FAR,
    NEAR,
    OPEN,
    RESIDUAL,
    ROUNDED,
    VERDICT,
    flag,
    link,
    link_affine,
)
from pallas_kernels.products import became, lacked, moved


class Outcome(NamedTuple):
    """Scalars: passes over the window, whether it is still open (not 0), the largest residual, and
    which set of starts was written last."""

    passes: Any
    still: Any
    worst: Any
    starts: Any


def _roll(
    block, cell, w, slot, params, first, *, columns, peaks, keep, heights=False, sizes=False
) -> tuple[list, list, list, list, list, list]:
    """Rolls this warpgroup's chunks out.

    Args:
      block: what to work on.
      cell: the block's, or its rough one.
      w: the window, in scan order.
      slot: where its inputs lie.
      params: rows.
      first: tiles of this warpgroup's starts.
      columns: carry the product of the Jacobians along.
      peaks: and the largest magnitudes that its entries have, or may have, on their way.
      keep: write the states to device memory.
      heights: carry the largest magnitudes of the states along.
      sizes: carry along what their magnitudes become, and what the rows of the product may lack.

    Returns:
      Ends, columns of the product, heights, columns of peaks, sizes, what rows lack; empty where
      not asked for.
    """
    plan, own = block.plan, own_rows(block)
    layout = mosaic.tile_layout(plan.block)
    shape = (plan.chunks // plan.warpgroups, plan.block)
    params = [mosaic.spread(p, shape[0], layout) for p in params]
    window = in_memory(block, w, plan.windows)
    valid = None
    if block.steps is not None:
        row = mosaic.row_numbers(shape, layout) + lax.axis_index("wg") * shape[0]
        begins = w * plan.window + in_memory(block, row, plan.chunks) * plan.length
        valid = lambda step: begins + step < block.steps  # noqa: E731

    def higher(most, values):
        return jax.tree.map(lambda m, v: jnp.maximum(m, jnp.abs(v)), most, values)

    def advance(step, inputs, states, products, tallest, most, came, lacking):
        arriving, lacks, full = came, lacking, []
        if sizes:  # the Jacobian itself moves the product, what it lacks, and the sizes
            new, jacobian = cell.push(states, inputs, params, identity)
            pushed = [moved(jacobian, column) for column in products]
            arriving = became(jacobian, came, new)
            lacks, full = lacked(jacobian, products, pushed, lacking, most, states, new)
        elif columns:
            new, pushed = cell.push(states, inputs, params, products)
        else:
            new, pushed = cell.step(states, inputs, params), products
        full = full if sizes else pushed
        new = mosaic.settle(new, shape, layout)
        pushed = [mosaic.settle(column, shape, layout) for column in pushed]
        arriving = mosaic.settle(arriving, shape, layout)
        lacks = mosaic.settle(lacks, shape, layout)
        full = [mosaic.settle(column, shape, layout) for column in full]
        if valid is not None:  # steps that do not exist leave the state, and the product, alone
            here = valid(step)
            new = [jnp.where(here, n, s) for n, s in zip(new, states, strict=True)]
            pushed = [
                [jnp.where(here, n, p) for n, p in zip(after, before, strict=True)]
                for after, before in zip(pushed, products, strict=True)
            ]
            arriving = [jnp.where(here, a, c) for a, c in zip(arriving, came, strict=True)]
            lacks = [jnp.where(here, n, o) for n, o in zip(lacks, lacking, strict=True)]
            full = [[jnp.where(here, f, 0.0) for f in column] for column in full if peaks]
        tallest = higher(tallest, new) if heights else tallest
        most = higher(most, full) if peaks else most
        return new, pushed, tallest, most, arriving, lacks

    def group(g, carry):
        steps = [g * together + j for j in range(together)]
        places = [in_memory(block, step, plan.length) for step in steps]
        # All loads first: the compiler moves none across a store, whose address it cannot tell.
        inputs = [[load_tile(block, x.at[slot, own, at]) for x in block.staged] for at in places]
        for step, at, x in zip(steps, places, inputs, strict=True):
            carry = advance(step, x, *carry)
            for ref, value in zip(block.states, carry[0], strict=True) if keep else ():
                place = ref.at[window, own, at, lax.axis_index("b"), channels(block)]
                mosaic.store(place, value)
        return carry

    identity = [
        [mosaic.full(shape, float(i == j), layout) for i in range(cell.states)]
        for j in range(cell.states if columns else 0)
    ]
    together = next(n for n in (block.unroll, 2, 1) if plan.length % n == 0)
    tallest = [jnp.abs(f) for f in first] if heights else []
    came = [jnp.abs(f) for f in first] if sizes else []
    lacking = [mosaic.full(shape, 0.0, layout) for _ in first] if sizes else []
    carry = (list(first), identity, tallest, identity if peaks else [], came, lacking)
    return lax.fori_loop(0, plan.length // together, group, carry)


def _load_starts(block: Block, which: Any) -> list[jax.Array]:
    own = own_rows(block)
    return [load_tile(block, block.starts.at[which, k, own]) for k in range(block.cell.states)]


def _write_starts(block: Block, tiles: Arrays) -> None:
    own = own_rows(block)
    for k, tile in enumerate(tiles):
        mosaic.store(block.starts.at[0, k, own], tile)


def _write_summaries(
    block: Block,
    ends: Arrays,
    columns: Sequence[Arrays],
    heights: Arrays,
    peaks: Sequence[Arrays],
    sizes: Arrays,
    lacking: Arrays,
) -> None:
    own = own_rows(block)
    for ref, rows in (
        (block.ends, ends),
        (block.heights, heights),
        (block.sizes, sizes),
        (block.lacking, lacking),
    ):
        for k, row in enumerate(rows):
            mosaic.store(ref.at[k, own], row)
    for ref, matrix in ((block.products, columns), (block.peaks, peaks)):
        for k, entry in enumerate([entry for column in matrix for entry in column]):
            mosaic.store(ref.at[k, own], entry)


def _correct_starts(block: Block, passes: Any, *, test: bool, affine: bool = False) -> None:
    """Warpgroup 0 corrects the starts of a pass, and judges it in a `test`; then all see both."""

    @pl.when(lax.axis_index("wg") == 0)
    def _():
        link(block, passes % 2, (passes + 1) % 2, test=test, affine=affine)

    # All read their new starts and the flags, and then write over the summaries.
    mosaic.sync(block.arrived)


def _guess(block: Block, w: Any, slot: Any, params: Arrays, passes: Any) -> None:
    """One pass whose states count for nothing: it corrects the starts, and tests nothing."""
    cell = block.rough or block.cell
    first = _load_starts(block, passes % 2)
    rolled = _roll(block, cell, w, slot, params, first, columns=True, peaks=False, keep=False)
    _write_summaries(block, *rolled)
    # Warpgroup 0 reads the summaries of all chunks.
    mosaic.sync(block.arrived)
    _correct_starts(block, passes, test=False)


def _attempt(block: Block, w: Any, slot: Any, params: Arrays, passes: Any, verdict: Any) -> Any:
    """One pass that counts: rolls out, corrects the starts, and judges itself.

    Behind a `verdict` of NEAR it makes no Jacobians. Those of the pass before, whose starts were
    the same but for rounding, give its corrections and its verdict. Behind larger corrections they
    might be flat where this pass is steep.
    """

    def roll(columns: bool) -> None:
        first = _load_starts(block, passes % 2)
        how = {"columns": columns, "peaks": columns and bounded(block), "keep": True}
        how["sizes"] = columns and block.sizes is not None
        _write_summaries(block, *_roll(block, block.cell, w, slot, params, first, **how))

    pl.when(verdict > NEAR)(functools.partial(roll, True))
    pl.when(verdict <= NEAR)(functools.partial(roll, False))
    # Warpgroup 0 reads the summaries of all chunks.
    mosaic.sync(block.arrived)
    _correct_starts(block, passes, test=True)
    found, still = flag(block, VERDICT), flag(block, OPEN)
    stalled = (found <= ROUNDED) & (verdict <= ROUNDED)
    found = lax.select(stalled, jnp.float32(CLOSED), found)
    # Behind rough functions no start holds a correction by exact Jacobians yet: only bitwise
    # agreement counts, for an error that every window leaves adds up.
    uncorrected = (passes < (1 if block.rough is None else 2)) & (still > 0.0)
    found = lax.select(uncorrected, jnp.maximum(found, jnp.float32(NEAR)), found)
    return found, flag(block, RESIDUAL)


def iterate(block: Block, w: Any, slot: Any, params: Arrays) -> Outcome:
    """Passes over a window until it is solved, at most `max_iters`.

    The first pass starts every chunk from the carry, so it never is the one that counts.
    """
    layout, rows = mosaic.tile_layout(block.plan.block), block.plan.chunks // block.plan.warpgroups
    carry = [load_row(block, carried(block, k)) for k in range(block.cell.states)]
    _write_starts(block, [mosaic.spread(c, rows, layout) for c in carry])
    _guess(block, w, slot, params, jnp.int32(0))

    def again(state):
        passes, verdict, _ = state
        return passes + 1, *_attempt(block, w, slot, params, passes, verdict)

    def going_on(state):
        passes, verdict, _ = state
        return (passes < block.max_iters) & (verdict > CLOSED)

    begin = (jnp.int32(1), jnp.float32(FAR), jnp.float32(jnp.inf))
    passes, still, worst = lax.while_loop(going_on, again, begin)
    return Outcome(passes, still, worst, passes % 2)


def correct_once(block: Block, w: Any, slot: Any, params: Arrays) -> Outcome:
    """The same for a step that is affine in the state: one correction, and the pass that counts.

    Chunks start from zero, so that no end is the difference of two large numbers. A product may
    have vanished on its way through a chunk while the states did not: the pass is judged, too.
    """
    layout = mosaic.tile_layout(block.plan.block)
    shape = (block.plan.chunks // block.plan.warpgroups, block.plan.block)
    first = [mosaic.full(shape, 0.0, layout)] * block.cell.states
    _write_starts(block, first)
    how = {"columns": True, "peaks": bounded(block), "keep": False}
    _write_summaries(block, *_roll(block, block.cell, w, slot, params, first, **how))
    # Warpgroup 0 reads the summaries of all chunks.
    mosaic.sync(block.arrived)

    @pl.when(lax.axis_index("wg") == 0)
    def _():
        link_affine(block, 0, 1)

    # All read the vote and their starts, and overwrite the ends.
    mosaic.sync(block.arrived)
    diverged = flag(block, OPEN)
    first = _load_starts(block, 1)
    how = {"columns": False, "peaks": False, "keep": True, "heights": bounded(block)}
    _write_summaries(block, *_roll(block, block.cell, w, slot, params, first, **how))
    # Warpgroup 0 reads the ends of all, or writes over states that others have just written.
    mosaic.sync(block.arrived)
    _correct_starts(block, jnp.int32(1), test=True, affine=True)
    verdict = lax.select(diverged > 0.0, jnp.float32(FAR), flag(block, VERDICT))
    still = lax.select(verdict <= ROUNDED, jnp.float32(CLOSED), verdict)
    return Outcome(jnp.int32(1), still, flag(block, RESIDUAL), 0)


def walk(block: Block, w: Any, slot: Any, params: Arrays) -> None:
    """Takes a window step by step from the carry, which it moves on; for warpgroup 0."""
    plan, cell = block.plan, block.cell
    layout = mosaic.row_layout(plan.block)
    window = in_memory(block, w, plan.windows)

    def chunk(c, states):
        row = in_memory(block, c, plan.chunks)

        def advance(step, states):
            at = in_memory(block, step, plan.length)
            inputs = [load_row(block, x.at[slot, row, at]) for x in block.staged]
            new = mosaic.settle(cell.step(states, inputs, params), (plan.block,), layout)
            if block.steps is not None:
                here = w * plan.window + c * plan.length + step < block.steps
                new = [jnp.where(here, n, s) for n, s in zip(new, states, strict=True)]
            for ref, value in zip(block.states, new, strict=True):
                place = ref.at[window, row, at, lax.axis_index("b"), channels(block)]
                mosaic.store(place, value)
            return new

        return lax.fori_loop(0, plan.length, advance, states)

    carry = [load_row(block, carried(block, k)) for k in range(cell.states)]
    # The four warps write the carry below, each when it gets there: all must have read it.
    mosaic_gpu().commit_smem()
    for k, value in enumerate(lax.fori_loop(0, plan.chunks, chunk, carry)):
        mosaic.store(carried(block, k), value)
