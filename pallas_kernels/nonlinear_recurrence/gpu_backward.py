"""The vjp of a nonlinear recurrence in one Mosaic GPU kernel: nothing is saved but the states.

The adjoint of `h_t = f(h_{t-1}, x_t, p)` is a linear recurrence that runs the other way,

    a_{t-1} = J_t^T (a_t + g_t),     dx_t, dp_t = (df/dx, df/dp)^T (a_t + g_t),

with g the states' cotangents and J recomputed at the stored `h_{t-1}`. A block of threads owns one
sequence and 16 or 32 channels and walks windows of time from the last step to the first. In a
window, C chunks of L steps run side by side, an element of a tile `[C, channels]` each:

1. every chunk alone, from the last of its steps: the adjoint that leaves it when none enters, and
   the product of its J^T, column by column (`pull_state`);
2. one warpgroup goes from chunk to chunk: what enters each. A chunk product that overflowed makes
   that non-finite; then this warpgroup takes the window's steps one after the other instead, which
   is backpropagation as it stands;
3. every chunk again, from what really enters it, with the whole vjp (`pull`). Inputs' cotangents
   take the inputs' place in shared memory; parameters' cotangents stay in registers to the end.

Inputs, states and cotangents are read from device memory once, by the copy engine: while one
window is worked on, the next one arrives. `h_{t-1}` is the staged state one row earlier; only the
state before each window is gathered outside, one in C L.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.cell import ElementwiseCell
from pallas_kernels.compat import mosaic_gpu

Arrays = Sequence[jax.Array]

# With fewer blocks of threads than an H100 has multiprocessors, narrower ones use more of them.
MULTIPROCESSORS = 132

# A copy lands on a multiple of 128 bytes of shared memory. The states' windows start one chunk in:
# four steps of 16 channels of two bytes.
LENGTH_UNIT = 4

# Longer chunks save rows of step 2 and nothing else: the backward pass does not iterate.
LONGEST = 16

# Rows of step 2 that are read before the first of them is needed.
AHEAD = 4


class Plan(NamedTuple):
    """The blocks of one call: `windows` x `chunks` x `length` steps cover `steps`.

    Attributes:
      steps: T.
      block: channels of a block of threads.
      chunks: runs of a window that advance side by side.
      length: steps of a chunk.
      warpgroups: of a block of threads; each holds `chunks / warpgroups` rows of a tile.
      reverse: whether the recurrence runs from the last step to the first, its adjoint forwards.
    """

    steps: int
    block: int
    chunks: int
    length: int
    warpgroups: int
    reverse: bool

    @property
    def window(self) -> int:
        return self.chunks * self.length

    @property
    def windows(self) -> int:
        return -(-self.steps // self.window)

    @property
    def padding(self) -> int:
        """Steps that do not exist; they lie where the adjoint starts."""
        return self.windows * self.window - self.steps


def make_plan(
    shape: tuple[int, int, int],
    dtypes: Sequence[Any],
    leaves: int,
    *,
    chunks: int | None,
    window: int | None,
    reverse: bool,
) -> Plan:
    """Chooses the blocks: two windows of every staged array must fit shared memory.

    Args:
      shape: (T, B, D).
      dtypes: of the staged arrays: inputs, states, cotangents.
      leaves: K.
      chunks: runs side by side, rounded up to what a warpgroup holds; None chooses.
      window: steps at a time, rounded up to a multiple of four times the chunks; None chooses.
      reverse: the recurrence's direction.

    Returns:
      The plan.

    Raises:
      ValueError: chunks or window below 1.
      NotImplementedError: the smallest window does not fit.
    """
    steps, batch, width = shape
    for name, value in (("chunks", chunks), ("window", window)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}; expected at least 1, or None to let it be chosen.")
    wide = width > 16 and batch * -(-width // 32) >= MULTIPROCESSORS
    block = 32 if wide else 16
    unit = mosaic.rows_of(block)

    def space(chunks: int, length: int) -> int:
        entries = sum(jnp.dtype(d).itemsize for d in dtypes) * chunks
        entries += sum(jnp.dtype(d).itemsize for d in dtypes[-leaves:]) * 1  # the row before
        summaries = 4 * (leaves * leaves + 3 * leaves) * chunks
        # Every buffer starts at a multiple of 1024 bytes.
        return (2 * entries * length + summaries) * block + 1024 * (len(dtypes) + 4)

    def up(value: int, unit: int) -> int:
        return -(-value // unit) * unit

    def longest(chunks: int) -> int:
        """The length that suits: balanced windows, no longer than what fits."""
        most = max(
            (n for n in range(LENGTH_UNIT, LONGEST + 1, LENGTH_UNIT)
             if space(chunks, n) <= mosaic.SHARED_MEMORY), default=0,
        )  # fmt: skip
        if window is not None:
            return up(-(-window // chunks), LENGTH_UNIT)
        if not most:
            return LENGTH_UNIT
        windows = -(-steps // (chunks * most))
        return up(-(-steps // (windows * chunks)), LENGTH_UNIT)

    if chunks is None:
        fits = [c for c in (32, 16, 8) if space(c, LENGTH_UNIT) <= mosaic.SHARED_MEMORY]
        # No more chunks than a short sequence fills.
        chunks = next((c for c in fits if (c // 2) * LENGTH_UNIT < steps), unit)
    chunks = up(chunks, unit)
    length = longest(chunks)
    if space(chunks, length) > mosaic.SHARED_MEMORY:
        raise NotImplementedError(
            f"a window of {chunks} chunks of {length} steps of {len(dtypes)} arrays and {leaves} "
            f"state leaves takes {space(chunks, length)} bytes of shared memory; there are "
            f"{mosaic.SHARED_MEMORY}: give a smaller chunks= or window=."
        )
    warpgroups = next(n for n in (4, 2, 1) if chunks % (n * unit) == 0)
    return Plan(steps, block, chunks, length, warpgroups, reverse)


def backward(
    cell: ElementwiseCell,
    init: Arrays,
    xs: Arrays,
    params: Arrays,
    states: Arrays,
    cotangents: Arrays,
    *,
    reverse: bool = False,
    chunks: int | None = None,
    window: int | None = None,
    interpret: Any = None,
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array], jax.Array]:
    """The vjp of `states = scan(cell.step)` in one launch.

    Args:
      cell: the step and its vjp.
      init: K arrays `[B, D]`.
      xs: inputs `[T, B, D]`.
      params: `[1, D]` or `[B, D]` each.
      states: K arrays `[T, B, D]`, what the forward pass returned.
      cotangents: of the states, K arrays `[T, B, D]`.
      reverse: the recurrence ran from the last step to the first.
      chunks: runs of a window side by side, rounded up to what a warpgroup holds; None chooses.
      window: steps at a time, rounded up to a multiple of four times the chunks; None chooses.
      interpret: what `plgpu.kernel` takes: `InterpretGPUParams()` simulates on a CPU.

    Returns:
      Cotangents of init (in its dtype), of xs (in theirs), of params (`[B, D]` float32, one row a
      sequence), and the steps `int32 [B]` that a sequence took one after the other.

    Raises:
      NotImplementedError: JAX is older than 0.11, a dtype, or no window fits shared memory.
      ValueError: chunks or window below 1.
    """
    mosaic_gpu()
    for array in (*init, *xs, *params, *states, *cotangents):
        if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise NotImplementedError(
                f"the GPU kernels store float32, bfloat16 or float16; got {array.dtype}."
            )
    steps, batch, width = states[0].shape
    dtypes = [a.dtype for a in (*xs, *states, *cotangents)]
    plan = make_plan(
        (steps, batch, width), dtypes, cell.states, chunks=chunks, window=window, reverse=reverse
    )
    padded = -(-width // plan.block) * plan.block

    def widened(array: jax.Array) -> jax.Array:
        return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, padded - width)])

    def split(array: jax.Array) -> jax.Array:
        # A copy only if T or D is no multiple of the window or the block.
        early, late = (plan.padding, 0) if reverse else (0, plan.padding)
        array = jnp.pad(widened(array), ((early, late), (0, 0), (0, 0)))
        return array.reshape(plan.windows, plan.chunks, plan.length, batch, padded)

    inputs, saved, given = ([split(a) for a in arrays] for arrays in (xs, states, cotangents))
    befores = []
    for start, state in zip(init, saved, strict=True):
        first = widened(start).astype(state.dtype)[None]
        pair = [state[1:, 0, 0], first] if reverse else [first, state[:-1, -1, -1]]
        befores.append(jnp.concatenate(pair))

    row = jax.ShapeDtypeStruct((batch, padded), jnp.float32)
    blocks = padded // plan.block
    kernel = mosaic.launch(
        functools.partial(_kernel, cell, plan),
        out_type=[
            *[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs],
            *[row] * (cell.states + cell.params),
            jax.ShapeDtypeStruct((batch, blocks), jnp.int32),
        ],
        scratch=_scratch(cell, plan, dtypes),
        grid=(batch, blocks),
        grid_names=("b", "d"),
        warpgroups=plan.warpgroups,
        interpret=interpret,
    )
    out = kernel(*inputs, *saved, *given, *befores, *[widened(p) for p in params])
    d_inputs, d_init, d_params, (slow,) = _split(out, cell.inputs, cell.states, cell.params, 1)
    exist = slice(plan.padding, None) if reverse else slice(0, steps)
    return (
        [d[:, :width].astype(a.dtype) for d, a in zip(d_init, init, strict=True)],
        [d.reshape(-1, batch, padded)[exist, :, :width] for d in d_inputs],
        [d[:, :width] for d in d_params],
        slow.max(axis=1),
    )


def _split(values: Sequence[Any], *sizes: int) -> list[list[Any]]:
    """Consecutive parts of the given sizes."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [list(values[end - size : end]) for end, size in zip(ends, sizes, strict=True)]


def _scratch(cell: ElementwiseCell, plan: Plan, dtypes: Sequence[Any]) -> list[Any]:
    gpu = mosaic_gpu()
    k = cell.states
    # The states have room for one chunk more: its last row is the state before the window.
    chunks = [plan.chunks + (cell.inputs <= i < cell.inputs + k) for i in range(len(dtypes))]
    return [
        *[gpu.SMEM((2, c, plan.length, plan.block), d) for c, d in zip(chunks, dtypes, strict=True)],
        *[gpu.SMEM((n, plan.chunks, plan.block), jnp.float32) for n in (k, k * k, k, k)],
        gpu.Barrier(num_arrivals=len(dtypes), num_barriers=2),
        gpu.Barrier(num_arrivals=plan.warpgroups),
    ]


def _kernel(cell: ElementwiseCell, plan: Plan, *refs: Any) -> None:
    gpu = mosaic_gpu()
    leaves, block, chunks, length = range(cell.states), plan.block, plan.chunks, plan.length
    k, g = cell.states, cell.inputs
    whole, befores, params, d_inputs, d_init, d_params, (slow,), staged, summaries, barriers = (
        _split(refs, g + 2 * k, k, cell.params, g, k, cell.params, 1, g + 2 * k, 4, 2)
    )
    xs, states, cotangents = _split(staged, g, k, k)
    # Per chunk: the adjoint that leaves it if none enters; its product of J^T; the adjoint that
    # enters it; the adjoint that leaves it. Separate buffers: see the barriers below.
    alone, product, entering, leaving = summaries
    loaded, met = barriers

    tiles, rows = mosaic.tile_layout(block), mosaic.row_layout(block)
    b, d, wg = lax.axis_index("b"), lax.axis_index("d"), lax.axis_index("wg")
    here = pl.ds(d * block, block)
    mine = pl.ds(wg * (chunks // plan.warpgroups), chunks // plan.warpgroups)
    # One warpgroup speaks to the copy engine, whose groups are counted per thread; while it does,
    # the first one does step 2.
    copier = plan.warpgroups - 1

    def place(index: Any, size: int) -> Any:
        """Where in memory the `index`-th of `size` things lies, in the adjoint's order."""
        return index if plan.reverse else size - 1 - index

    def before(chunk: Any, step: Any) -> tuple[Any, Any]:
        """Where the state before a chunk's step is staged: one row earlier in scan order."""
        if plan.reverse:
            last = step == length - 1
            return chunk + last.astype(jnp.int32), lax.select(last, 0, step + 1)
        inner = step > 0
        return chunk + inner.astype(jnp.int32), lax.select(inner, step - 1, length - 1)

    def fetch(w: Any, slot: Any) -> None:
        """Starts the copies of a window, and copies the row before it."""
        margin = 0 if plan.reverse else 1
        for i, (source, target) in enumerate(zip(whole, staged, strict=True)):
            room = target.at[slot]
            if g <= i < g + k:
                room = target.at[slot, pl.ds(margin, chunks)]
            gpu.copy_gmem_to_smem(source.at[w, :, :, b, here], room, loaded.at[slot])
        edge = (chunks, 0) if plan.reverse else (0, length - 1)
        for source, target in zip(befores, states, strict=True):
            mosaic.store(target.at[slot, *edge], mosaic.load(source.at[w, b, here], rows))

    def read(slot: Any, chunk: Any, step: Any, layout: Any) -> tuple[Any, Any, Any]:
        """States before, inputs and cotangents of a step: of my chunks, or of one chunk's row."""
        if isinstance(chunk, pl.Slice):
            start, row = before(chunk.start, step)
            previous = (slot, pl.ds(start, chunk.size), row)
        else:
            previous = (slot, *before(chunk, step))
        return (
            [mosaic.load(ref.at[previous], layout) for ref in states],
            [mosaic.load(ref.at[slot, chunk, step], layout) for ref in xs],
            [mosaic.load(ref.at[slot, chunk, step], layout) for ref in cotangents],
        )

    def full(value: float) -> jax.Array:
        return mosaic.full((mine.size, block), value, tiles)

    def existing(w: Any) -> Callable[[Any, Arrays], list[jax.Array]]:
        """Puts zeros where a step of my chunks does not exist: nothing flows through padding."""
        if not plan.padding:
            return lambda step, values: list(values)
        row = gpu.broadcasted_iota(jnp.int32, (mine.size, block), 0, layout=tiles)
        first = (row + (w * chunks + mine.start)) * length
        return lambda step, values: [jnp.where(exists(first + step), v, 0.0) for v in values]

    def exists(t: Any) -> Any:
        return t >= plan.padding if plan.reverse else t < plan.steps

    def add(left: Arrays, right: Arrays) -> list[jax.Array]:
        return [a + b for a, b in zip(left, right, strict=True)]

    per_row = [mosaic.load(p.at[b if p.shape[0] > 1 else 0, here], rows) for p in params]
    per_tile = [mosaic.spread(p, mine.size, tiles) for p in per_row]

    def chunks_alone(slot: Any, real: Callable) -> None:
        def step(j: Any, carry: Any) -> Any:
            at = place(j, length)
            adjoint, columns = carry
            h, x, given = read(slot, mine, at, tiles)
            adjoint = real(at, cell.pull_state(h, x, per_tile, add(adjoint, given)))
            return adjoint, [real(at, cell.pull_state(h, x, per_tile, c)) for c in columns]

        one = [[full(float(i == j)) for i in leaves] for j in leaves]
        adjoint, columns = lax.fori_loop(0, length, step, ([full(0.0)] * k, one))
        for i in leaves:
            mosaic.store(alone.at[i, mine], adjoint[i])
            for j in leaves:
                mosaic.store(product.at[j * k + i, mine], columns[j][i])

    def chunk_to_chunk(w: Any, slot: Any) -> Any:
        """What enters every chunk, in `entering`; returns whether step by step."""
        arriving = [mosaic.load(leaving.at[i, place(chunks - 1, chunks)], rows) for i in leaves]
        one = mosaic.full((block,), 1.0, rows)

        def some(j: Any, carry: Any) -> Any:
            adjoint, bad = carry
            at = [place(j * AHEAD + n, chunks) for n in range(AHEAD)]
            ends = [[mosaic.load(alone.at[i, c], rows) for i in leaves] for c in at]
            maps = [[mosaic.load(product.at[n, c], rows) for n in range(k * k)] for c in at]
            for c, end, columns in zip(at, ends, maps, strict=True):
                for i in leaves:
                    mosaic.store(entering.at[i, c], adjoint[i])
                adjoint = [
                    sum((columns[j * k + i] * adjoint[j] for j in leaves), end[i]) for i in leaves
                ]
                for value in adjoint:  # NaN does not compare
                    bad = jnp.where(jnp.abs(value) < jnp.inf, bad, one)
            return adjoint, bad

        _, bad = lax.fori_loop(0, chunks // AHEAD, some, (arriving, one * 0.0))
        # Every warp holds the whole row, so all of them come to the same answer.
        overflowed = jnp.max(bad) > 0.0

        def one_chunk(j: Any, adjoint: Any) -> Any:
            chunk = place(j, chunks)
            for i in leaves:
                mosaic.store(entering.at[i, chunk], adjoint[i])

            def step(n: Any, adjoint: Any) -> Any:
                at = place(n, length)
                h, x, given = read(slot, chunk, at, rows)
                new = cell.pull_state(h, x, per_row, add(adjoint, given))
                if not plan.padding:
                    return new
                there = exists((w * chunks + chunk) * length + at)
                return [jnp.where(there, a, old) for a, old in zip(new, adjoint, strict=True)]

            return lax.fori_loop(0, length, step, adjoint)

        lax.fori_loop(0, lax.select(overflowed, chunks, 0), one_chunk, arriving)
        return overflowed

    def chunks_again(slot: Any, real: Callable, totals: Arrays) -> Any:
        def step(j: Any, carry: Any) -> Any:
            at = place(j, length)
            adjoint, totals = carry
            h, x, given = read(slot, mine, at, tiles)
            d_h, d_x, d_p = cell.pull(h, x, per_tile, add(adjoint, given))
            for ref, value in zip(xs, d_x, strict=True):
                # In place: each element is read and written by the one thread that holds it.
                mosaic.store(ref.at[slot, mine, at], value)
            return real(at, d_h), add(totals, real(at, d_p))

        adjoint = [mosaic.load(entering.at[i, mine], tiles) for i in leaves]
        adjoint, totals = lax.fori_loop(0, length, step, (adjoint, list(totals)))
        for i in leaves:
            mosaic.store(leaving.at[i, mine], adjoint[i])
        return totals

    for i in leaves:
        mosaic.store(leaving.at[i, mine], full(0.0))

    @pl.when(wg == copier)
    def _():
        fetch(place(0, plan.windows), 0)

    # The row before the first window was written by the copier and is read by all.
    mosaic.sync(met)

    def window(i: Any, carry: Any) -> Any:
        totals, count = carry
        w, slot = place(i, plan.windows), i % 2
        # The window's copies have landed: every thread that reads them waits for them itself.
        gpu.barrier_wait(loaded.at[slot])
        real = existing(w)
        chunks_alone(slot, real)
        # Step 2 reads what all warpgroups wrote to `alone` and `product`. Also, nobody is still
        # at work on the window before, whose slot is about to be filled.
        mosaic.sync(met)

        @pl.when(wg == copier)
        def _():
            # The slot's cotangents have left for device memory: the copy engine is done reading
            # what it is about to overwrite.
            gpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(i + 1 < plan.windows)
            def _():
                fetch(place(i + 1, plan.windows), 1 - slot)

        overflowed = lax.cond(wg == 0, lambda: chunk_to_chunk(w, slot), lambda: False)
        # Step 3 reads `entering`, written by the first warpgroup.
        mosaic.sync(met)
        totals = chunks_again(slot, real, totals)
        # Each thread hands what it wrote in place over to the copy engine ...
        gpu.commit_smem()
        # ... and all have, before the copier starts the copies. The next step 2 reads `leaving`,
        # and the next step 1 may overwrite `alone` and `product`, which step 2 has read by now.
        mosaic.sync(met)

        @pl.when(wg == copier)
        def _():
            for source, target in zip(xs, d_inputs, strict=True):
                gpu.copy_smem_to_gmem(source.at[slot], target.at[w, :, :, b, here])

        took = plan.window - lax.select(i == 0, plan.padding, 0)
        return totals, count + lax.select(overflowed, took, 0)

    start = ([full(0.0)] * cell.params, jnp.int32(0))
    totals, count = lax.fori_loop(0, plan.windows, window, start)

    @pl.when(wg == 0)
    def _():
        slow[b, d] = count
        for i in leaves:
            row = mosaic.load(leaving.at[i, place(chunks - 1, chunks)], rows)
            mosaic.store(d_init[i].at[b, here], row)

    for total, target in zip(totals, d_params, strict=True):
        mosaic.store(alone.at[0, mine], total)
        # The first warpgroup adds up the rows of all.
        mosaic.sync(met)

        @pl.when(wg == 0)
        def _(target: Any = target):
            row = lax.fori_loop(
                0,
                chunks,
                lambda c, row: row + mosaic.load(alone.at[0, c], rows),
                mosaic.full((block,), 0.0, rows),
            )
            mosaic.store(target.at[b, here], row)

        # It has read them: the next parameter may take their place.
        mosaic.sync(met)

    @pl.when(wg == copier)
    def _():
        # Shared memory outlives the copies out of it.
        gpu.wait_smem_to_gmem(0)
