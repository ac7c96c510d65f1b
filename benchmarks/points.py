"""What is measured, most informative first; what would not fit the device is named."""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks import recurrences
from pallas_kernels.shapes import PASSES, SHARE_OF_MEMORY, Leaves, Shape, footprint

ITEMSIZE = {"float32": 4, "bfloat16": 2}
OPS = ("gru", "lstm", "linear", "linear2")
KERNEL, SCAN, SOLVER = "kernel", "lax.scan", "newton_scan:"

# Where `jp.auto` has to choose: from too small for a kernel to the sizes of training.
CROSSOVER = tuple(
    Shape(steps, batch, width)
    for steps in (128, 512, 2048, 8192, 65536)
    for batch, width in ((1, 8), (1, 256), (8, 256), (8, 1024), (64, 1024))
)


class Point(NamedTuple):
    """One row: an implementation of a pass over a recurrence of a shape and storage."""

    op: str
    dtype: str
    which: str
    shape: Shape
    implementation: str


def _tier(shape: Shape) -> int:
    """How soon a shape is measured: the reference, the targets, the long rows, the rest."""
    if shape == Shape(2048, 8, 256):
        return 0
    if shape.batch * shape.width >= 2048 and shape.steps in (2048, 8192):
        return 1
    if shape.batch == 1 and shape.width == 256:
        return 2
    return 3


def grid(shapes: Sequence[Shape], ops: Sequence[str], dtypes: Sequence[str]) -> list[Point]:
    """Every op on every shape: the kernel and `lax.scan`, forward, then with gradients.

    Args:
      shapes: T, B, D.
      ops: of `OPS`.
      dtypes: of `ITEMSIZE`.

    Returns:
      The points in the order in which they are measured.
    """
    points = [
        Point(op, dtype, which, shape, implementation)
        for shape in shapes
        for dtype in dtypes
        for op in ops
        for which in PASSES
        for implementation in (KERNEL, SCAN)
    ]

    def rank(point: Point) -> int:
        # lax.scan takes most of the time: beside every target it waits until targets are known.
        late = point.implementation == SCAN and _tier(point.shape) % 2 == 1
        return 2 * _tier(point.shape) + 3 * dtypes.index(point.dtype) + 4 * late

    return sorted(points, key=rank)


def crossover(paths: Sequence[str], shapes: Sequence[Shape] = CROSSOVER) -> list[Point]:
    """The points that `jp.auto` is fitted from: its paths beside `lax.scan`.

    Args:
      paths: names of `jaxpara.recurrence.rule.PATHS`.
      shapes: T, B, D.

    Returns:
      Points in float32, with gradients.
    """
    return [
        Point(op, "float32", "forward_backward", shape, implementation)
        for shape in sorted(shapes, key=lambda s: s.steps * s.batch * s.width)
        for op in ("gru", "lstm")
        for implementation in (SCAN, *(SOLVER + path for path in paths))
    ]


def needs(point: Point) -> int:
    """Bytes that lie on the device while a point is measured.

    Args:
      point: which.

    Returns:
      The number of bytes.
    """
    leaves: Leaves = recurrences.leaves(point.op)
    return footprint(point.shape, leaves, ITEMSIZE[point.dtype], point.which)


def fitting(points: Sequence[Point], memory: int) -> tuple[list[Point], list[Point]]:
    """Those that fit, and those that would need more than their share of the memory.

    Args:
      points: in order.
      memory: of the device, in bytes.

    Returns:
      Both lists, in order, without repetitions.
    """
    points = list(dict.fromkeys(points))
    most = SHARE_OF_MEMORY * memory
    return [p for p in points if needs(p) <= most], [p for p in points if needs(p) > most]
