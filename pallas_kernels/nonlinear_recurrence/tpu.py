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

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import certificate, tiles
from pallas_kernels.cell import ElementwiseCell
from pallas_kernels.nonlinear_recurrence.tpu_backward import backward
from pallas_kernels.nonlinear_recurrence.tpu_link import Chunks, correct, link
from pallas_kernels.products import became, lacked, moved

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
    ways = 1 if affine else 2 * bounded  # heights; or sizes, and what P lacks
    *states, passes, residual, completed = pl.pallas_call(
        lambda *refs: _kernel(cell, plan, limits, max(1, max_iters), affine, refs),
        grid=plan.grid,
        in_specs=[lanes] * size
        + [plan.over_time()] * cell.inputs
        + [plan.over_lanes(p.shape[0]) for p in params],
        out_specs=[plan.over_time()] * size + [lanes] * 3,
        out_shape=[out(xs[0].shape, i.dtype) for i in init] + counts,
        # carry; done, close, residual; ahead; of all chunks: starts, ends, products, peaks, and
        # heights, or sizes and what products lack
        scratch_shapes=tiles.scratch(
            plan, 2 * size + 3, (2 * size + 2 * size * size + size * ways) * shooting
        ),
        compiler_params=tiles.compiler_params(),
        interpret=interpret,
        name="nonlinear_recurrence",
    )(*init, *xs, *params)
    worst = [jnp.max(count, axis=1) for count in (passes, residual, completed)]
    return list(states), worst[0], worst[1], worst[2]


def _kernel(cell, plan, limits, budget, affine, refs):
    size, shooting = cell.states, plan.chunks > 1
    bounded = limits[1] > 0  # else only bits decide, and nobody asks what a correction does
    # Starts of an affine step have gone through its product: where that vanishes, gaps show it.
    sized = bounded and not affine
    init, xs, params, states, counts, carry, flags, *summaries = tiles.split(
        refs,
        size,
        cell.inputs,
        cell.params,
        size,
        3,
        size,
        3,
        size,
        size * shooting,
        size * shooting,
        size * size * shooting,
        size * size * shooting,
        size * affine * shooting,
        size * sized * shooting,
        size * sized * shooting,
    )
    chunks = Chunks(*summaries)
    starts, ends = chunks.starts, chunks.ends
    done, close, residual = flags
    passes, worst, completed = counts
    begin, inside = plan.start(), plan.inside()

    @pl.when(pl.program_id(2) == 0)
    def _():
        for c, i in zip(carry, init, strict=True):
            c[...] = i[...].astype(jnp.float32)
        for count in counts:
            count[...] = jnp.zeros(plan.row, count.dtype)

    def higher(old, new):
        return jax.tree.map(lambda o, n: jnp.maximum(o, jnp.abs(n)), old, new) if bounded else old

    def roll(starts):
        """All chunks through the step; writes the states, returns the last and the largest ones."""
        p = tiles.spread(params, plan.row, plan.chunks)

        def advance(index, loop):
            h, height = loop
            place = plan.step(index)
            new = cell.step(h, tiles.load(xs, place, plan.chunks), p)
            h = tiles.choose(plan.exists(begin, index), new, h)
            tiles.store(states, place, h)
            return h, higher(height, h) if shooting else height

        heights = [jnp.abs(s) for s in starts] if shooting else []
        return lax.fori_loop(0, plan.length, advance, (list(starts), heights))

    def roll_with_product(keep):
        """From the starts, with the columns of P alongside; leaves all else of `chunks`."""
        p = tiles.spread(params, plan.row, plan.chunks)
        one, zero = jnp.ones(plan.tile, jnp.float32), jnp.zeros(plan.tile, jnp.float32)
        unit = [[one if i == j else zero for i in range(size)] for j in range(size)]

        def advance(index, loop):
            h, columns, most, came, lacking = loop
            place = plan.step(index)
            inputs = tiles.load(xs, place, plan.chunks)
            if sized:  # the Jacobian itself moves the product, what it lacks, and the sizes
                new, jacobian = cell.push(h, inputs, p, unit)
                pushed = [moved(jacobian, column) for column in columns]
                arriving = became(jacobian, came, new)
                lacks, full = lacked(jacobian, columns, pushed, lacking, most, h, new)
            else:
                new, pushed = cell.push(h, inputs, p, columns)
                arriving, lacks, full = came, lacking, pushed
            present = plan.exists(begin, index)
            h = tiles.choose(present, new, h)
            if keep:
                tiles.store(states, place, h)
            columns = [tiles.choose(present, n, c) for n, c in zip(pushed, columns, strict=True)]
            risen = [tiles.choose(present, f, m) for f, m in zip(full, most, strict=True)]
            came = tiles.choose(present, arriving, came)
            lacking = tiles.choose(present, lacks, lacking)
            return h, columns, higher(most, risen), came, lacking

        first = [s[...] for s in starts]
        along = ([jnp.abs(f) for f in first], [zero] * size) if sized else ([], [])
        loop = (first, unit, unit, *along)
        h, columns, most, came, lacking = lax.fori_loop(0, plan.length, advance, loop)
        refs = (*ends, *chunks.sizes, *chunks.lacking)
        for ref, value in zip(refs, (*h, *came, *lacking), strict=True):
            ref[...] = value
        for refs, matrix in ((chunks.products, columns), (chunks.peaks, most)):
            for j, column in enumerate(matrix):
                for i, value in enumerate(column):
                    refs[size * i + j][...] = value

    def leave():
        """The last states of the rollout become the carry."""
        last = plan.place(plan.chunks - 1, plan.chunks)
        for c, e in zip(carry, ends, strict=True):
            c[...] = e[last]

    if not shooting:
        h, _ = roll([c[...][None] for c in carry])
        for c, value in zip(carry, h, strict=True):
            c[...] = value[0]
        passes[...] = jnp.ones(plan.row, jnp.int32)
        return

    if affine:
        tiles.start_affine(plan, starts, carry)
        roll_with_product(keep=False)
        finite = tiles.link_affine(plan, starts, ends, chunks.products)
        found = roll([s[...] for s in starts])
        for refs, values in zip((ends, chunks.heights), found, strict=True):
            for ref, value in zip(refs, values, strict=True):
                ref[...] = value
        exact, _, coarse, residual[...] = link(plan, limits, chunks, carry, affine)
        done[...] = finite * jnp.maximum(exact, coarse)
        passes[...] = jnp.ones(plan.row, jnp.int32)
    else:
        for s, c in zip(starts, carry, strict=True):
            s[...] = jnp.broadcast_to(c[...][None], plan.tile)
        for a, c in zip(chunks.ahead, carry, strict=True):
            a[...] = c[...]
        done[...] = close[...] = jnp.zeros(plan.row, jnp.float32)

        def attempt(loop):
            number, _ = loop
            # A lane that is done runs along: its starts stay, so its states are written again.
            count = number + 1
            passes[...] = jnp.where(done[...] > 0, passes[...], jnp.maximum(passes[...], count))
            roll_with_product(keep=True)
            # Starts that are all the carry hold no correction yet: only their exactness counts.
            corrected = jnp.where(number > 0, 1.0, 0.0)
            found = link(plan, limits, chunks, carry, affine)
            exact, fine, coarse, residual[...] = found
            passed = jnp.maximum(exact, jnp.maximum(fine, coarse * close[...]) * corrected)
            done[...] = jnp.maximum(done[...], passed)
            close[...] = coarse * corrected
            dtypes = [i.dtype if cell.rounds else jnp.float32 for i in init]
            correct(plan, chunks, done[...], dtypes)
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
