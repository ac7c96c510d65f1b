"""The adjoint of a nonlinear recurrence in one Mosaic TPU kernel.

With `g_t` the cotangent that a state gets from outside, `a_{t-1} = J_t^T (g_t + a_t)`, J_t the
Jacobian of step t at the stored states: affine in `a`, so chunks of a window advance side by side
from zero with the product of their `J^T`, a scan over the chunks makes their inflows exact, and a
second pass over the window (it is still in VMEM) computes what inputs and parameters get. A chunk
product that overflows where backpropagation stays finite is noticed, and the lane's window is done
step by step instead. [shooting] [pararnn]
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import tiles
from pallas_kernels.cell import ElementwiseCell


def backward(
    cell: ElementwiseCell,
    init: Sequence[jax.Array],
    xs: Sequence[jax.Array],
    params: Sequence[jax.Array],
    states: Sequence[jax.Array],
    cotangents: Sequence[jax.Array],
    *,
    reverse: bool = False,
    chunks: int | None = None,
    window: int | None = None,
    interpret: Any = False,
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array], jax.Array]:
    """Cotangents of everything that `forward` was given, at the states that it returned.

    Args:
      cell: the step, elementwise.
      init: K arrays `[B, D]`, float32 or bfloat16.
      xs: arrays `[T, B, D]`.
      params: arrays `[1, D]` or `[B, D]`.
      states: K arrays `[T, B, D]`.
      cotangents: of the states, K arrays `[T, B, D]`.
      reverse: as for `forward`: the recurrence ran from the last step to the first.
      chunks: runs per window that advance side by side; 1 is a sequential kernel.
      window: steps per block.
      interpret: as for `pl.pallas_call`.

    Returns:
      Cotangents of `init` (in its dtypes), of `xs` (in theirs) and of the parameters (float32,
      `[B, D]` each: the caller sums what it has broadcast), and for each element of the batch the
      steps that were done sequentially, the most over its channels (int32).

    Raises:
      NotImplementedError: an operand that is neither float32 nor bfloat16.
    """
    operands = [*init, *xs, *params, *states, *cotangents]
    tiles.check(operands)
    (steps, batch, width), size = xs[0].shape, cell.states
    step_bytes = sum(a.dtype.itemsize for a in [*xs, *xs, *states, *cotangents])
    # The adjoint runs against the recurrence.
    plan = tiles.make_plan(
        (steps, batch, width),
        step_bytes,
        size,
        chunks=chunks,
        window=window,
        reverse=not reverse,
    )
    kind = tiles.widest(operands)
    lanes, time = plan.over_lanes(), plan.over_time()

    def before(b, d, w):
        """The state before the window's first step (in the recurrence's order)."""
        start = plan.place(w, plan.grid[2]) * plan.window
        if plan.reverse:
            return jnp.maximum(start - 1, 0), b, d
        return jnp.minimum(start + plan.window, plan.time - 1), b, d

    def out(array):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, manual_axis_type=kind)

    def per_lane(dtype):
        return jax.ShapeDtypeStruct((batch, width), dtype, manual_axis_type=kind)

    shooting = plan.chunks > 1
    results = pl.pallas_call(
        lambda *refs: _kernel(cell, plan, refs),
        grid=plan.grid,
        in_specs=[lanes] * size
        + [time] * cell.inputs
        + [plan.over_lanes(p.shape[0]) for p in params]
        + [time] * size
        + [pl.BlockSpec((1, *plan.row), before)] * size
        + [time] * size,
        out_specs=[lanes] * size + [time] * cell.inputs + [lanes] * (cell.params + 1),
        out_shape=[out(i) for i in init]
        + [out(x) for x in xs]
        + [per_lane(jnp.float32)] * cell.params
        + [per_lane(jnp.int32)],
        # carry; then done, and of all chunks: starts, ends, products
        scratch_shapes=tiles.scratch(plan, size + 1, (2 * size + size * size) * shooting),
        compiler_params=tiles.compiler_params(),
        interpret=interpret,
        name="nonlinear_recurrence_backward",
    )(*init, *xs, *params, *states, *states, *cotangents)
    d_init, d_xs, d_params, (completed,) = tiles.split(results, size, cell.inputs, cell.params, 1)
    return d_init, d_xs, d_params, jnp.max(completed, axis=1)


def _kernel(cell, plan, refs):
    size, shooting = cell.states, plan.chunks > 1
    (
        init, xs, params, states, outside, cotangents,
        d_init, d_xs, d_params, (completed,),
        carry, (done,), starts, ends, products,
    ) = tiles.split(
        refs,
        size, cell.inputs, cell.params, size, size, size,
        size, cell.inputs, cell.params, 1,
        size, 1, size * shooting, size * shooting, size * size * shooting,
    )  # fmt: skip
    begin, inside = plan.start(), plan.inside()
    before = _before(plan, begin, init, states, outside)

    @pl.when(pl.program_id(2) == 0)
    def _():
        for ref in [*carry, *d_params, completed]:
            ref[...] = jnp.zeros(plan.row, ref.dtype)

    def at_step(place, chunks=plan.chunks):
        """States before the chunks' steps at `place`, their inputs and their cotangents."""
        return before(place, chunks), *(tiles.load(r, place, chunks) for r in (xs, cotangents))

    def products_of_chunks():
        """Adjoints of all chunks from `starts`, with the columns of their products."""
        p = tiles.spread(params, plan.row, plan.chunks)
        one, zero = jnp.ones(plan.tile, jnp.float32), jnp.zeros(plan.tile, jnp.float32)
        unit = [[one if i == j else zero for i in range(size)] for j in range(size)]

        def advance(index, loop):
            a, columns = loop
            h, x, g = at_step(plan.step(index))
            present = plan.exists(begin, index)
            new = cell.pull_state(h, x, p, [u + v for u, v in zip(g, a, strict=True)])
            pulled = [cell.pull_state(h, x, p, column) for column in columns]
            return tiles.choose(present, new, a), [
                tiles.choose(present, n, c) for n, c in zip(pulled, columns, strict=True)
            ]

        a, columns = lax.fori_loop(0, plan.length, advance, ([s[...] for s in starts], unit))
        for ref, value in zip(ends, a, strict=True):
            ref[...] = value
        for j, column in enumerate(columns):
            for i, value in enumerate(column):
                products[size * i + j][...] = value

    def everything(starts):
        """Adjoints from exact inflows; writes the inputs' cotangents, sums the parameters'."""
        p = tiles.spread(params, plan.row, plan.chunks)

        def advance(index, loop):
            a, sums = loop
            place = plan.step(index)
            h, x, g = at_step(place)
            present = plan.exists(begin, index)
            new, d_x, d_p = cell.pull(h, x, p, [u + v for u, v in zip(g, a, strict=True)])
            tiles.store(d_xs, place, d_x)
            d_p = tiles.choose(present, d_p, [0.0] * cell.params)
            sums = [s + jnp.sum(d, axis=0) for s, d in zip(sums, d_p, strict=True)]
            return tiles.choose(present, new, a), sums

        zeros = [jnp.zeros(plan.row, jnp.float32)] * cell.params
        return lax.fori_loop(0, plan.length, advance, (list(starts), zeros))

    def add(sums):
        for ref, value in zip(d_params, sums, strict=True):
            ref[...] = ref[...] + value

    def finish(values):
        for ref, leaf, value in zip(carry, d_init, values, strict=True):
            ref[...] = value
            leaf[...] = value.astype(leaf.dtype)  # the last window's stays

    if not shooting:
        a, sums = everything([c[...][None] for c in carry])
        add(sums)
        finish([value[0] for value in a])
        return

    tiles.start_affine(plan, starts, carry)
    products_of_chunks()
    done[...] = tiles.link_affine(plan, starts, ends, products)
    a, sums = everything([s[...] for s in starts])
    for value in a:  # an adjoint may overflow inside a chunk whose product does not
        over = jnp.sum(jnp.where(tiles.finite(value), 0.0, 1.0), axis=0)
        done[...] = jnp.where(over > 0, 0.0, done[...])
    last = plan.place(plan.chunks - 1, plan.chunks)
    a = [value[last] for value in a]
    some = tiles.any_open(inside, done)

    @pl.when(some == 0)
    def _():
        add(sums)
        finish(a)

    @pl.when(some > 0)
    def _():
        count = plan.steps(begin)
        p = tiles.spread(params, plan.row, 1)
        passed = done[...] > 0

        # The adjoint goes from step to step through `carry`: as a loop's value, a single row may
        # have a layout that Mosaic cannot change (see tiles.plain).
        def advance(index, sums):
            at = count - 1 - index if plan.reverse else index
            h, x, g = at_step(lambda _: at, 1)
            now = [u + c[...][None] for u, c in zip(g, carry, strict=True)]
            new, d_x, d_p = cell.pull(h, x, p, now)
            for c, value in zip(carry, new, strict=True):
                c[...] = value[0]
            old = tiles.load(d_xs, lambda _: at, 1)
            tiles.store(d_xs, lambda _: at, tiles.choose(passed[None], old, d_x))
            return [s + d[0] for s, d in zip(sums, d_p, strict=True)]

        zeros = [jnp.zeros(plan.row, jnp.float32)] * cell.params
        slow = lax.fori_loop(0, count, advance, zeros)
        add(tiles.choose(passed, sums, slow))
        finish(tiles.choose(passed, a, [c[...] for c in carry]))
        completed[...] = completed[...] + jnp.where(passed, 0, count)


def _before(plan, begin, init, states, outside):
    """How to read the states before a step: the row next to it, another block's, or `init`."""
    offset = -1 if plan.reverse else 1
    # `init` stands beyond the recurrence's first step, which the last block may not end with.
    inner = not plan.reverse and plan.time % plan.window != 0

    def one(ref, edge, first, at):
        """The state before the window's step `at`, `[rows, lanes]`."""
        beyond = jnp.clip(at + offset, 0, plan.window - 1)
        value = jnp.where(beyond == at, edge, ref[beyond].astype(jnp.float32))
        return jnp.where(begin + at == plan.time - 1, first, value) if inner else value

    def read(place, chunks):
        values = []
        for ref, edge, first in zip(states, outside, init, strict=True):
            first = first[...].astype(jnp.float32)
            at_end = begin == 0 if plan.reverse else begin + plan.window >= plan.time
            edge = jnp.where(at_end, first, edge[0].astype(jnp.float32))
            rows = [one(ref, edge, first, place(c)) for c in range(chunks)]
            values.append(jnp.stack(rows))
        return values

    return read
