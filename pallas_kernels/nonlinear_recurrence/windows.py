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
# Steps of a chunk: fewer than _GOOD cost iterations (an affine step has none to lose), more than
# _LONGEST sequential steps for nothing.
_SHORTEST, _GOOD, _LONGEST = 8, 16, 32
# Chunks of a window, best first: 32 give every thread of four warpgroups one element, or two.
_COUNTS = (32, 16, 8, 4)
_MOST_WARPGROUPS = 4
# Where there are twice as many blocks as multiprocessors, two share one, each with this many
# threads and half of the shared memory: while one goes from chunk to chunk, the other rolls out.
_PAIRED_THREADS = 256
_PAIRED_MEMORY = 113 * 1024 - (227 * 1024 - SHARED_MEMORY)
_PAIRED_STATES = 2  # more take more registers than two blocks have
# Most blocks on the second axis of a CUDA grid; the first goes over channels, neighbours in memory.
_MOST_SEQUENCES = 65535


def check_batch(batch: int) -> None:
    """Refuses more sequences than one launch takes.

    Args:
      batch: their number.

    Raises:
      NotImplementedError: too many; another implementation takes them.
    """
    if batch > _MOST_SEQUENCES:
        raise NotImplementedError(f"{batch} sequences; a launch takes {_MOST_SEQUENCES}")


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
    """What decides a plan: sizes, bytes of an entry of each input, and two facts about the step.

    Attributes:
      affine: it is affine in the state.
      bounded: corrections bound its error, see `certificate`.
    """

    steps: int
    batch: int
    width: int
    states: int
    itemsizes: tuple[int, ...]
    affine: bool
    bounded: bool


def sized(problem: Problem) -> bool:
    """Whether the sizes of the states, and what it lacks, travel with their product."""
    return problem.bounded and not problem.affine


def shared_bytes(problem: Problem, block: int, chunks: int, length: int, slots: int) -> int:
    """Shared memory of a block of threads; Pallas begins every buffer at a multiple of 1024."""
    tile, k = 4 * block * chunks, problem.states
    inputs = [slots * chunks * length * block * size for size in problem.itemsizes]
    heights, peaks = k * tile * problem.affine, k * k * tile // 2 * problem.bounded
    # Ends, products, two sets of starts; rows.
    summaries = [k * tile, k * k * tile, 2 * k * tile, (12 + 12 * k) * block]
    summaries += [heights, peaks, *[k * tile // 2] * 2 * sized(problem)]
    return sum(-(-size // 1024) * 1024 for size in [*inputs, *summaries])


def _most_length(
    problem: Problem, block: int, chunks: int, slots: int, longest: int, room: int
) -> int:
    """Longest chunk, up to `longest`, whose window fits `room` bytes; 0 when none does."""
    for length in range(longest, 0, -1):
        if shared_bytes(problem, block, chunks, length, slots) <= room:
            return length
    return 0


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


def _block(problem: Problem) -> int:
    """Channels of a block: rows of 64 bytes where that leaves enough blocks."""
    narrow = max(problem.itemsizes) <= 2
    wanted = 2 * _BLOCKS_WANTED if _shareable(problem) else _BLOCKS_WANTED
    many = problem.batch * -(-problem.width // 32) >= wanted
    return 32 if narrow and many and problem.width > 16 else 16


def _shareable(problem: Problem) -> bool:
    """Whether two blocks of threads can share a multiprocessor, and gain by it."""
    return problem.states <= _PAIRED_STATES and not problem.affine


def _paired(problem: Problem, block: int) -> bool:
    """Whether two blocks of threads are to share a multiprocessor."""
    many = problem.batch * -(-problem.width // block) >= 2 * _BLOCKS_WANTED
    return many and _shareable(problem)


def choose(problem: Problem, *, chunks: int | None = None, window: int | None = None) -> Plan:
    """Picks blocks and windows that fit shared memory.

    Args:
      problem: sizes.
      chunks: of a window; None picks 32, fewer for short sequences and many states.
      window: steps of a window, a multiple of its chunks; None fills shared memory.

    Raises:
      ValueError: `chunks` or `window` that no plan can have.
      NotImplementedError: the window asked for, or any at all, does not fit.
    """
    block = _block(problem)
    rows = rows_of(block)
    if chunks is not None and (chunks < 1 or chunks % rows):
        raise ValueError(
            f"chunks={chunks}; blocks of {block} channels expect a positive multiple of {rows}."
        )
    counts = [c for c in _COUNTS if c >= rows] if chunks is None else [chunks]
    longest = _LONGEST
    if window is not None:
        counts = [c for c in counts if window > 0 and window % c == 0][:1]
        if not counts:
            raise ValueError(f"window={window}; expected a positive multiple of {chunks or rows}.")
        longest = window // counts[0]
    elif chunks is None:  # a short sequence: fewer chunks, of some length
        enough = _SHORTEST if problem.affine else _GOOD
        counts = [c for c in counts if c * enough <= problem.steps] or counts[-1:]

    if problem.affine:  # waits for memory: all threads, and more windows on their way
        tries = [(slots, count, _SHORTEST) for count in counts for slots in (3, 2)]
    else:  # computes
        tries = [(2, count, enough) for enough in (_GOOD, _SHORTEST) for count in counts]
    tries += [(1, count, _SHORTEST) for count in counts]
    rooms = [(*one, SHARED_MEMORY) for one in [*tries, (1, counts[-1], 1)]]
    if chunks is None and window is None and _paired(problem, block):
        few = min(counts[0], _PAIRED_THREADS // block)
        rooms = [(2, few, _GOOD, _PAIRED_MEMORY), *rooms]
    for slots, count, enough, room in rooms:
        most = _most_length(problem, block, count, slots, longest, room)
        if window is not None and most == longest:
            length, needed = longest, -(-problem.steps // window)
        elif window is None and most >= min(enough, -(-problem.steps // count)):
            length, needed = _lengths(problem.steps, count, most)
        else:
            continue
        return Plan(block, _warpgroups(block, count), count, length, needed, min(slots, needed))
    raise NotImplementedError(
        f"{problem.states} states, {len(problem.itemsizes)} inputs and window={window} do not fit "
        f"the {SHARED_MEMORY} bytes of shared memory"
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
