"""The one list of shapes: what the tests run is what the benchmarks time.

A shape is `(steps, batch, width)` of a time-major recurrence. `traffic` is the floor of a pass:
every input read once, every result written once; `footprint` is what the device must hold.
"""

import itertools
from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of a recurrence: T, B, D."""

    steps: int
    batch: int
    width: int


def name(shape: Shape | bool) -> str:
    """A shape in the name of a test, as `1000x2x130`; anything else as Python writes it."""
    return "x".join(map(str, shape)) if isinstance(shape, Shape) else str(shape)


class Leaves(NamedTuple):
    """How many arrays `[T, B, D]` a recurrence reads and writes.

    Attributes:
      states: state leaves.
      inputs: arrays that change with time.
      idle: those of the inputs that the adjoint does not need, as the b of `a h + b`.
    """

    states: int
    inputs: int
    idle: int = 0


# For the simulator of Mosaic GPU and for race detection: every warp is a Python loop there.
SIMULATED = (Shape(1, 2, 3), Shape(31, 1, 16), Shape(40, 1, 20), Shape(100, 1, 20))

# For interpretation on a CPU: one step, a prime length, a power of two, windows that T does not
# fill; batches and widths of one, of less than a block of a TPU (8 by 128), and of more.
INTERPRETED = (Shape(1, 1, 1), Shape(31, 9, 5), Shape(512, 2, 130), Shape(1000, 3, 7))

# On a device, against float64: a length and a width that no block divides, the corners, then sizes
# that fill it, then one long row. The last four are points of the benchmark.
ON_DEVICE = (
    Shape(1000, 2, 130),
    Shape(31, 3, 5),
    Shape(1, 1, 1),
    Shape(512, 8, 256),
    Shape(2048, 1, 2048),
    Shape(8192, 8, 256),
    Shape(65536, 1, 256),
)

# What is compiled ahead of time: the reference point of the floor estimates, and the two ends of
# the grid, where a kernel chooses other blocks.
COMPILED = (Shape(2048, 8, 256), Shape(512, 1, 256), Shape(8192, 64, 1024))

# The grid of the benchmark on a device.
LENGTHS = (512, 2048, 8192, 65536, 131072)
BATCHES = (1, 8, 64)
WIDTHS = (256, 1024, 2048)
GRID = tuple(itertools.starmap(Shape, itertools.product(LENGTHS, BATCHES, WIDTHS)))

# The benchmark's own test on a CPU.
SMOKE = (Shape(16, 1, 8), Shape(32, 2, 8))

# What of a device's memory a point may need.
SHARE_OF_MEMORY = 0.6

PASSES = ("forward", "forward_backward")


def elements(shape: Shape) -> int:
    """Entries of one array `[T, B, D]`."""
    return shape.steps * shape.batch * shape.width


def traffic(shape: Shape, leaves: Leaves, itemsize: int, which: str) -> int:
    """Bytes that a pass must move.

    Forward: inputs in, states out. Backward: inputs that it needs, states and their cotangents in,
    the inputs' cotangents out. Parameters and initial states are T times smaller and left out.

    Args:
      shape: T, B, D.
      leaves: of the recurrence.
      itemsize: bytes of an entry in storage.
      which: `forward`, `backward` or `forward_backward`.

    Returns:
      The number of bytes.

    Raises:
      ValueError: no such pass.
    """
    forward = leaves.inputs + leaves.states
    backward = 2 * leaves.inputs - leaves.idle + 2 * leaves.states
    arrays = {"forward": forward, "backward": backward, "forward_backward": forward + backward}
    if which not in arrays:
        raise ValueError(f"which={which!r} is not a pass; expected one of {sorted(arrays)}.")
    return arrays[which] * elements(shape) * itemsize


def footprint(shape: Shape, leaves: Leaves, itemsize: int, which: str) -> int:
    """Bytes that lie on the device while a pass runs: its inputs and its results.

    Args:
      shape: T, B, D.
      leaves: of the recurrence.
      itemsize: bytes of an entry in storage.
      which: a pass.

    Returns:
      The number of bytes.
    """
    arrays = leaves.inputs + leaves.states  # inputs and states
    if which != "forward":
        arrays += leaves.inputs + leaves.states  # the inputs' cotangents, the states' cotangents
    return arrays * elements(shape) * itemsize
