"""How the TPU kernels cut a time-major recurrence into blocks, and how they read a step of it.

An array `[T, B, D]` is taken in blocks of a window of time by `rows` batch elements by `lanes`
channels, as it lies in memory: no transposed, shifted or padded copy. A window holds `chunks` runs
of `length` steps. One step of all its chunks is a tile `[chunks, rows, lanes]`, stacked from one
register tile a chunk. Blocks that reach beyond the array hold garbage there: `Plan.exists` drops
the results of a step beyond T, and lanes beyond B or D never decide anything (`inside`).
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Most VMEM that is asked of the compiler: v5e and v6e have 128 MiB, of which 16 and 32 are given
# without asking. Double-buffered blocks take five parts of twelve: 20 MiB.
VMEM_BYTES = 48 * 2**20

# Up to this many lanes (eight sublanes a row at least) a step mostly waits for its own latency,
# and chunks fill the time; above it the vector unit is busy, every further pass over a window is
# paid in full, and a sequential kernel is quicker. Estimated from latencies and operation counts
# of a GRU; nothing here has been timed on a TPU.
IDLE_LANES = 2048


def vmem() -> int:
    """Bytes of VMEM that a kernel may ask for: three quarters of what a core of the device has.

    JAX's own table says how much that is: 16 MiB up to v4, 64 in v5p and v7, 128 in v5e and v6e.
    Without a TPU, where kernels are only lowered or interpreted, it is taken to be the last.
    """
    try:
        has = pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        has = 128 * 2**20
    return min(VMEM_BYTES, 3 * has // 4)


class Plan(NamedTuple):
    """The blocks of one call. `windows` x `chunks` x `length` steps cover `time`."""

    time: int
    batch: int
    width: int
    rows: int
    lanes: int
    chunks: int
    length: int
    reverse: bool

    @property
    def window(self) -> int:
        return self.chunks * self.length

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks of the batch, of the channels, and windows: the last runs in scan order."""
        return (
            pl.cdiv(self.batch, self.rows),
            pl.cdiv(self.width, self.lanes),
            pl.cdiv(self.time, self.window),
        )

    @property
    def tile(self) -> tuple[int, int, int]:
        return self.chunks, self.rows, self.lanes

    @property
    def row(self) -> tuple[int, int]:
        return self.rows, self.lanes

    def place(self, index: Any, count: int) -> Any:
        """Where in memory the `index`-th of `count` windows, chunks or steps lies in scan order."""
        return count - 1 - index if self.reverse else index

    def step(self, index: Any) -> Callable[[int], Any]:
        """Where in a window the chunks' `index`-th steps lie: a function of the chunk in memory."""
        at = self.place(index, self.length)
        return lambda chunk: chunk * self.length + at

    def over_time(self) -> pl.BlockSpec:
        """Blocks of an array `[T, B, D]`, one window after the other in scan order."""
        return pl.BlockSpec(
            (self.window, *self.row), lambda b, d, w: (self.place(w, self.grid[2]), b, d)
        )

    def over_lanes(self, batch: int | None = None) -> pl.BlockSpec:
        """Blocks of an array `[B, D]`, or `[1, D]` if `batch` is 1, that stay for all windows."""
        if batch == 1:
            return pl.BlockSpec((1, self.lanes), lambda b, d, w: (0, d))
        return pl.BlockSpec(self.row, lambda b, d, w: (b, d))

    def start(self) -> Any:
        """Where in memory the window of this grid step begins."""
        return self.place(pl.program_id(2), self.grid[2]) * self.window

    def steps(self, start: Any) -> Any:
        """How many steps of the window that begins at `start` lie before T."""
        return (
            self.window
            if self.time % self.window == 0
            else jnp.minimum(self.window, self.time - start)
        )

    def exists(self, start: Any, index: Any) -> jax.Array | None:
        """Which chunks have their `index`-th step before T, as a tile; None if all have."""
        if self.time % self.window == 0:
            return None
        first = start + self.place(index, self.length)
        return lax.broadcasted_iota(jnp.int32, self.tile, 0) * self.length + first < self.time

    def inside(self) -> jax.Array | None:
        """Which lanes of this block lie within B and D, or None if all always do.

        Like `start` it asks for the grid step, which no loop or branch of a kernel may.
        """
        if self.batch % self.rows == 0 and self.width % self.lanes == 0:
            return None
        row = lax.broadcasted_iota(jnp.int32, self.row, 0) + pl.program_id(0) * self.rows
        lane = lax.broadcasted_iota(jnp.int32, self.row, 1) + pl.program_id(1) * self.lanes
        return (row < self.batch) & (lane < self.width)


def make_plan(
    shape: tuple[int, int, int],
    step_bytes: int,
    leaves: int,
    *,
    chunks: int | None,
    window: int | None,
    reverse: bool,
) -> Plan:
    """Chooses the blocks.

    Args:
      shape: (T, B, D).
      step_bytes: what one element of one step takes over all arrays that run with time.
      leaves: K; more leaves fill the vector unit with fewer chunks.
      chunks: runs per window that advance side by side; None chooses, 1 is a sequential kernel.
      window: steps per block; None takes what fits VMEM.
      reverse: scan order runs against memory.

    Raises:
      NotImplementedError: the window that was asked for does not fit VMEM.
    """
    time, batch, width = shape
    for name, value in (("chunks", chunks), ("window", window)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}; expected at least 1, or None to let it be chosen.")
    rows = min(batch, 8)
    padded = -(-batch // 8) * 8
    if chunks is None:
        chunks = 1 if padded * width > IDLE_LANES else 16 if leaves == 1 else 8
        # Chunks of fewer steps cost iterations.
        chunks = max(1, min(chunks, time // 16))
    # A sequential kernel hides the latency of a step with lanes instead.
    lanes = min(width, 512 if chunks == 1 else 128)
    # Two buffers a block; few rows lie in VMEM as a power of two (at least two for bfloat16).
    tile_bytes = 2 * step_bytes * max(2, 1 << (rows - 1).bit_length()) * (-(-lanes // 128) * 128)
    room = vmem()
    steps = min(window or max(chunks, 5 * room // 12 // tile_bytes), time)
    # Windows of about equal length, each a whole number of chunks.
    steps = -(-time // -(-time // steps))
    length = -(-steps // min(chunks, steps))
    plan = Plan(time, batch, width, rows, lanes, -(-steps // length), length, reverse)
    row_bytes = tile_bytes // (2 * step_bytes) * 4
    # Starts, ends, two magnitudes, products and their peaks come on top of the blocks.
    summaries = (4 * leaves + 2 * leaves**2) * plan.chunks * row_bytes if plan.chunks > 1 else 0
    needed = plan.window * tile_bytes + summaries
    if needed > 0.8 * room:
        raise NotImplementedError(
            f"a window of {plan.window} steps takes {needed / 2**20:.0f} MiB of VMEM; expected at "
            f"most {0.8 * room / 2**20:.0f}: pass a smaller window, or None."
        )
    return plan


def load(refs: Sequence[Any], place: Callable[[int], Any], chunks: int) -> list[jax.Array]:
    """One row of each chunk, in float32: `[chunks, rows, lanes]` of each of `refs`."""
    places = [place(c) for c in range(chunks)]
    return [jnp.stack([ref[at].astype(jnp.float32) for at in places]) for ref in refs]


def plain(values: Sequence[jax.Array]) -> list[jax.Array]:
    """The same arrays of one chunk, in the layout that a stack of rows has.

    What a loop hands on must have one layout, and Mosaic cannot change every one that a single
    row may have got from bfloat16 inputs or from constants ("Sublane broadcast").
    """
    return [jnp.stack([v[0], v[0]])[:1] for v in values]


def store(refs: Sequence[Any], place: Callable[[int], Any], values: Sequence[jax.Array]) -> None:
    """Writes what `load` would read."""
    for ref, value in zip(refs, values, strict=True):
        for c in range(value.shape[0]):
            ref[place(c)] = value[c].astype(ref.dtype)


def spread(params: Sequence[Any], row: tuple[int, int], chunks: int) -> list[jax.Array]:
    """Parameters `[1 or rows, lanes]` in float32 for a step of so many chunks."""
    values = [jnp.broadcast_to(p[...].astype(jnp.float32), row) for p in params]
    # Stacked: Mosaic refuses some broadcasts of a single row to [chunks, 1, lanes].
    return [jnp.stack([v] * chunks) for v in values]


def choose(mask: jax.Array | None, new: Any, old: Any) -> list[jax.Array]:
    """`new` where `mask` holds (everywhere if it is None), else `old`, leaf by leaf."""
    if mask is None:
        return list(new)
    return [jnp.where(mask, n, o) for n, o in zip(new, old, strict=True)]


def finite(value: jax.Array) -> jax.Array:
    return jnp.abs(value) < jnp.inf


def check(arrays: Sequence[jax.Array]) -> None:
    """Refuses what this backend cannot store."""
    for array in arrays:
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(
                f"the TPU kernels store float32 or bfloat16; got an operand of {array.dtype}."
            )


def widest(arrays: Sequence[jax.Array]) -> Any:
    """Over which mesh axes the results vary: those of the operand that varies over the most."""
    types = [jax.typeof(a).manual_axis_type for a in arrays]
    return max(types, key=lambda t: len(t.varying) if t is not None else 0)


def compiler_params() -> Any:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem()
    )


def scratch(plan: Plan, rows: int, tiles: int) -> list[Any]:
    """`rows` float32 buffers of one row and `tiles` of one tile."""
    return [pltpu.VMEM(plan.row, jnp.float32)] * rows + [pltpu.VMEM(plan.tile, jnp.float32)] * tiles


def split(values: Sequence[Any], *sizes: int) -> list[list[Any]]:
    """Cuts a flat list of refs into lists of these lengths."""
    parts, at = [], 0
    for size in sizes:
        parts.append(list(values[at : at + size]))
        at += size
    assert at == len(values), (at, len(values))
    return parts


def any_open(inside: jax.Array | None, done: Any) -> jax.Array:
    """1.0 if some lane within B and D is not done, else 0.0: a scalar, as a predicate must be."""
    still = 1.0 - done[...]
    return jnp.max(still if inside is None else jnp.where(inside, still, 0.0))


def moved(
    size: int, products: Sequence[Any], chunk: Any, delta: Sequence[jax.Array]
) -> list[jax.Array]:
    """`P delta` of one chunk; `products` is row-major."""
    rows = ([product[chunk] for product in products[size * i :][:size]] for i in range(size))
    return [functools.reduce(operator.add, map(operator.mul, row, delta)) for row in rows]


def start_affine(plan: Plan, starts: Sequence[Any], carry: Sequence[Any]) -> None:
    """The exact start for the first chunk, zero for the others."""
    first = lax.broadcasted_iota(jnp.int32, plan.tile, 0) == plan.place(0, plan.chunks)
    for start, value in zip(starts, carry, strict=True):
        start[...] = jnp.where(first, value[...][None], 0.0)


def link_affine(
    plan: Plan, starts: Sequence[Any], ends: Sequence[Any], products: Sequence[Any]
) -> jax.Array:
    """Exact starts of all chunks from their affine maps, which were rolled from `start_affine`.

    Returns:
      1.0 in the lanes where everything stayed finite.
    """
    size = len(starts)

    def link(index, loop):
        holds, delta = loop
        here, there = plan.place(index, plan.chunks), plan.place(index + 1, plan.chunks)
        new = []
        for end, shift in zip(ends, moved(size, products, here, delta), strict=True):
            # Where nothing moves it, the end itself, with the sign of its zero.
            new.append(jnp.where(shift == 0.0, end[here], end[here] + shift))
            holds = jnp.where(finite(new[-1]), holds, 0.0)
        for start, value in zip(starts, new, strict=True):
            start[there] = value
        return holds, new

    zero = jnp.zeros(plan.row, jnp.float32)
    return lax.fori_loop(0, plan.chunks - 1, link, (zero + 1.0, [zero] * size))[0]
