"""The points to measure, the most informative first, and those that would not fit the device."""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks import recurrences
from pallas_kernels.shapes import PASSES, SHARE_OF_MEMORY, Leaves, Shape, footprint

ITEMSIZE = {"float32": 4, "bfloat16": 2}
OPS = ("gru", "lstm", "linear", "linear2")
KERNEL, SCAN, SOLVER = "kernel", "lax.scan", "newton_scan:"

# Shapes among which `jp.auto` chooses: from too small for a kernel to the sizes of training.
CROSSOVER = tuple(
    Shape(steps, batch, width)
    for steps in (128, 512, 2048, 8192, 65536)
    for batch, width in ((1, 8), (1, 256), (8, 256), (8, 1024), (64, 1024))
)
# A coarse map: `jp.auto` looks up the nearest point.
COARSE = tuple(
    Shape(steps, batch, width)
    for steps in (128, 2048, 65536)
    for batch, width in ((1, 8), (8, 256), (64, 1024))
)
# Their places in `in_order`: after the targets and the long rows, and near the end.
_COARSE_MAP, _REST_OF_THE_MAP = 5, 9


class Point(NamedTuple):
    """One row: an implementation of a pass over a recurrence of a shape and storage."""

    op: str
    dtype: str
    which: str
    shape: Shape
    implementation: str


def _tier(shape: Shape) -> int:
    """Ranks a shape: the reference, the targets, the long rows, the rest."""
    if shape == Shape(2048, 8, 256):
        return 0
    if shape.batch * shape.width >= 2048 and shape.steps in (2048, 8192):
        return 1
    if shape.batch == 1 and shape.width == 256:
        return 2
    return 3


def grid(shapes: Sequence[Shape], ops: Sequence[str], dtypes: Sequence[str]) -> list[Point]:
    """Lists every op on every shape: the kernel and `lax.scan`, forward, then with gradients.

    Args:
      shapes: T, B, D.
      ops: of `OPS`.
      dtypes: of `ITEMSIZE`.

    Returns:
      The points, shape by shape.
    """
    return [
        Point(op, dtype, which, shape, implementation)
        for shape in shapes
        for dtype in dtypes
        for op in ops
        for which in PASSES
        for implementation in (KERNEL, SCAN)
    ]


def crossover(paths: Sequence[str], shapes: Sequence[Shape] = CROSSOVER) -> list[Point]:
    """Lists the points to which `jp.auto` is fitted: its paths beside `lax.scan`.

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


def in_order(grid: Sequence[Point], crossover: Sequence[Point]) -> list[Point]:
    """Orders both parts so that an interrupted run has the most informative points.

    The order is: the reference point; the targets and the long rows, by kernel; a coarse map for
    `jp.auto`; `lax.scan` beside the targets; the rest of the grid, and of the map.

    Args:
      grid: from `grid`.
      crossover: from `crossover`.

    Returns:
      All points, each once.
    """

    def rank(point: Point) -> int:
        # lax.scan takes most of the time: beside every target it waits until targets are known.
        late = point.implementation == SCAN and _tier(point.shape) % 2 == 1
        return 2 * _tier(point.shape) + 3 * (point.dtype == "bfloat16") + 4 * late

    def turn(point: Point) -> int:
        return _COARSE_MAP if point.shape in COARSE else _REST_OF_THE_MAP

    ranked = [(rank(point), point) for point in grid]
    ranked += [(turn(point), point) for point in crossover]
    return list(dict.fromkeys(point for _, point in sorted(ranked, key=lambda pair: pair[0])))


def needs(point: Point) -> int:
    """Counts the bytes on the device while a point is measured.

    Args:
      point: the point.

    Returns:
      The number of bytes.
    """
    leaves: Leaves = recurrences.leaves(point.op)
    return footprint(point.shape, leaves, ITEMSIZE[point.dtype], point.which)


def fitting(points: Sequence[Point], memory: int) -> tuple[list[Point], list[Point]]:
    """Splits points into those that fit and those that need more than their share of the memory.

    Args:
      points: in order.
      memory: of the device, in bytes.

    Returns:
      Both lists, in order, without repetitions.
    """
    points = list(dict.fromkeys(points))
    most = SHARE_OF_MEMORY * memory
    return [p for p in points if needs(p) <= most], [p for p in points if needs(p) > most]
