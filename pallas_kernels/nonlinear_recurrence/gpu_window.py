"""One window of multiple shooting on Mosaic GPU: rollouts, the test, the correction, the walk.

Tiles `[C / warpgroups, block]` live in registers and every warpgroup rolls its own chunks out.
What concerns the chunks' order (test, correction, walk) is done on rows by warpgroup 0 alone, whose
four warps all do the same: they write the same values, and no warp reads a row that another one
might not have written yet, because the corrected starts go into a second buffer.

Functions of this file that hold a `sync` are called by all warpgroups, the others by any.
"""

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
    channels,
    in_memory,
    load_row,
    load_tile,
    own_rows,
    zeros,
)

# As in jaxpara.recurrence: corrections beyond this multiple of the channel's largest end are
# dropped; a residual is relative to the largest of the last four ends, but to no more than
# _SLACK times the last two.
_CAP, _SLACK = 4.0, 256.0
_FINITE = float(jnp.finfo(jnp.float32).max)
# Rows whose loads are issued together in a pass over the chunks' summaries: the best that divides
# C, while there are registers for it. Four divides every C.
_TOGETHER = {1: (8, 4)}


class Outcome(NamedTuple):
    """Scalars: passes over the window, whether it is still open (0 or 1); a row: residuals."""

    passes: Any
    still: Any
    worst: Any


def _roll(block, w, slot, params, first, *, columns: bool, keep: bool) -> tuple[list, list]:
    """Rolls this warpgroup's chunks out: ends, and products of Jacobians if `columns`.

    Args:
      block: what to work on.
      w: the window, in scan order.
      slot: where its inputs lie.
      params: rows.
      first: tiles of this warpgroup's starts.
      columns: carry the product along.
      keep: write the states to device memory.
    """
    cell, plan, own = block.cell, block.plan, own_rows(block)
    layout = mosaic.tile_layout(plan.block)
    shape = (plan.chunks // plan.warpgroups, plan.block)
    params = [mosaic.spread(p, shape[0], layout) for p in params]
    window = in_memory(block, w, plan.windows)
    valid = None
    if block.steps is not None:
        row = mosaic.row_numbers(shape, layout) + lax.axis_index("wg") * shape[0]
        begins = w * plan.window + in_memory(block, row, plan.chunks) * plan.length
        valid = lambda step: begins + step < block.steps  # noqa: E731

    def advance(step, inputs, states, products):
        if columns:
            new, pushed = cell.push(states, inputs, params, products)
        else:
            new, pushed = cell.step(states, inputs, params), products
        new = mosaic.settle(new, shape, layout)
        pushed = [mosaic.settle(column, shape, layout) for column in pushed]
        if valid is not None:  # steps that do not exist leave the state, and the product, alone
            here = valid(step)
            new = [jnp.where(here, n, s) for n, s in zip(new, states, strict=True)]
            pushed = [
                [jnp.where(here, n, p) for n, p in zip(after, before, strict=True)]
                for after, before in zip(pushed, products, strict=True)
            ]
        return new, pushed

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
    return lax.fori_loop(0, plan.length // together, group, (list(first), identity))


def _load_starts(block: Block, which: Any) -> list[jax.Array]:
    own = own_rows(block)
    return [load_tile(block, block.starts.at[which, k, own]) for k in range(block.cell.states)]


def _write_starts(block: Block, tiles: Arrays) -> None:
    own = own_rows(block)
    for k, tile in enumerate(tiles):
        mosaic.store(block.starts.at[0, k, own], tile)


def _write_summaries(block: Block, ends: Arrays, columns: Sequence[Arrays]) -> None:
    own = own_rows(block)
    for k, end in enumerate(ends):
        mosaic.store(block.ends.at[k, own], end)
    for k, product in enumerate([entry for column in columns for entry in column]):
        mosaic.store(block.products.at[k, own], product)


def _over_chunks(block: Block, refs: Sequence[Any], visit: Any, state: Any) -> Any:
    """Folds `visit(chunk, rows, state)` over the chunks in scan order; `rows` are the refs'."""

    choices = _TOGETHER.get(block.cell.states, (4,))
    together = next(n for n in choices if block.plan.chunks % n == 0)

    def group(g, state):
        chunks = [g * together + j for j in range(together)]
        places = [in_memory(block, c, block.plan.chunks) for c in chunks]
        rows = [[load_row(block, ref.at[r]) for ref in refs] for r in places]
        for place, row in zip(places, rows, strict=True):
            state = visit(place, row, state)
        return state

    return lax.fori_loop(0, block.plan.chunks // together, group, state)


def _judge(block: Block, old: Any) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """Tests every boundary: open (0 or 1), largest residual, cap of each leaf's corrections.

    The boundary before chunk c compares its start with the end of chunk c - 1; before the first
    one stands the carry, and its boundary is closed unless the carry is not finite.
    """
    count = block.cell.states
    zero = zeros(block)
    carry = [load_row(block, block.carry.at[k]) for k in range(count)]

    def visit(place, rows, state):
        del place
        ends, starts = rows[:count], rows[count:]
        before, recent, tops, still, worst = state
        after, tops_now = [], []
        for k in range(count):
            size, (one, two, three) = jnp.abs(before[k]), recent[k]
            difference = jnp.abs(before[k] - starts[k])
            scale = jnp.maximum(jnp.maximum(size, one), jnp.maximum(two, three))
            scale = jnp.minimum(scale, _SLACK * jnp.maximum(size, one))
            # A NaN fails the first comparison, an infinite end the second.
            closed = (difference <= block.tol * scale) & (size <= _FINITE)
            still = jnp.maximum(still, jnp.where(closed, zero, zero + 1.0))
            worst = jnp.maximum(worst, jnp.where(difference <= _FINITE, difference, zero + jnp.inf))
            after.append([size, one, two])
            reach = jnp.abs(ends[k])
            tops_now.append(jnp.maximum(tops[k], jnp.where(reach <= _FINITE, reach, zero)))
        return ends, after, tops_now, still, worst

    refs = [block.ends.at[k] for k in range(count)] + [
        block.starts.at[old, k] for k in range(count)
    ]
    recent = [[jnp.abs(c)] * 3 for c in carry]
    finite = [jnp.where(jnp.abs(c) <= _FINITE, jnp.abs(c), zero) for c in carry]
    _, _, tops, still, worst = _over_chunks(block, refs, visit, (carry, recent, finite, zero, zero))
    return still, worst, [_CAP * top for top in tops]


def _correct(block: Block, old: Any, new: Any, caps: Sequence[jax.Array] | None) -> jax.Array:
    """Writes the corrected starts; returns whether one of them is not finite (0 or 1).

    Without `caps` every correction counts, with them what is larger, or NaN, is dropped.
    """
    count = block.cell.states
    zero = zeros(block)

    def visit(place, rows, state):
        ends, starts, products = rows[:count], rows[count : 2 * count], rows[2 * count :]
        corrected, bad = state
        for k in range(count):
            mosaic.store(block.starts.at[new, k, place], corrected[k])
        shift = [c - s for c, s in zip(corrected, starts, strict=True)]
        after = []
        for i in range(count):
            change = products[i] * shift[0]
            for j in range(1, count):
                change = change + products[j * count + i] * shift[j]
            if caps is not None:
                change = jnp.where(jnp.abs(change) <= caps[i], change, zero)
            value = (ends[i] + change).astype(block.dtypes[i]).astype(jnp.float32)
            bad = jnp.maximum(bad, jnp.where(jnp.abs(value) <= _FINITE, zero, zero + 1.0))
            after.append(value)
        return after, bad

    refs = [block.ends.at[k] for k in range(count)]
    refs += [block.starts.at[old, k] for k in range(count)]
    refs += [block.products.at[k] for k in range(count**2)]
    carry = [load_row(block, block.carry.at[k]) for k in range(count)]
    return _over_chunks(block, refs, visit, (carry, zero))[1]


def _vote(block: Block) -> tuple[Any, Any]:
    """What warpgroup 0 found: a scalar that every thread agrees on, and the row of residuals."""
    return jnp.max(load_row(block, block.vote.at[0])), load_row(block, block.vote.at[1])


def _attempt(block, w, slot, params, first: Arrays, passes: Any, *, keep: bool) -> None:
    """One pass: rolls out from `first`, tests, and corrects the starts if a boundary is open.

    States that are not kept count for nothing: then the starts are corrected in any case.
    """
    wg, old, new = lax.axis_index("wg"), passes % 2, (passes + 1) % 2
    _write_summaries(block, *_roll(block, w, slot, params, first, columns=True, keep=keep))
    # Warpgroup 0 reads the summaries of all chunks.
    mosaic.sync(block.arrived)

    @pl.when(wg == 0)
    def _():
        still, worst, caps = _judge(block, old)
        mosaic.store(block.vote.at[0], still)
        mosaic.store(block.vote.at[1], worst)

        @pl.when(not keep or jnp.max(still) > 0.0)
        def _():
            _correct(block, old, new, caps)

    # All read the vote and their new starts, and then write over the summaries.
    mosaic.sync(block.arrived)


def iterate(block: Block, w: Any, slot: Any, params: Arrays) -> Outcome:
    """Passes over a window until every boundary is closed, at most `max_iters`.

    The first pass starts every chunk from the carry; its states are not written, so it never is
    the one that counts.
    """
    layout, rows = mosaic.tile_layout(block.plan.block), block.plan.chunks // block.plan.warpgroups
    carry = [load_row(block, block.carry.at[k]) for k in range(block.cell.states)]
    first = [mosaic.spread(c, rows, layout) for c in carry]
    _write_starts(block, first)
    _attempt(block, w, slot, params, first, 0, keep=False)

    def again(state):
        passes = state[0]
        _attempt(block, w, slot, params, _load_starts(block, passes % 2), passes, keep=True)
        return passes + 1, *_vote(block)

    def going_on(state):
        passes, still, _ = state
        return (passes < block.max_iters) & (still > 0.0)

    begin = (jnp.int32(1), jnp.float32(1.0), _vote(block)[1])
    return Outcome(*lax.while_loop(going_on, again, begin))


def correct_once(block: Block, w: Any, slot: Any, params: Arrays) -> Outcome:
    """The same for a step that is affine in the state: exact after one correction.

    Chunks start from zero, so that no end is the difference of two large numbers.
    """
    layout = mosaic.tile_layout(block.plan.block)
    shape = (block.plan.chunks // block.plan.warpgroups, block.plan.block)
    first = [mosaic.full(shape, 0.0, layout)] * block.cell.states
    _write_starts(block, first)
    _write_summaries(block, *_roll(block, w, slot, params, first, columns=True, keep=False))
    # Warpgroup 0 reads the summaries of all chunks.
    mosaic.sync(block.arrived)

    @pl.when(lax.axis_index("wg") == 0)
    def _():
        mosaic.store(block.vote.at[0], _correct(block, 0, 1, None))

    # All read the vote and their starts, and overwrite the ends.
    mosaic.sync(block.arrived)
    still = jnp.max(load_row(block, block.vote.at[0]))
    first = _load_starts(block, 1)
    _write_summaries(block, *_roll(block, w, slot, params, first, columns=False, keep=True))
    # Warpgroup 0 reads the last end, or writes over states that others have just written.
    mosaic.sync(block.arrived)
    return Outcome(jnp.int32(1), still, zeros(block))


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

    carry = [load_row(block, block.carry.at[k]) for k in range(cell.states)]
    # The four warps write the carry below, each when it gets there: all must have read it.
    mosaic_gpu().commit_smem()
    for k, value in enumerate(lax.fori_loop(0, plan.chunks, chunk, carry)):
        mosaic.store(block.carry.at[k], value)
