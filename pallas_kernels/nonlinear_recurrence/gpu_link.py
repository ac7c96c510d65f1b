"""From chunk to chunk of a window on Mosaic GPU: the starts corrected, and the window judged.

The chunks' order is sequential work on rows. Only warpgroup 0 does it, and its four warps all do
the same: they write the same values, and no warp reads a row that another one might not have
written yet, because the corrected starts go into a second buffer.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import certificate, mosaic
from pallas_kernels.nonlinear_recurrence.gpu_block import (
    Block,
    bounded,
    carried,
    in_memory,
    load_row,
    zeros,
)

# Rows whose loads are issued together in a pass over the chunks' summaries: the best that divides
# C, while there are registers for it. Four divides every C.
_TOGETHER = {1: (8, 4)}
_FINFO = jnp.finfo(jnp.float32)
_FINITE = float(_FINFO.max)

# The states of a window: it is solved; it is as nearly solved as rounding allows; its starts move
# by so little that the products of this pass hold for the next one; or not.
CLOSED, ROUNDED, NEAR, FAR = 0.0, 1.0, 2.0, 3.0
# The block's `rows`: first the flags, what `link` finds; then, in two sets as the starts are, where
# each state of the last chunk should end in the next pass; and, last, the state before the window
# (`carried`). The next window starts where the last chunk should end. Otherwise an error within the
# limit of a window's own states would remain where they are no longer large.
VERDICT, OPEN, RESIDUAL = range(3)
FLAGS = 3


class _Inside(NamedTuple):
    """Of a chunk, for each state: the largest size that a correction and that the state have on
    their way, and what was flushed to 0 may have become at the end, in units of `LEAST`."""

    most: Any
    height: Any
    doubt: Any


def link(block: Block, old: Any, new: Any, *, test: bool, affine: bool) -> None:
    """Corrects the starts of a pass, and in a `test` writes what it finds to the flags.

    The boundary before a chunk compares the end of the chunk before (the carry, before the first)
    with its start. For each channel: the worst verdict by the corrections; whether an end differs
    from the next start (1.0) or all agree bit for bit; and the largest difference. What is NaN, or
    larger than `certificate.CAP` times the largest state of its channel so far, is dropped.

    Args:
      block: what to work on; the limits of a correction among it.
      old: which of the two sets of starts the chunks were rolled out from.
      new: which set takes the corrected ones.
      test: whether the pass may be the one that counts.
      affine: whether the correction before was exact. If not, the last chunk must end where the
        pass before predicted.
    """
    count = block.cell.states
    zero = zeros(block)
    nothing = _Inside(zero, zero, zero)
    accept, stalled = block.limits
    near = certificate.COARSE * float(_FINFO.eps)
    kinds = [(near, NEAR), (stalled, ROUNDED), (accept, CLOSED)]
    crossed, products_end = test and bounded(block), 2 * count + count**2
    sized = test and block.sizes is not None

    def finite(row: jax.Array) -> jax.Array:
        return jnp.where(jnp.abs(row) <= _FINITE, jnp.abs(row), zero)

    def visit(place: Any, rows: list[jax.Array], state: Any) -> Any:
        ends, starts = rows[:count], rows[count : 2 * count]
        products, rest = rows[2 * count : products_end], rows[products_end:]
        arriving, tops, recent, found, came = state
        deltas, doubts = [], []
        for k, ((end, moved, inside, kept), start) in enumerate(zip(arriving, starts, strict=True)):
            # Where nothing moves it, the end itself, with the sign of its zero.
            value = jnp.where(moved == 0.0, end, end + moved)
            if block.cell.rounds:  # ends are rounded: no other start can meet them
                value = value.astype(block.dtypes[k]).astype(jnp.float32)
            mosaic.store(block.starts.at[new, k, place], value)
            deltas.append(moved + (end - start))
            if test:
                least = jnp.minimum(jnp.abs(end - start), jnp.abs(deltas[k]))
                small = least < certificate.LEAST
                flushed = small & ~certificate.meets(end, start)
                missed = certificate.doubt_of_gap(end, start) if crossed else zero + 1.0
                missed = jnp.where(flushed, missed, zero)
                doubts.append(inside.doubt + missed)
                inside = inside._replace(doubt=doubts[k])
                found = judge(found, end, start, moved, deltas[k], inside, kept, recent[k], came[k])
        tops = [jnp.maximum(t, finite(e)) for t, e in zip(tops, ends, strict=True)]
        arriving = []
        for i in range(count):
            moved = products[i] * deltas[0]
            for j in range(1, count):
                moved = moved + products[j * count + i] * deltas[j]
            keep = jnp.abs(moved) <= certificate.CAP * tops[i]
            kept = jnp.where(keep, zero + 1.0, zero)
            inside = nothing
            if crossed:
                least = [jnp.where(u > 0.0, jnp.maximum(u, 1.0), zero) for u in doubts]
                sizes = [
                    jnp.abs(d) + certificate.LEAST * u for d, u in zip(deltas, least, strict=True)
                ]
                most = certificate.grown(rest[i : count**2 : count], sizes)
                height = rest[count**2 + i] if affine else zero
                row = products[i::count]
                doubt = certificate.grown(row, doubts) + certificate.lost(row, deltas)
                if sized:
                    peaks = rest[i : count**2 : count]
                    missing = certificate.doubt_of_lacking(rest[i - count], sizes, peaks)
                    doubt = doubt + missing
                inside = _Inside(most, height, doubt)
            arriving.append((ends[i], jnp.where(keep, moved, zero), inside, kept))
        recent = [(jnp.abs(e), *r[:-1]) for e, r in zip(ends, recent, strict=True)]
        if sized:
            own = rest[-2 * count : -count]
            moved = [certificate.grown(products[i::count], came) for i in range(count)]
            came = [jnp.maximum(o, m) for o, m in zip(own, moved, strict=True)]
        return arriving, tops, recent, found, came

    def rated(size, inside, sound, recent, came, floor=certificate.FLOOR):
        scale = certificate.scale_of(recent, came if sized else None)
        here = zero + FAR
        for limit, kind in kinds:
            # A NaN fails the first comparison, an infinite end the second.
            allowed = limit * scale
            if crossed:
                allowed = jnp.maximum(allowed, floor)
            within = (size + certificate.LEAST * inside.doubt <= allowed) & sound
            within = within & (recent[0] <= _FINITE)
            if crossed:  # on its way it is held to the second limit, relative to the states there
                allowed = jnp.maximum(limit, stalled) * jnp.maximum(scale, inside.height)
                within = within & (inside.most <= jnp.maximum(allowed, certificate.FLOOR))
            here = jnp.where(within, kind, here)
        return here

    def judge(found, end, start, moved, delta, inside, kept, recent, came):
        verdict, unequal, worst = found
        equal, met = end == start, certificate.meets(end, start)
        # Of the chunk's end, and of the next one's start; no correction turns a zero.
        size = jnp.maximum(jnp.abs(moved), jnp.abs(delta))
        here = rated(size, inside, (kept > 0.0) & (met | ~equal), recent, came)
        gap = jnp.abs(end - start)
        gap = jnp.where(gap <= _FINITE, gap, jnp.inf)
        return (
            jnp.maximum(verdict, here),
            jnp.where(met, unequal, zero + 1.0),
            jnp.maximum(worst, jnp.where(equal, zero, gap)),
        )

    carry = [load_row(block, carried(block, k)) for k in range(count)]
    begin = (
        [(c, zero, nothing, zero + 1.0) for c in carry],
        [finite(c) for c in carry],
        [(jnp.abs(c),) * certificate.WINDOW for c in carry],
        (zero + CLOSED, zero, zero),
        [jnp.abs(c) for c in carry],
    )
    rows = _summaries(block, old, peaks=crossed, heights=crossed and affine, sizes=sized)
    leaving, _, recent, (verdict, unequal, worst), came = _over_chunks(block, rows, visit, begin)
    for k, (end, moved, inside, kept) in enumerate(leaving):
        value = jnp.where(moved == 0.0, end, end + moved)
        mosaic.store(block.rows.at[FLAGS + new * count + k], value)
        if not test:
            continue
        size, sound = jnp.abs(moved), kept > 0.0
        if not affine:
            ahead = load_row(block, block.rows.at[FLAGS + old * count + k])
            gap = jnp.abs(moved + (end - ahead))
            flushed = (gap < certificate.LEAST) & ~certificate.meets(value, ahead)
            missed = jnp.where(flushed, certificate.doubt_of_gap(value, ahead), zero)
            inside = inside._replace(doubt=inside.doubt + missed)
            size = jnp.maximum(size, gap)
        if crossed:
            sound = sound & certificate.may_leave(value, inside.doubt, stalled)
        verdict = jnp.maximum(verdict, rated(size, inside, sound, recent[k], came[k], floor=0.0))
    if not test:
        return
    verdict = jnp.where(unequal > 0.0, verdict, zero + CLOSED)
    for row, value in ((VERDICT, verdict), (OPEN, unequal), (RESIDUAL, worst)):
        mosaic.store(block.rows.at[row], value)


def link_affine(block: Block, old: Any, new: Any) -> None:
    """Exact starts of an affine step; in the flags, `OPEN` where a product or one is not finite."""
    count = block.cell.states
    zero = zeros(block)

    def visit(place: Any, rows: list[jax.Array], state: Any) -> Any:
        ends, starts, products = rows[:count], rows[count : 2 * count], rows[2 * count :]
        exact, bad = state
        for k in range(count):
            mosaic.store(block.starts.at[new, k, place], exact[k])
        shift = [e - s for e, s in zip(exact, starts, strict=True)]
        after = []
        for i in range(count):
            moved = products[i] * shift[0]
            for j in range(1, count):
                moved = moved + products[j * count + i] * shift[j]
            # Where nothing moves it, the end itself, with the sign of its zero.
            value = jnp.where(moved == 0.0, ends[i], ends[i] + moved)
            bad = jnp.maximum(bad, jnp.where(jnp.abs(value) <= _FINITE, zero, zero + 1.0))
            after.append(value)
        return after, bad

    carry = [load_row(block, carried(block, k)) for k in range(count)]
    _, bad = _over_chunks(block, _summaries(block, old), visit, (carry, zero))
    mosaic.store(block.rows.at[OPEN], bad)


def flag(block: Block, row: int) -> Any:
    """The largest entry of a flag: a scalar that every thread agrees on."""
    return jnp.max(load_row(block, block.rows.at[row]))


def _summaries(
    block: Block, old: Any, *, peaks: bool = False, heights: bool = False, sizes: bool = False
) -> list[Callable[[Any], Any]]:
    """Rows of a chunk by its place in memory: ends, starts, products; peaks, heights; sizes and
    what products lack."""
    count = range(block.cell.states)

    def row_of(ref: Any, *index: Any) -> Any:
        return lambda place: ref.at[*index, place]

    refs = [row_of(block.ends, k) for k in count]
    refs += [row_of(block.starts, old, k) for k in count]
    refs += [row_of(block.products, k) for k in range(len(count) ** 2)]
    refs += [row_of(block.peaks, k) for k in range(len(count) ** 2)] if peaks else []
    refs += [row_of(block.heights, k) for k in count] if heights else []
    return refs + [row_of(ref, k) for ref in (block.sizes, block.lacking) for k in count if sizes]


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
