"""Which entries of a state make the blocks of its Jacobian.

A `Group` couples some leaves: `shared` axes carry the same index in and out and
number the N blocks, all other axes and all leaves together make the K entries of
one block. `jacobian_products` moves arrays between leaves and blocks.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

Shape = tuple[Any, ...]  # integers, or symbols under jax.export


def is_number(size: Any) -> bool:
    """Whether a size is a number: under `jax.export` with symbolic shapes it may be `4*b`."""
    return isinstance(size, int)


def elements(shape: Sequence[Any]) -> int:
    """Number of elements for a plan: a symbolic axis counts as one entry."""
    return math.prod(size for size in shape if is_number(size))


class Group(NamedTuple):
    """Leaves that are coupled with one another.

    Attributes:
      leaves: positions in the list of the carry's floating leaves.
      shared: for each of these leaves the axes along which entry in depends only on
        the entry with the same index, in an order that matches across the leaves.
      views: for each of these leaves the shape, with axes cut into several, to whose axes
        `shared` refers; empty where it refers to the leaves as they are.
    """

    leaves: tuple[int, ...]
    shared: tuple[tuple[int, ...], ...]
    views: tuple[Shape, ...] = ()

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        """The shapes that `shared` refers to, of these leaves."""
        return list(self.views) or [tuple(shapes[i]) for i in self.leaves]


Groups = tuple[Group, ...]


def restricted(groups: Groups, leaves: Sequence[int]) -> Groups:
    """The groups of some of the leaves, which are numbered in this order."""
    found = []
    for group in groups:
        kept = [(leaves.index(i), k) for k, i in enumerate(group.leaves) if i in leaves]
        if kept:
            numbers, places = zip(*sorted(kept), strict=True)
            shared = tuple(group.shared[k] for k in places)
            views = tuple(group.views[k] for k in places) if group.views else ()
            found.append(Group(numbers, shared, views))
    return tuple(found)


def coupled_axes(shape: Shape, shared: Sequence[int]) -> tuple[int, ...]:
    """The axes of a leaf that are not shared, in order."""
    return tuple(axis for axis in range(len(shape)) if axis not in shared)


def coupled_size(shape: Shape, shared: Sequence[int]) -> int:
    """How many entries of a block one leaf contributes."""
    return math.prod(shape[axis] for axis in coupled_axes(shape, shared))


def block_size(group: Group, shapes: Sequence[Shape]) -> int:
    """K, the size of one block of a group."""
    seen = group.shapes(shapes)
    return sum(coupled_size(*pair) for pair in zip(seen, group.shared, strict=True))


def block_count(group: Group, shapes: Sequence[Shape]) -> int:
    """N, the number of blocks of a group."""
    seen = group.shapes(shapes)[0]
    return math.prod(seen[axis] for axis in group.shared[0])
