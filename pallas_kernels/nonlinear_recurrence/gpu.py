"""Multiple shooting in one Mosaic GPU kernel: the forward solve.

One block of threads owns a block of channels of one sequence. It walks the windows of time in
order, each from the exact state that the one before left. In a window, a pass rolls C chunks out
through the true step from guessed starts `s[c]`, all side by side, and carries the product `P[c]`
of their Jacobians along; then every end `e[c]` is compared with the next start, and

    s'[c+1] = e[c] + P[c] (s'[c] - s[c])

corrects the starts, over C rows in shared memory, until the next correction would be rounding (see
`certificate`). The rollout that passed is in device memory. A window that `max_iters` passes leave
open is walked step by step. The copy engine brings inputs into shared memory once, those of the
next window while this one is solved.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import certificate, mosaic, mosaic_functions
from pallas_kernels.cell import ElementwiseCell
from pallas_kernels.compat import mosaic_gpu
from pallas_kernels.nonlinear_recurrence import windows
from pallas_kernels.nonlinear_recurrence.gpu_block import (
    Block,
    carried,
    channels,
    load_row,
    stage,
)
from pallas_kernels.nonlinear_recurrence.gpu_link import FLAGS
from pallas_kernels.nonlinear_recurrence.gpu_window import correct_once, iterate, walk

# Steps of a rollout that are unrolled: their addresses become constants.
_UNROLL = 4


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
    interpret: Any = None,
) -> tuple[list[jax.Array], jax.Array, jax.Array, jax.Array]:
    """Solves `h_t = cell.step(h_{t-1}, x_t, params)` for all t in one kernel.

    Args:
      cell: the step and its Jacobian.
      init: state before the first step, K x [B, D]; its dtype is that of the states.
      xs: inputs, time-major, each [T, B, D].
      params: each [1, D] or [B, D].
      tol, certain: as for `certificate.limits`, and whether the Jacobian is proved: without it,
        or where the step rounds its states, only bitwise agreement counts.
      max_iters: passes over a window before it is walked step by step.
      reverse: from the last step to the first.
      affine: the step is affine in the state: one correction, and the pass that counts.
      chunks: of a window; None to choose.
      window: steps of a window; None to choose.
      interpret: `InterpretGPUParams` to simulate on a CPU.

    Returns:
      States, K x [T, B, D]; and for each sequence the largest number of passes that a window took
      (int32 [B]; 1 if affine), the largest difference of an end and the next start in a window's
      last pass (float32 [B]; infinite for NaN or if none was tested), and the steps walked
      (int32 [B]).

    Raises:
      NotImplementedError: JAX older than 0.11; a cell without inputs or with more state than
        shared memory holds; a dtype other than float32, bfloat16 and float16; too large a batch.
      ValueError: `chunks` or `window` that no plan can have, or no pass allowed.
    """
    gpu = mosaic_gpu()
    _check(init, xs, params, max_iters)
    steps, batch, width = xs[0].shape
    windows.check_batch(batch)
    itemsizes = tuple(x.dtype.itemsize for x in xs)
    bounded = (certain or affine) and not cell.rounds
    problem = windows.Problem(steps, batch, width, cell.states, itemsizes, affine, bounded)
    plan = windows.choose(problem, chunks=chunks, window=window)
    blocks = -(-width // plan.block)
    cut = windows.cut(xs, plan, reverse)
    rows = [windows.widen(a, plan.block) for a in (*params, *init)]
    inputs = (len(xs), len(params), len(init))
    rough = None
    if cell.using is not None:
        if max_iters > 2:  # a rough pass, one that corrects, one that counts
            rough = cell.using(mosaic_functions.rough(interpret))
        cell = cell.using(mosaic_functions.exact(interpret))
    limits = certificate.limits(jnp.float32, tol) if bounded else (0.0, 0.0)
    unroll = _UNROLL if interpret is None else 1

    def solve(*refs):
        rest = iter(refs)
        settings = (cell, rough, plan, limits, max_iters, reverse, unroll)
        missing = steps if steps < plan.windows * plan.window else None
        groups = [[next(rest) for _ in range(n)] for n in (*inputs, len(init), 3, len(xs))]
        own = dict(zip(buffers, rest, strict=True))
        _solve(Block(*settings, missing, [h.dtype for h in init], *groups, **own), affine)

    per_sequence = [jax.ShapeDtypeStruct((blocks, batch), t) for t in (jnp.int32, jnp.float32)]
    tile = (plan.chunks, plan.block)
    buffers = {
        "ends": gpu.SMEM((cell.states, *tile), jnp.float32),
        "products": gpu.SMEM((cell.states**2, *tile), jnp.float32),
        "starts": gpu.SMEM((2, cell.states, *tile), jnp.float32),
        "rows": gpu.SMEM((FLAGS + 3 * cell.states, plan.block), jnp.float32),
        "arrived": gpu.Barrier(num_arrivals=plan.warpgroups),
        "copied": gpu.Barrier(num_arrivals=len(xs), num_barriers=plan.slots),
    }
    if affine:
        buffers["heights"] = gpu.SMEM((cell.states, *tile), jnp.float32)
    if bounded:
        buffers["peaks"] = gpu.SMEM((cell.states**2, *tile), jnp.bfloat16)
    if windows.sized(problem):
        buffers["sizes"] = gpu.SMEM((cell.states, *tile), jnp.bfloat16)
        buffers["lacking"] = gpu.SMEM((cell.states, *tile), jnp.bfloat16)
    kernel = mosaic.launch(
        solve,
        out_type=[
            *[jax.ShapeDtypeStruct(cut[0].shape, h.dtype) for h in init],
            *per_sequence,
            per_sequence[0],
        ],
        scratch=[
            *[gpu.SMEM((plan.slots, plan.chunks, plan.length, plan.block), x.dtype) for x in xs],
            *buffers.values(),
        ],
        grid=(batch, blocks),
        grid_names=("b", "d"),
        warpgroups=plan.warpgroups,
        interpret=interpret,
    )
    *states, iterations, residual, walked = kernel(*cut, *rows)
    return (
        [windows.join(s, steps, width, reverse) for s in states],
        jnp.max(iterations, axis=0),
        jnp.max(residual, axis=0),
        jnp.max(walked, axis=0),
    )


def _check(init, xs, params, max_iters) -> None:
    if max_iters < 1:
        raise ValueError(f"max_iters={max_iters}; expected at least one pass.")
    if not xs:
        raise NotImplementedError("a cell without inputs leaves the kernel nothing to stage")
    for array in (*init, *xs, *params):
        if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise NotImplementedError(
                f"the kernel stores float32, bfloat16 or float16, not {array.dtype}"
            )


def _solve(block: Block, affine: bool) -> None:
    """The kernel's body: all windows of one block of channels of one sequence."""
    plan, states = block.plan, range(block.cell.states)
    b, d, wg = lax.axis_index("b"), lax.axis_index("d"), lax.axis_index("wg")
    here = channels(block)

    @pl.when(wg == 0)
    def _():
        for k in states:
            mosaic.store(carried(block, k), load_row(block, block.init[k].at[b, here]))
        for first in range(plan.slots - 1):
            stage(block, first)

    # Every warpgroup is about to read the carry that warpgroup 0 wrote.
    mosaic.sync(block.arrived)
    params = [load_row(block, p.at[0 if p.shape[0] == 1 else b, here]) for p in block.params]

    def window(w, report):
        iterations, residual, walked = report
        slot = w % plan.slots
        ahead = w + plan.slots - 1

        @pl.when((wg == 0) & (ahead < plan.windows))
        def _():
            # The slot was last read in a window that ended with a commit and a sync of all threads.
            stage(block, ahead)

        # Every thread waits for the copies itself: that is what makes them visible to it.
        mosaic_gpu().barrier_wait(block.copied.at[slot])
        outcome = (correct_once if affine else iterate)(block, w, slot, params)

        @pl.when((wg == 0) & (outcome.still > 0.0))
        def _():
            walk(block, w, slot, params)

        @pl.when((wg == 0) & (outcome.still == 0.0))
        def _():
            first = FLAGS + outcome.starts * len(states)
            for k in states:
                mosaic.store(carried(block, k), load_row(block, block.rows.at[first + k]))

        # The copy engine is about to write where all have read inputs: their reads come first.
        if plan.slots < plan.windows:
            mosaic_gpu().commit_smem()
        # All read the carry next, and write over starts and ends that warpgroup 0 has read; it
        # lets the copy engine into the slot.
        mosaic.sync(block.arrived)
        count = plan.window
        if block.steps is not None:
            count = jnp.minimum(count, block.steps - w * count)
        return (
            jnp.maximum(iterations, outcome.passes),
            jnp.maximum(residual, outcome.worst),
            walked + jnp.where(outcome.still > 0.0, count, 0),
        )

    nothing = (jnp.int32(0), jnp.float32(0.0), jnp.int32(0))
    iterations, residual, walked = lax.fori_loop(0, plan.windows, window, nothing)

    @pl.when(wg == 0)
    def _():
        for ref, value in zip(block.report, (iterations, residual, walked), strict=True):
            ref[d, b] = value
