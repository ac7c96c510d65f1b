"""Multiple shooting of a nonlinear recurrence in one Mosaic TPU kernel: the forward solve.

Windows of time run one after the other with the exact state between them. In a window, chunks
advance side by side from guessed starts through the true step, and carry the product P of their
Jacobians; the starts are corrected in delta form, `s'[c+1] = e[c] + P[c] (s'[c] - s[c])`, until
the next correction would be rounding (see `certificate`). Every pass writes the states that it
computes, so the pass that is confirmed is the answer. Steps that the budget leaves open are
completed one by one. Each lane (one element of the batch, one channel) is a system of its own: it
stops, counts, is capped and is completed by itself, so its states never depend on its neighbours.
[shooting] [pararnn]
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import certificate, tiles
from pallas_kernels.cell import ElementwiseCell
from pallas_kernels.nonlinear_recurrence.tpu_backward import backward

__all__ = ["backward", "forward"]


def forward(
    cell: ElementwiseCell,
    init: Sequence[jax.Array],
    xs: Sequence[jax.Array],
    params: Sequence[jax.Array],
    *,
    tol: float | None,
    max_iters: int,
    certain: bool = False,
    reverse: bool = False,
    affine: bool = False,
    chunks: int | None = None,
    window: int | None = None,
    interpret: Any = False,
) -> tuple[list[jax.Array], jax.Array, jax.Array, jax.Array]:
    """Solves `h_t = step(h_{t-1}, x_t, p)` for all t.

    Args:
      cell: the step, elementwise.
      init: K arrays `[B, D]`, float32 or bfloat16; the states come back in their dtypes.
      xs: arrays `[T, B, D]`, float32 or bfloat16.
      params: arrays `[1, D]` or `[B, D]`.
      tol, certain: as for `certificate.limits`, and whether the Jacobian is proved: without it,
        or where the step rounds its states, only bitwise agreement counts.
      max_iters: passes over a window before it is completed step by step.
      reverse: from the last step to the first.
      affine: the step is affine in the state: one correction, and the pass that counts.
      chunks: runs per window that advance side by side; 1 is a sequential kernel.
      window: steps per block.
      interpret: as for `pl.pallas_call`.

    Returns:
      The states, K arrays `[T, B, D]`, and per element of the batch, each the worst over its
      windows and channels: passes until the test held (int32), the residual of the last pass
      (float32), and steps that were completed sequentially (int32).

    Raises:
      NotImplementedError: an operand that is neither float32 nor bfloat16.
    """
    tiles.check([*init, *xs, *params])
    steps, batch, width = xs[0].shape
    step_bytes = sum(a.dtype.itemsize for a in [*xs, *init])
    plan = tiles.make_plan(
        (steps, batch, width),
        step_bytes,
        cell.states,
        chunks=chunks,
        window=window,
        reverse=reverse,
    )
    bounded = (certain or affine) and not cell.rounds
    limits = certificate.limits(jnp.float32, tol) if bounded else (0.0, 0.0)
    kind = tiles.widest([*init, *xs, *params])
    lanes = plan.over_lanes()

    def out(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)

    counts = [out((batch, width), d) for d in (jnp.int32, jnp.float32, jnp.int32)]
    shooting = plan.chunks > 1
    size = cell.states
    *states, passes, residual, completed = pl.pallas_call(
        lambda *refs: _kernel(cell, plan, limits, max(1, max_iters), affine, refs),
        grid=plan.grid,
        in_specs=[lanes] * size
        + [plan.over_time()] * cell.inputs
        + [plan.over_lanes(p.shape[0]) for p in params],
        out_specs=[plan.over_time()] * size + [lanes] * 3,
        out_shape=[out(xs[0].shape, i.dtype) for i in init] + counts,
        # carry; then done, close, residual, and of all chunks: starts, ends, products, peaks
        scratch_shapes=tiles.scratch(plan, size + 3, (2 * size + 2 * size * size) * shooting),
        compiler_params=tiles.compiler_params(),
        interpret=interpret,
        name="nonlinear_recurrence",
    )(*init, *xs, *params)
    worst = [jnp.max(count, axis=1) for count in (passes, residual, completed)]
    return list(states), worst[0], worst[1], worst[2]


def _kernel(cell, plan, limits, budget, affine, refs):
    size, shooting = cell.states, plan.chunks > 1
    init, xs, params, states, counts, carry, flags, starts, ends, products, peaks = tiles.split(
        refs,
        size,
        cell.inputs,
        cell.params,
        size,
        3,
        size,
        3,
        size * shooting,
        size * shooting,
        size * size * shooting,
        size * size * shooting,
    )
    bounded = limits[1] > 0  # else only bits decide, and nobody asks what a correction does
    done, close, residual = flags
    passes, worst, completed = counts
    begin, inside = plan.start(), plan.inside()

    @pl.when(pl.program_id(2) == 0)
    def _():
        for c, i in zip(carry, init, strict=True):
            c[...] = i[...].astype(jnp.float32)
        for count in counts:
            count[...] = jnp.zeros(plan.row, count.dtype)

    def roll(starts):
        """All chunks through the step; writes the states, returns the last ones."""
        p = tiles.spread(params, plan.row, plan.chunks)

        def advance(index, h):
            place = plan.step(index)
            new = cell.step(h, tiles.load(xs, place, plan.chunks), p)
            h = tiles.choose(plan.exists(begin, index), new, h)
            tiles.store(states, place, h)
            return h

        return lax.fori_loop(0, plan.length, advance, list(starts))

    def roll_with_product(keep):
        """From `starts`, with the columns of P alongside; leaves `ends`, `products`, `peaks`."""
        p = tiles.spread(params, plan.row, plan.chunks)
        one, zero = jnp.ones(plan.tile, jnp.float32), jnp.zeros(plan.tile, jnp.float32)
        unit = [[one if i == j else zero for i in range(size)] for j in range(size)]

        def advance(index, loop):
            h, columns, highest = loop
            place = plan.step(index)
            new, pushed = cell.push(h, tiles.load(xs, place, plan.chunks), p, columns)
            present = plan.exists(begin, index)
            h = tiles.choose(present, new, h)
            if keep:
                tiles.store(states, place, h)
            columns = [tiles.choose(present, n, c) for n, c in zip(pushed, columns, strict=True)]
            if bounded:
                highest = jax.tree.map(lambda m, c: jnp.maximum(m, jnp.abs(c)), highest, columns)
            return h, columns, highest

        loop = ([s[...] for s in starts], unit, unit if bounded else [])
        h, columns, highest = lax.fori_loop(0, plan.length, advance, loop)
        for ref, value in zip(ends, h, strict=True):
            ref[...] = value
        for refs, matrix in ((products, columns), (peaks, highest)):
            for j, column in enumerate(matrix):
                for i, value in enumerate(column):
                    refs[size * i + j][...] = value

    def leave():
        """The last states of the rollout become the carry."""
        last = plan.place(plan.chunks - 1, plan.chunks)
        for c, e in zip(carry, ends, strict=True):
            c[...] = e[last]

    if not shooting:
        h = roll([c[...][None] for c in carry])
        for c, value in zip(carry, h, strict=True):
            c[...] = value[0]
        passes[...] = jnp.ones(plan.row, jnp.int32)
        return

    if affine:
        tiles.start_affine(plan, starts, carry)
        roll_with_product(keep=False)
        finite = tiles.link_affine(plan, starts, ends, products)
        for ref, value in zip(ends, roll([s[...] for s in starts]), strict=True):
            ref[...] = value
        exact, _, coarse, residual[...] = _link(plan, limits, starts, ends, products, peaks, carry)
        done[...] = finite * jnp.maximum(exact, coarse)
        passes[...] = jnp.ones(plan.row, jnp.int32)
    else:
        for s, c in zip(starts, carry, strict=True):
            s[...] = jnp.broadcast_to(c[...][None], plan.tile)
        done[...] = close[...] = jnp.zeros(plan.row, jnp.float32)

        def attempt(loop):
            number, _ = loop
            # A lane that is done runs along: its starts stay, so its states are written again.
            count = number + 1
            passes[...] = jnp.where(done[...] > 0, passes[...], jnp.maximum(passes[...], count))
            roll_with_product(keep=True)
            # Starts that are all the carry hold no correction yet: only their exactness counts.
            corrected = jnp.where(number > 0, 1.0, 0.0)
            found = _link(plan, limits, starts, ends, products, peaks, carry)
            exact, fine, coarse, residual[...] = found
            passed = jnp.maximum(exact, jnp.maximum(fine, coarse * close[...]) * corrected)
            done[...] = jnp.maximum(done[...], passed)
            close[...] = coarse * corrected
            dtypes = [i.dtype if cell.rounds else jnp.float32 for i in init]
            _correct(plan, starts, ends, done[...], dtypes)
            return count, tiles.any_open(inside, done)

        lax.while_loop(lambda loop: (loop[1] > 0) & (loop[0] < budget), attempt, (0, 1.0))
    worst[...] = jnp.maximum(worst[...], residual[...])

    @pl.when(tiles.any_open(inside, done) == 0)
    def _():
        leave()

    @pl.when(tiles.any_open(inside, done) > 0)
    def _():
        count = plan.steps(begin)
        p = tiles.spread(params, plan.row, 1)
        passed = done[...] > 0

        def advance(index, h):
            at = count - 1 - index if plan.reverse else index
            h = list(cell.step(h, tiles.load(xs, lambda _: at, 1), p))
            old = tiles.load(states, lambda _: at, 1)
            tiles.store(states, lambda _: at, tiles.choose(passed[None], old, h))
            return tiles.plain(h)

        h = lax.fori_loop(0, count, advance, [c[...][None] for c in carry])
        leave()
        for c, value in zip(carry, h, strict=True):
            c[...] = jnp.where(passed, c[...], value[0])
        completed[...] = completed[...] + jnp.where(passed, 0, count)


def _link(plan, limits, starts, ends, products, peaks, before) -> tuple[Any, Any, Any, Any]:
    """Tests the boundaries, and leaves each chunk's corrected successor in place of its end.

    The place of the last one gets the start of the next window. That start is corrected once more:
    an error within the limit of a window's own states would remain where they are no longer large.

    Returns:
      Four rows: 1.0 where every end is the next start; where every correction is within the first
      limit, and within the second; and the largest residual (infinite for a NaN).
    """
    size, rows = len(starts), range(len(starts))
    bounded = limits[1] > 0
    caps = []
    for end in ends:
        value = jnp.abs(end[...])
        value = jnp.where(value < jnp.inf, value, 0.0)
        caps.append(certificate.CAP * jnp.max(value, axis=0))

    def small(within, sound, off, crossing, end, recent):
        """`within`, where corrections of this size are within the limits of an end.

        On its way through the chunk the correction is held to the second limit.
        """
        now = jnp.abs(end)
        scale = functools.reduce(jnp.maximum, recent, now)
        scale = jnp.minimum(scale, certificate.SLACK * jnp.maximum(now, recent[0]))
        sound = sound & tiles.finite(end) & (crossing <= limits[1] * scale)
        return [
            jnp.where(sound & (off <= limit * scale), w, 0.0)
            for w, limit in zip(within, limits, strict=True)
        ]

    def link(index, loop):
        exact, within, largest, delta, recent = loop
        here, there = plan.place(index, plan.chunks), plan.place(index + 1, plan.chunks)
        end, start = [e[here] for e in ends], [s[there] for s in starts]
        moved = tiles.moved(size, products, here, delta)
        crossing = tiles.crossing(size, peaks, here, delta) if bounded else moved
        kept = [jnp.abs(m) <= cap for m, cap in zip(moved, caps, strict=True)]  # not a NaN
        moved = [jnp.where(keep, m, 0.0) for keep, m in zip(kept, moved, strict=True)]
        delta = [m + (e - s) for m, e, s in zip(moved, end, start, strict=True)]
        for i in rows:
            equal, met = end[i] == start[i], certificate.meets(end[i], start[i])
            exact = jnp.where(met, exact, 0.0)
            sound = kept[i] & (met | ~equal)  # no correction turns a zero
            # Of this chunk's end, and of the next one's start.
            off = jnp.maximum(jnp.abs(moved[i]), jnp.abs(delta[i]))
            within = small(within, sound, off, crossing[i], end[i], recent[i])
            residual = jnp.abs(end[i] - start[i])
            # NaN compares false: it counts as infinite.
            residual = jnp.where(residual <= jnp.inf, residual, jnp.inf)
            largest = jnp.maximum(largest, jnp.where(equal, 0.0, residual))
        for i in rows:  # where nothing moves it, the end itself, with the sign of its zero
            ends[i][here] = jnp.where(moved[i] == 0.0, end[i], end[i] + moved[i])
        recent = [(jnp.abs(end[i]), *recent[i][:-1]) for i in rows]
        return exact, within, largest, delta, recent

    zero = jnp.zeros(plan.row, jnp.float32)
    first = [jnp.abs(b[...]) for b in before]
    loop = (
        zero + 1.0,
        [zero + 1.0] * 2,
        zero,
        [zero] * size,
        [(f,) * (certificate.WINDOW - 1) for f in first],
    )
    exact, (fine, coarse), largest, delta, recent = lax.fori_loop(0, plan.chunks - 1, link, loop)
    last = plan.place(plan.chunks - 1, plan.chunks)
    moved = tiles.moved(size, products, last, delta)
    most = tiles.crossing(size, peaks, last, delta) if bounded else moved
    for end, cap, value, high, before in zip(ends, caps, moved, most, recent, strict=True):
        kept = jnp.abs(value) <= cap
        fine, coarse = small((fine, coarse), kept, jnp.abs(value), high, end[last], before)
        end[last] = jnp.where(kept & (value != 0.0), end[last] + value, end[last])
    return exact, fine, coarse, largest


def _correct(plan, starts, ends, done, dtypes):
    """Moves what `_link` left to the starts, but for the lanes that are done.

    A start is rounded to the dtype that the step rounds to: no other can equal an end.
    """

    def move(index, nothing):
        here, there = plan.place(index, plan.chunks), plan.place(index + 1, plan.chunks)
        for start, end, dtype in zip(starts, ends, dtypes, strict=True):
            new = end[here].astype(dtype).astype(jnp.float32)
            start[there] = jnp.where(done > 0, start[there], new)
        return nothing

    lax.fori_loop(0, plan.chunks - 1, move, jnp.int32(0))
