"""The vjp of a nonlinear recurrence in one Mosaic GPU kernel: only the states are saved.

The adjoint of `h_t = f(h_{t-1}, x_t, p)` is a linear recurrence that runs the other way,

    a_{t-1} = J_t^T (a_t + g_t),     dx_t, dp_t = (df/dx, df/dp)^T (a_t + g_t),

with g the states' cotangents and J recomputed at the stored `h_{t-1}`. A block of threads owns one
sequence and 16 or 32 channels and walks windows of time from the last step to the first. In a
window, C chunks of L steps run side by side, an entry of a tile `[C, channels]` each:

1. every chunk by itself, from its last step: the adjoint that leaves it when none enters, and the
   product of its J^T, column by column (`pull_state`);
2. one warpgroup goes from chunk to chunk: what enters each. A product that overflowed makes that
   non-finite; then the warpgroup takes the window's steps one after the other instead, which is
   plain backpropagation;
3. every chunk again, from what really enters it, with the whole vjp (`pull`). Inputs' cotangents
   take the inputs' place in shared memory; parameters' stay in registers to the end.

Inputs, states and cotangents are read from device memory once, by the copy engine: the next window
arrives, and the last one's results leave, while this one is worked on. `h_{t-1}` is the staged
state one row earlier; only the state before each window is gathered outside, one in C L.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic, mosaic_functions
from pallas_kernels.cell import Arrays, ElementwiseCell
from pallas_kernels.compat import mosaic_gpu
from pallas_kernels.nonlinear_recurrence import windows
from pallas_kernels.nonlinear_recurrence.gpu_adjoint import solve
from pallas_kernels.nonlinear_recurrence.gpu_adjoint_block import Block

# With fewer blocks of threads than an H100 has multiprocessors, narrower ones use more of them.
_BLOCKS_WANTED = 132
# Steps of a chunk come in this unit, so that every chunk starts at a multiple of 128 bytes, where
# the copy engine can write. Longer chunks than the second save little: nothing is iterated here.
_UNIT, _LONGEST = 4, 16
_MOST_CHUNKS, _MOST_WARPGROUPS = 32, 4
_SLOTS = 2


def choose(
    shape: tuple[int, int, int],
    step_bytes: int,
    state_bytes: int,
    states: int,
    *,
    chunks: int | None = None,
    window: int | None = None,
) -> windows.Plan:
    """Picks blocks and windows that fit shared memory.

    Args:
      shape: T, B, D.
      step_bytes: what one channel's inputs, states and cotangents of one step take.
      state_bytes: what its states take of that.
      states: K.
      chunks: of a window, rounded up to what a warpgroup holds; None picks 32, fewer for short
        sequences and many states.
      window: steps of a window, rounded up to a multiple of four times the chunks; None fills
        shared memory, or cuts a short sequence in two.

    Returns:
      The plan.

    Raises:
      ValueError: `chunks` or `window` below 1.
      NotImplementedError: what was asked for does not fit, or nothing does.
    """
    steps, batch, width = shape
    for name, value in (("chunks", chunks), ("window", window)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}; expected at least 1, or None to let it be chosen.")
    few = batch * -(-width // 32) < _BLOCKS_WANTED
    block = 16 if few or width <= 16 else 32
    rows = mosaic.rows_of(block)

    def taken(chunks: int, length: int) -> int:
        near = _SLOTS * (chunks * step_bytes + state_bytes)  # the states have a chunk more
        buffers = block * (length * near + 4 * (states**2 + 3 * states) * chunks)
        return buffers + 1024 * (states + 2)  # each begins at a multiple of 1024

    def fits(chunks: int, length: int) -> bool:
        return taken(chunks, length) <= mosaic.SHARED_MEMORY

    if chunks is None:
        counts = [c for c in (_MOST_CHUNKS, 16, 8, 4) if c % rows == 0 and fits(c, _UNIT)]
        chunks = next((c for c in counts if c * _UNIT // 2 < steps), min(counts, default=rows))
    chunks = _up(chunks, rows)
    if window is not None:
        length = _up(-(-window // chunks), _UNIT)
    else:
        lengths = [n for n in range(_LONGEST, 0, -_UNIT) if fits(chunks, n)] or [_UNIT]
        # At least two windows, so that copies of one run beside the other; and a length that
        # divides T if one does, for padding copies every array.
        lengths = [n for n in lengths if 2 * n * chunks <= steps] or [_UNIT]
        length = next((n for n in lengths if steps % n == 0), lengths[0])
    if not fits(chunks, length):
        raise NotImplementedError(
            f"{states} states and {step_bytes} bytes of inputs, states and cotangents a channel "
            f"and step, in two windows of {chunks} chunks of {length} steps, take "
            f"{taken(chunks, length)} bytes of shared memory; there are {mosaic.SHARED_MEMORY}"
        )
    groups = chunks // rows
    warpgroups = max(n for n in range(1, _MOST_WARPGROUPS + 1) if groups % n == 0)
    count = -(-steps // (chunks * length))
    return windows.Plan(block, warpgroups, chunks, length, count, _SLOTS)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


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
    """The vjp of the scan of `cell.step`, in one kernel.

    Args:
      cell: the step's vjp.
      init: state before the first step, K x [B, D].
      xs: inputs, time-major, each [T, B, D].
      params: each [1, D] or [B, D].
      states: what the forward pass returned, K x [T, B, D].
      cotangents: of the states, K x [T, B, D].
      reverse: the recurrence ran from the last step to the first.
      chunks: of a window; None to choose, else rounded up to what fits the hardware.
      window: steps of a window; likewise.
      interpret: `InterpretGPUParams` to simulate on a CPU.

    Returns:
      Cotangents of init (K x [B, D], in its dtype), of xs (like them) and of params (float32
      [B, D]: one row a sequence, also where they share a row); and for each sequence the steps
      that were taken one after the other because a product overflowed (int32 [B]).

    Raises:
      NotImplementedError: JAX older than 0.11; more states and inputs than shared memory holds;
        more than 65535 sequences; a dtype other than float32, bfloat16 and float16.
      ValueError: `chunks` or `window` below 1.
    """
    gpu = mosaic_gpu()
    for array in (*init, *xs, *params, *states, *cotangents):
        if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise NotImplementedError(
                f"the kernel stores float32, bfloat16 or float16, not {array.dtype}"
            )
    steps, batch, width = states[0].shape
    windows.check_batch(batch)
    plan = choose(
        (steps, batch, width),
        sum(a.dtype.itemsize for a in (*xs, *states, *cotangents)),
        sum(a.dtype.itemsize for a in states),
        cell.states,
        chunks=chunks,
        window=window,
    )
    if cell.using is not None:
        cell = cell.using(mosaic_functions.exact(interpret))
    blocks = -(-width // plan.block)
    short = -(-steps // plan.length) - (plan.windows - 1) * plan.chunks
    near = [[_cut(a, plan, reverse) for a in arrays] for arrays in (xs, states, cotangents)]
    start, rows = ([windows.widen(a, plan.block) for a in arrays] for arrays in (init, params))
    before = [_before(h, s, plan, short, reverse) for h, s in zip(start, near[1], strict=True)]
    groups = [*near, before, rows]

    def kernel(*refs):
        rest = iter(refs)
        sizes = [*map(len, groups), len(xs), cell.states, cell.params]
        parts = [[next(rest) for _ in range(n)] for n in sizes]
        walked = next(rest)
        parts_near = [[next(rest) for _ in range(len(arrays))] for arrays in near]
        settings = (cell, plan, reverse, -steps % plan.length, short)
        solve(Block._make([*settings, *parts, walked, *parts_near, *rest]))

    row = jax.ShapeDtypeStruct((batch, blocks * plan.block), jnp.float32)
    out = mosaic.launch(
        kernel,
        out_type=[
            *[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in near[0]],
            *[row] * (cell.states + cell.params),
            jax.ShapeDtypeStruct((blocks, batch), jnp.int32),
        ],
        scratch=[
            *_staging(plan, near[0], 0),
            *_staging(plan, near[1], 1),
            *_staging(plan, near[2], 0),
            *[
                gpu.SMEM((n, plan.chunks, plan.block), jnp.float32)
                for n in (cell.states, cell.states**2, cell.states, cell.states)
            ],
            gpu.Barrier(num_arrivals=plan.warpgroups),
            gpu.Barrier(num_arrivals=sum(map(len, near)), num_barriers=_SLOTS),
        ],
        grid=(batch, blocks),
        grid_names=("b", "d"),
        warpgroups=plan.warpgroups,
        interpret=interpret,
    )(*[array for arrays in groups for array in arrays])
    rest = iter(out)
    d_xs = [_join(next(rest), steps, width, reverse) for _ in xs]
    d_init = [next(rest)[:, :width].astype(h.dtype) for h in init]
    d_params = [next(rest)[:, :width] for _ in params]
    return d_init, d_xs, d_params, jnp.max(next(rest), axis=0)


def _cut(array: jax.Array, plan: windows.Plan, reverse: bool) -> jax.Array:
    """`[T, B, D]` to `[T / L, L, B, D]`: a view where L and the block divide, a copy elsewhere.

    Steps are added after the last one in scan order, in front when reversed.
    """
    missing = -array.shape[0] % plan.length
    array = windows.widen(array, plan.block)
    array = jnp.pad(array, [(missing, 0) if reverse else (0, missing), (0, 0), (0, 0)])
    return array.reshape(-1, plan.length, *array.shape[1:])


def _join(array: jax.Array, steps: int, width: int, reverse: bool) -> jax.Array:
    """The inverse of `_cut`."""
    flat = array.reshape(-1, *array.shape[2:])
    first = flat.shape[0] - steps if reverse else 0
    return flat[first : first + steps, :, :width]


def _before(
    init: jax.Array, states: jax.Array, plan: windows.Plan, short: int, reverse: bool
) -> jax.Array:
    """The state before each window, `[windows, B, D]` in the adjoint's order, from `[T / L, L, B,
    D]`; the last window has `short` chunks, and `init` before it."""
    last = init.astype(states.dtype)[None]
    if reverse:
        return jnp.concatenate([states[plan.chunks :: plan.chunks, 0], last])
    return jnp.concatenate([states[short - 1 : -1 : plan.chunks, -1][::-1], last])


def _staging(plan: windows.Plan, arrays: Sequence[jax.Array], more: int) -> list[Any]:
    """Shared memory for two windows of each array, with so many chunks more."""
    shape = (_SLOTS, plan.chunks + more, plan.length, plan.block)
    return [mosaic_gpu().SMEM(shape, a.dtype) for a in arrays]
