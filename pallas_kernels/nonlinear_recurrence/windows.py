"""How the GPU kernel cuts time and channels: windows of C chunks of L steps, blocks of channels.

One block of threads owns 16 or 32 channels of one sequence and walks its windows in order; the
inputs of a window, and of the next one where they fit, lie in its shared memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic import SHARED_MEMORY, rows_of

# Fewer blocks than this leave multiprocessors of an H100 idle.
_BLOCKS_WANTED = 132
# Shorter chunks cost iterations, longer ones sequential steps; measured in interpretation.
_SHORTEST, _LONGEST = 8, 32
_MOST_CHUNKS, _MOST_WARPGROUPS = 32, 4


class Plan(NamedTuple):
    """Attributes: channels of a block, warpgroups, chunks C, steps L of a chunk, windows, slots.

    `slots` windows of inputs lie in shared memory at once: with two, the next one is copied while
    this one is solved.
    """

    block: int
    warpgroups: int
    chunks: int
    length: int
    windows: int
    slots: int

    @property
    def window(self) -> int:
        """Steps of a window."""
        return self.chunks * self.length


class Problem(NamedTuple):
    """Sizes that decide a plan; `step_bytes` is what one channel's inputs of one step take."""

    steps: int
    batch: int
    width: int
    states: int
    step_bytes: int


def shared_bytes(problem: Problem, block: int, chunks: int, length: int, slots: int) -> int:
    """Shared memory of a block: inputs; ends, products and two sets of starts; carry and vote."""
    k = problem.states
    summaries = (k + k * k + 2 * k) * chunks + k + 2
    return block * (slots * chunks * length * problem.step_bytes + 4 * summaries)


def _most_length(problem: Problem, block: int, chunks: int, slots: int) -> int:
    """Longest chunk whose window fits; not positive when none does."""
    fixed = shared_bytes(problem, block, chunks, 0, slots)
    return (SHARED_MEMORY - fixed) // (block * slots * chunks * problem.step_bytes)


def _lengths(steps: int, chunks: int, most: int) -> tuple[int, int]:
    """Steps of a chunk and number of windows: no padding where a good length divides `steps`."""
    for length in range(most, most // 2, -1):
        if steps % (chunks * length) == 0:
            return length, steps // (chunks * length)
    windows = -(-steps // (chunks * most))
    return -(-steps // (chunks * windows)), windows


def _warpgroups(block: int, chunks: int) -> int:
    """As many as chunks can feed, one row of threads each, at most four."""
    groups = chunks // rows_of(block)
    return max(n for n in range(1, _MOST_WARPGROUPS + 1) if groups % n == 0)


def choose(problem: Problem, *, chunks: int | None = None, window: int | None = None) -> Plan:
    """Picks blocks and windows that fit shared memory.

    Args:
      problem: sizes.
      chunks: of a window; None picks 32, fewer for short sequences and many states.
      window: steps of a window, a multiple of `chunks`; None fills shared memory.

    Raises:
      ValueError: `chunks` or `window` that no plan can have.
      NotImplementedError: not even one step a chunk fits.
    """
    few = problem.batch * -(-problem.width // 32) < _BLOCKS_WANTED
    block = 16 if few or problem.width <= 16 else 32
    rows = rows_of(block)
    if chunks is not None and (chunks < rows or chunks % rows):
        raise ValueError(
            f"chunks={chunks}; blocks of {block} channels expect a positive multiple of {rows}."
        )
    if window is not None and (window < 1 or window % (chunks or rows)):
        raise ValueError(f"window={window}; expected a multiple of chunks={chunks or rows}.")
    if chunks is None and window is not None:
        chunks = rows
    if window is not None and chunks is not None:
        counts, longest = [chunks], window // chunks
    else:
        counts = [chunks] if chunks else [c for c in (32, 16, 8) if c <= _MOST_CHUNKS]
        if chunks is None:  # short sequences: chunks of at least eight steps, while there are any
            counts = [c for c in counts if c * _SHORTEST <= problem.steps] or [rows]
        longest = _LONGEST

    fits = [
        (c, slots, min(longest, _most_length(problem, block, c, slots)))
        for slots in (2, 1)
        for c in counts
    ]
    wanted = longest if window is not None else min(_SHORTEST, -(-problem.steps // counts[-1]))
    for c, slots, most in [f for f in fits if f[2] >= wanted] or fits:
        if most < (longest if window is not None else 1):
            continue
        if window is not None:
            length, windows = most, -(-problem.steps // window)
        else:
            length, windows = _lengths(problem.steps, c, most)
        return Plan(block, _warpgroups(block, c), c, length, windows, min(slots, windows))
    raise NotImplementedError(
        f"{problem.states} states and {problem.step_bytes} bytes of inputs a channel and step do "
        f"not fit the {SHARED_MEMORY} bytes of shared memory"
    )


def widen(array: jax.Array, block: int) -> jax.Array:
    """Pads the last axis to whole blocks with copies of the last channel.

    Copies, not zeros: a channel that does not exist must not be the one that fails to converge.
    """
    missing = -array.shape[-1] % block
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)], mode="edge")


def cut(xs: Sequence[jax.Array], plan: Plan, reverse: bool) -> list[jax.Array]:
    """`[T, B, D]` to `[windows, C, L, B, D]`: a view where the lengths divide, a copy elsewhere.

    What is missing is added after the last step in scan order, that is in front when reversed.
    """

    def one(x):
        x = widen(x, plan.block)
        missing = plan.windows * plan.window - x.shape[0]
        x = jnp.pad(x, [(missing, 0) if reverse else (0, missing), (0, 0), (0, 0)])
        return x.reshape(plan.windows, plan.chunks, plan.length, *x.shape[1:])

    return [one(x) for x in xs]


def join(states: jax.Array, steps: int, width: int, reverse: bool) -> jax.Array:
    """The inverse of `cut`."""
    flat = states.reshape(-1, *states.shape[3:])
    first = flat.shape[0] - steps if reverse else 0
    return flat[first : first + steps, :, :width]
