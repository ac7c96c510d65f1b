"""One window of multiple shooting on Mosaic GPU: rollouts, the test, the correction, the walk.

Tiles `[C / warpgroups, block]` live in registers and every warpgroup rolls its own chunks out.
What concerns the chunks' order (correction, walk) is done on rows by warpgroup 0 alone, whose
four warps all do the same: they write the same values, and no warp reads a row that another one
might not have written yet, because the corrected starts go into a second buffer.

Functions of this file that hold a `sync` are called by all warpgroups, the others by any.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.cell import Arrays
from pallas_kernels.compat import mosaic_gpu
from pallas_kernels.nonlinear_recurrence import rounding
from pallas_kernels.nonlinear_recurrence.gpu_block import (
    Block,
    channels,
    end_row,
    in_memory,
    load_row,
    load_tile,
    own_ends,
    own_rows,
    zeros,
    zeros_tile,
)
from pallas_kernels.nonlinear_recurrence.windows import MARGIN

# As in jaxpara.recurrence: corrections beyond this multiple of the channel's largest end (there of
# the whole window) are dropped; a residual is relative to the largest of the last four ends, but to
# no more than _SLACK times the last two.
_CAP, _SLACK = 4.0, 256.0
_FINITE = float(jnp.finfo(jnp.float32).max)
# Rows whose loads are issued together in a pass over the chunks' summaries: the best that divides
# C, while there are registers for it. Four divides every C.
_TOGETHER = {1: (8, 4)}


# Of a boundary: it is closed; it may be as nearly closed as rounding allows; one more pass is
# likely to close it; or not. Newton's residuals fall from r to about 0.2 r^2 here: from _NEAR times
# the root of the tolerance to below it. Two passes in a row that may be rounding's are the end.
CLOSED, ROUNDED, NEAR, FAR = 0.0, 1.0, 2.0, 3.0
_NEAR = 2.0


class Outcome(NamedTuple):
    """Scalars: passes over the window, whether it is still open (not 0); a tile: residuals."""

    passes: Any
    still: Any
    worst: Any


def _roll(block, cell, w, slot, params, first, *, columns: bool, keep: bool) -> tuple[list, list]:
    """Rolls this warpgroup's chunks out: ends, and products of Jacobians if `columns`.

    Args:
      block: what to work on.
      cell: the block's, or its rough one.
      w: the window, in scan order.
      slot: where its inputs lie.
      params: rows.
      first: tiles of this warpgroup's starts.
      columns: carry the product along.
      keep: write the states to device memory.
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
        mosaic.store(own_ends(block, k), end)
    for k, product in enumerate([entry for column in columns for entry in column]):
        mosaic.store(block.products.at[k, own], product)


def _over_chunks(block: Block, refs: Sequence[Any], visit: Any, state: Any) -> Any:
    """Folds `visit(chunk, rows, state)` over the chunks in scan order.

    The rows are loaded from `ref(chunk)` for each of the refs; a chunk is its place in memory.
    """

    choices = _TOGETHER.get(block.cell.states, (4,))
    together = next(n for n in choices if block.plan.chunks % n == 0)

    def group(g, state):
        chunks = [g * together + j for j in range(together)]
        places = [in_memory(block, c, block.plan.chunks) for c in chunks]
        rows = [[load_row(block, ref(r)) for ref in refs] for r in places]
        for place, row in zip(places, rows, strict=True):
            state = visit(place, row, state)
        return state

    return lax.fori_loop(0, block.plan.chunks // together, group, state)


def largest(block: Block, tile: jax.Array) -> Any:
    """The largest entry of all warpgroups' tiles: a scalar that every thread agrees on.

    By way of the flags, which nobody may still be reading; after it nobody may write there before
    another `sync`.
    """
    mosaic.store(block.flags.at[own_rows(block)], tile)
    # All read the rows of all.
    mosaic.sync(block.arrived)
    visit = lambda _, rows, top: jnp.maximum(top, rows[0])  # noqa: E731
    return jnp.max(_over_chunks(block, [lambda row: block.flags.at[row]], visit, zeros(block)))


def _judge(block: Block, old: Any) -> tuple[Any, jax.Array]:
    """Tests every boundary: the worst of the verdicts, and a tile of the residuals.

    The boundary before chunk c compares its start with the end of chunk c - 1; before the first
    one stands the carry, and its boundary is closed unless the carry is not finite.
    """
    own, worst = own_rows(block), zeros_tile(block)
    verdict = worst + CLOSED
    limits = [(_NEAR * math.sqrt(block.tol), NEAR), (block.tol, CLOSED)]
    if rounding.stall(block.tol) > block.tol:
        limits.insert(1, (rounding.stall(block.tol), ROUNDED))
    for k in range(block.cell.states):
        before, *recent = [load_tile(block, own_ends(block, k, back)) for back in (1, 2, 3, 4)]
        difference = jnp.abs(before - load_tile(block, block.starts.at[old, k, own]))
        size, (one, two, three) = jnp.abs(before), map(jnp.abs, recent)
        scale = jnp.maximum(jnp.maximum(size, one), jnp.maximum(two, three))
        scale = jnp.minimum(scale, _SLACK * jnp.maximum(size, one))
        here = worst * 0.0 + FAR
        for limit, kind in limits:
            # A NaN fails the first comparison, an infinite end the second.
            within = (difference <= limit * scale) & (size <= _FINITE)
            here = jnp.where(within, kind, here)
        verdict = jnp.maximum(verdict, here)
        worst = jnp.maximum(worst, jnp.where(difference <= _FINITE, difference, jnp.inf))
    return largest(block, verdict), worst


def _correct(block: Block, old: Any, new: Any, *, capped: bool) -> jax.Array:
    """Writes the corrected starts; returns whether one of them is not finite (0 or 1).

    Unless `capped`, every correction counts; else what is NaN, or larger than _CAP times the
    largest state of its channel so far, is dropped.
    """
    count = block.cell.states
    zero = zeros(block)

    def size(row: jax.Array) -> jax.Array:
        return jnp.where(jnp.abs(row) <= _FINITE, jnp.abs(row), zero)

    def visit(place, rows, state):
        ends, starts, products = rows[:count], rows[count : 2 * count], rows[2 * count :]
        corrected, tops, bad = state
        for k in range(count):
            mosaic.store(block.starts.at[new, k, place], corrected[k])
        if capped:
            tops = [jnp.maximum(t, size(e)) for t, e in zip(tops, ends, strict=True)]
        shift = [c - s for c, s in zip(corrected, starts, strict=True)]
        after = []
        for i in range(count):
            change = products[i] * shift[0]
            for j in range(1, count):
                change = change + products[j * count + i] * shift[j]
            value = ends[i] + change
            if capped:
                value = jnp.where(jnp.abs(change) <= _CAP * tops[i], value, ends[i])
            if block.cell.rounds:  # ends are rounded: no other start can meet them
                value = value.astype(block.dtypes[i]).astype(jnp.float32)
            if not capped:
                bad = jnp.maximum(bad, jnp.where(jnp.abs(value) <= _FINITE, zero, zero + 1.0))
            after.append(value)
        return after, tops, bad

    def row_of(ref: Any, *index: Any) -> Any:
        return lambda place: ref.at[*index, place]

    refs = [functools.partial(end_row, block, k) for k in range(count)]
    refs += [row_of(block.starts, old, k) for k in range(count)]
    refs += [row_of(block.products, k) for k in range(count**2)]
    carry = [load_row(block, block.carry.at[k]) for k in range(count)]
    return _over_chunks(block, refs, visit, (carry, [size(c) for c in carry], zero))[2]


def _correct_starts(block: Block, passes: Any, needed: Any = True) -> None:
    """Warpgroup 0 corrects the starts of a pass if need be; all have theirs when it returns."""

    @pl.when((lax.axis_index("wg") == 0) & needed)
    def _():
        _correct(block, passes % 2, (passes + 1) % 2, capped=True)

    # All read their new starts, and then write over the summaries and the flags.
    mosaic.sync(block.arrived)


def _guess(block: Block, w: Any, slot: Any, params: Arrays, passes: Any) -> None:
    """One pass whose states count for nothing: it corrects the starts, and tests nothing."""
    cell = block.rough or block.cell
    first = _load_starts(block, passes % 2)
    _write_summaries(block, *_roll(block, cell, w, slot, params, first, columns=True, keep=False))
    # Warpgroup 0 reads the summaries of all chunks.
    mosaic.sync(block.arrived)
    _correct_starts(block, passes)


def _attempt(block: Block, w: Any, slot: Any, params: Arrays, passes: Any, verdict: Any) -> Any:
    """One pass that counts: rolls out, tests, and corrects the starts if a boundary is open.

    Behind a `verdict` of NEAR this pass is likely to be the last: it makes no Jacobians, and if it
    was not, those of the pass before correct the starts as well.
    """

    def roll(columns: bool) -> None:
        first = _load_starts(block, passes % 2)
        _write_summaries(
            block, *_roll(block, block.cell, w, slot, params, first, columns=columns, keep=True)
        )

    pl.when(verdict > NEAR)(functools.partial(roll, True))
    pl.when(verdict <= NEAR)(functools.partial(roll, False))
    # Each reads the ends of the chunks before its own.
    mosaic.sync(block.arrived)
    found, worst = _judge(block, passes % 2)
    stalled = (found <= ROUNDED) & (verdict <= ROUNDED)
    found = lax.select(stalled, jnp.float32(CLOSED), found)
    _correct_starts(block, passes, found > CLOSED)
    return found, worst


def iterate(block: Block, w: Any, slot: Any, params: Arrays) -> Outcome:
    """Passes over a window until every boundary is closed, at most `max_iters`.

    The first pass starts every chunk from the carry, so it never is the one that counts; nor is
    the second one where guesses cost less than a pass that counts.
    """
    layout, rows = mosaic.tile_layout(block.plan.block), block.plan.chunks // block.plan.warpgroups
    carry = [load_row(block, block.carry.at[k]) for k in range(block.cell.states)]
    _write_starts(block, [mosaic.spread(c, rows, layout) for c in carry])

    @pl.when(lax.axis_index("wg") == 0)
    def _():
        for k, row in enumerate(carry):
            for i in range(MARGIN):
                margin = block.plan.chunks + i if block.reverse else i
                mosaic.store(block.ends.at[k, margin], row)

    guesses = 2 if block.rough is not None and block.max_iters > 2 else 1

    def guess(passes, count):
        _guess(block, w, slot, params, passes)
        return count + 1

    passes = lax.fori_loop(0, guesses, guess, jnp.int32(0))

    def again(state):
        passes, verdict, _ = state
        return passes + 1, *_attempt(block, w, slot, params, passes, verdict)

    def going_on(state):
        passes, verdict, _ = state
        return (passes < block.max_iters) & (verdict > CLOSED)

    begin = (passes, jnp.float32(FAR), zeros_tile(block) + jnp.inf)
    return Outcome(*lax.while_loop(going_on, again, begin))


def correct_once(block: Block, w: Any, slot: Any, params: Arrays) -> Outcome:
    """The same for a step that is affine in the state: exact after one correction.

    Chunks start from zero, so that no end is the difference of two large numbers.
    """
    layout = mosaic.tile_layout(block.plan.block)
    shape = (block.plan.chunks // block.plan.warpgroups, block.plan.block)
    first = [mosaic.full(shape, 0.0, layout)] * block.cell.states
    _write_starts(block, first)
    _write_summaries(
        block, *_roll(block, block.cell, w, slot, params, first, columns=True, keep=False)
    )
    # Warpgroup 0 reads the summaries of all chunks.
    mosaic.sync(block.arrived)

    @pl.when(lax.axis_index("wg") == 0)
    def _():
        mosaic.store(block.flags.at[0], _correct(block, 0, 1, capped=False))

    # All read the vote and their starts, and overwrite the ends.
    mosaic.sync(block.arrived)
    still = jnp.max(load_row(block, block.flags.at[0]))
    first = _load_starts(block, 1)
    _write_summaries(
        block, *_roll(block, block.cell, w, slot, params, first, columns=False, keep=True)
    )
    # Warpgroup 0 reads the last end, or writes over states that others have just written.
    mosaic.sync(block.arrived)
    return Outcome(jnp.int32(1), still, zeros_tile(block))


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
