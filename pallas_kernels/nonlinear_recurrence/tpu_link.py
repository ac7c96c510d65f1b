"""From chunk to chunk of a window on Mosaic TPU: the starts corrected, and each lane judged."""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import certificate, tiles


class Chunks(NamedTuple):
    """Summaries of a window's chunks, in scratch memory.

    Attributes:
      ahead: what the pass before made of the last chunk's end, K rows.
      starts, ends: states, K tiles each.
      products, peaks: the product P of the Jacobians, row-major, and the largest magnitudes that
        its entries have, or may have, on their way, K K tiles each.
      heights: the largest magnitudes of the states on their way through a chunk, K tiles; of an
        affine step only.
      sizes: what the magnitudes of a chunk's states have become at its end, K tiles; of a step
        that is not affine.
      lacking: what the rows of P may lack, K tiles; of such a step.
    """

    ahead: Sequence[Any]
    starts: Sequence[Any]
    ends: Sequence[Any]
    products: Sequence[Any]
    peaks: Sequence[Any]
    heights: Sequence[Any]
    sizes: Sequence[Any]
    lacking: Sequence[Any]


def link(plan, limits, chunks, before, affine) -> tuple[Any, Any, Any, Any]:
    """Tests the boundaries, and leaves each chunk's corrected successor in place of its end.

    The place of the last one gets the start of the next window. That start is corrected once more:
    an error within the limit of a window's own states would remain where they are no longer large.
    No chunk follows that shows whether the correction before was right. Its prediction does, but
    for an affine step, whose correction is exact.

    Returns:
      Four rows: 1.0 where every end is the next start; where every correction is within the first
      limit, and within the second; and the largest residual (infinite for a NaN).
    """
    starts, ends = chunks.starts, chunks.ends
    size, rows = len(starts), range(len(starts))
    bounded = limits[1] > 0  # else only bits decide
    nothing = certificate.FLOOR if bounded else 0.0
    caps = []
    for end in ends:
        value = jnp.abs(end[...])
        value = jnp.where(value < jnp.inf, value, 0.0)
        caps.append(certificate.CAP * jnp.max(value, axis=0))

    def crossed(place, delta, doubt):
        """A correction on its way through a chunk, and its doubt, in `LEAST`, at the end."""
        if not bounded:
            return [jnp.zeros(plan.row, jnp.float32)] * size, doubt
        units = [certificate.LEAST * jnp.where(u > 0.0, jnp.maximum(u, 1.0), 0.0) for u in doubt]
        sizes = [jnp.abs(d) + u for d, u in zip(delta, units, strict=True)]
        most = _by_rows(certificate.grown, chunks.peaks, place, sizes)
        parts = [
            _by_rows(certificate.grown, chunks.products, place, doubt),
            _by_rows(certificate.lost, chunks.products, place, delta),
        ]
        if chunks.lacking:
            peaks = [ref[place] for ref in chunks.peaks]
            rows = [(ref[place], peaks[size * i :][:size]) for i, ref in enumerate(chunks.lacking)]
            parts.append([certificate.doubt_of_lacking(row, sizes, p) for row, p in rows])
        return most, [functools.reduce(operator.add, row) for row in zip(*parts, strict=True)]

    def arrived(place, came):
        """What the magnitudes of all states before the end of a chunk have become there."""
        moved = _by_rows(certificate.grown, chunks.products, place, came)
        return [jnp.maximum(ref[place], m) for ref, m in zip(chunks.sizes, moved, strict=True)]

    def small(within, sound, off, most, height, end, recent, came, floor=nothing):
        """`within`, where corrections of this size are within the limits of an end, or a floor.

        On its way through the chunk the correction is held to the second limit, relative to the
        states there.
        """
        scale = certificate.scale_of((jnp.abs(end), *recent), came if chunks.sizes else None)
        sound = sound & tiles.finite(end)
        allowed = limits[1] * jnp.maximum(scale, height)
        sound = sound & (most <= jnp.maximum(allowed, nothing))
        return [
            jnp.where(sound & (off <= jnp.maximum(limit * scale, floor)), w, 0.0)
            for w, limit in zip(within, limits, strict=True)
        ]

    def visit(index, loop):
        exact, within, largest, delta, doubt, recent, came = loop
        here, there = plan.place(index, plan.chunks), plan.place(index + 1, plan.chunks)
        end, start = [e[here] for e in ends], [s[there] for s in starts]
        moved = tiles.moved(size, chunks.products, here, delta)
        most, doubt = crossed(here, delta, doubt)
        came = arrived(here, came) if chunks.sizes else came
        kept = [jnp.abs(m) <= cap for m, cap in zip(moved, caps, strict=True)]  # not a NaN
        moved = [jnp.where(keep, m, 0.0) for keep, m in zip(kept, moved, strict=True)]
        delta = [m + (e - s) for m, e, s in zip(moved, end, start, strict=True)]
        for i in rows:
            equal, met = end[i] == start[i], certificate.meets(end[i], start[i])
            exact = jnp.where(met, exact, 0.0)
            residual = jnp.abs(end[i] - start[i])
            sound = kept[i] & (met | ~equal)  # no correction turns a zero
            flushed = ~met & (jnp.minimum(residual, jnp.abs(delta[i])) < certificate.LEAST)
            missed = certificate.doubt_of_gap(end[i], start[i]) if bounded else 1.0
            doubt[i] = doubt[i] + jnp.where(flushed, missed, 0.0)
            # Of this chunk's end, and of the next one's start.
            off = jnp.maximum(jnp.abs(moved[i]), jnp.abs(delta[i])) + certificate.LEAST * doubt[i]
            height = chunks.heights[i][here] if affine else 0.0
            within = small(within, sound, off, most[i], height, end[i], recent[i], came[i])
            # NaN compares false: it counts as infinite.
            residual = jnp.where(residual <= jnp.inf, residual, jnp.inf)
            largest = jnp.maximum(largest, jnp.where(equal, 0.0, residual))
        for i in rows:  # where nothing moves it, the end itself, with the sign of its zero
            ends[i][here] = jnp.where(moved[i] == 0.0, end[i], end[i] + moved[i])
        recent = [(jnp.abs(end[i]), *recent[i][:-1]) for i in rows]
        return exact, within, largest, delta, doubt, recent, came

    zero = jnp.zeros(plan.row, jnp.float32)
    first = [jnp.abs(b[...]) for b in before]
    loop = (
        zero + 1.0,
        [zero + 1.0] * 2,
        zero,
        [zero] * size,
        [zero] * size,
        [(f,) * (certificate.WINDOW - 1) for f in first],
        first,
    )
    loop = lax.fori_loop(0, plan.chunks - 1, visit, loop)
    exact, (fine, coarse), largest, delta, doubt, recent, came = loop
    last = plan.place(plan.chunks - 1, plan.chunks)
    moved = tiles.moved(size, chunks.products, last, delta)
    most, doubt = crossed(last, delta, doubt)
    came = arrived(last, came) if chunks.sizes else came
    for i in rows:
        end, sound = ends[i][last], jnp.abs(moved[i]) <= caps[i]
        new = jnp.where(sound & (moved[i] != 0.0), end + moved[i], end)
        off = jnp.abs(moved[i])
        if not affine:
            ahead = chunks.ahead[i][...]
            gap = jnp.abs(moved[i] + (end - ahead))
            flushed = ~certificate.meets(new, ahead) & (gap < certificate.LEAST)
            doubt[i] = doubt[i] + jnp.where(flushed, certificate.doubt_of_gap(new, ahead), 0.0)
            off = jnp.maximum(off, gap)
        off = off + certificate.LEAST * doubt[i]
        if bounded:
            sound = sound & certificate.may_leave(new, doubt[i], limits[1])
        height = chunks.heights[i][last] if affine else 0.0
        within, marks = (fine, coarse), (most[i], height, end, recent[i], came[i])
        fine, coarse = small(within, sound, off, *marks, floor=0.0)
        ends[i][last] = new
    return exact, fine, coarse, largest


def _by_rows(rule: Any, products: Sequence[Any], chunk: Any, sizes: Sequence[jax.Array]):
    """A rule of `certificate` for each row of P of one chunk, with the same sizes."""
    count = len(sizes)
    entries = [product[chunk] for product in products]
    return [rule(entries[count * i :][:count], sizes) for i in range(count)]


def correct(plan, chunks, done, dtypes):
    """Moves what `link` left to the starts, but for the lanes that are done.

    A start is rounded to the dtype that the step rounds to: no other can equal an end.
    """

    def move(index, nothing):
        here, there = plan.place(index, plan.chunks), plan.place(index + 1, plan.chunks)
        for start, end, dtype in zip(chunks.starts, chunks.ends, dtypes, strict=True):
            new = end[here].astype(dtype).astype(jnp.float32)
            start[there] = jnp.where(done > 0, start[there], new)
        return nothing

    lax.fori_loop(0, plan.chunks - 1, move, jnp.int32(0))
    last = plan.place(plan.chunks - 1, plan.chunks)
    for ahead, end in zip(chunks.ahead, chunks.ends, strict=True):
        ahead[...] = end[last]
