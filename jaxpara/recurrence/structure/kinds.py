"""What a Jacobian's structure can be: Diagonal, Block or Dense.

Immutable, hashable values that `jacobian_structure` returns and that a user may
write down to override it; `resolve` turns each into groups of coupled leaves.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxpara.recurrence.structure.jacobian_blocks import Group, Groups, Shape, block_size


class Diagonal(NamedTuple):
    """Every entry of the carry depends only on itself.

    Attributes:
      groups: None, or one group for each leaf with all its axes shared.
    """

    groups: Groups | None = None

    def resolve(self, shapes: Sequence[Shape]) -> Groups:
        """One group for each leaf, all axes shared."""
        every = tuple(Group((i,), (tuple(range(len(s))),)) for i, s in enumerate(shapes))
        if self.groups is None:
            return every
        groups = _checked("Diagonal", self.groups, shapes)
        if any(block_size(group, shapes) != 1 for group in groups):
            raise ValueError(
                f"Diagonal got groups {groups} that couple several entries of {list(shapes)}; "
                f"use Block(groups=...) for blocks larger than 1x1"
            )
        return groups

    def size(self, shapes: Sequence[Shape]) -> int:
        """The largest K."""
        return largest(self.resolve(shapes), shapes)


class Block(NamedTuple):
    """Small independent blocks: the leaves of one channel, or the entries of one head.

    Attributes:
      groups: which leaves and axes are coupled; None to say it by `coupled`.
      coupled: with groups=None, all leaves form one group in which this many trailing
        axes of every leaf are coupled and the other axes are shared.
    """

    groups: Groups | None = None
    coupled: int = 0

    def resolve(self, shapes: Sequence[Shape]) -> Groups:
        """The groups, checked against the leaves' shapes."""
        if self.groups is not None:
            return _checked("Block", self.groups, shapes)
        for i, shape in enumerate(shapes):
            if not 0 <= self.coupled <= len(shape):
                raise ValueError(
                    f"Block(coupled={self.coupled}) needs {self.coupled} axes to couple, but leaf "
                    f"{i} has shape {shape}; give 0 <= coupled <= {len(shape)}, or groups=..."
                )
        shared = tuple(tuple(range(len(s) - self.coupled)) for s in shapes)
        return _one_group(f"Block(coupled={self.coupled})", shared, shapes)

    def size(self, shapes: Sequence[Shape]) -> int:
        """The largest K."""
        return largest(self.resolve(shapes), shapes)


class Dense(NamedTuple):
    """One block over everything but the batch axes.

    Attributes:
      groups: which leaves and axes are coupled; None to say it by `batch`.
      batch: with groups=None, how many leading axes of every leaf are batch axes.
    """

    groups: Groups | None = None
    batch: int = 0

    def resolve(self, shapes: Sequence[Shape]) -> Groups:
        """The groups, checked against the leaves' shapes."""
        if self.groups is not None:
            return _checked("Dense", self.groups, shapes)
        for i, shape in enumerate(shapes):
            if not 0 <= self.batch <= len(shape):
                raise ValueError(
                    f"Dense(batch={self.batch}) needs {self.batch} leading batch axes, but leaf "
                    f"{i} has shape {shape}; give 0 <= batch <= {len(shape)}, or groups=..."
                )
        shared = (tuple(range(self.batch)),) * len(shapes)
        return _one_group(f"Dense(batch={self.batch})", shared, shapes)

    def size(self, shapes: Sequence[Shape]) -> int:
        """The largest K."""
        return largest(self.resolve(shapes), shapes)


Structure = Diagonal | Block | Dense


class Unchecked(NamedTuple):
    """A structure that is trusted, see `unchecked`."""

    structure: Structure


def unchecked(structure: Structure) -> Unchecked:
    """Marks a structure as true although the step does not prove it.

    Solvers refuse a `structure` with fewer entries than the proved one, unless it comes from
    here. Where it is wrong, values are right and gradients are wrong, and nothing says so. Try
    it with `debug=True`, which compares it with one random vjp of the step.

    Args:
      structure: what is claimed.

    Returns:
      What `structure=` of every solver takes.

    Raises:
      TypeError: it is no structure, such as the class itself.
    """
    if not isinstance(structure, Structure):
        raise TypeError(
            f"unchecked got {structure!r}; expected a structure, such as jp.structure.Diagonal()"
        )
    return Unchecked(structure)


def largest(groups: Groups, shapes: Sequence[Shape]) -> int:
    """The largest K over the groups."""
    return max((block_size(group, shapes) for group in groups), default=0)


def _one_group(name, shared, shapes) -> Groups:
    if not shapes:
        return ()
    return _checked(name, (Group(tuple(range(len(shapes))), shared),), shapes)


def _checked(name: str, groups: Groups, shapes: Sequence[Shape]) -> Groups:
    """Refuse groups that do not partition the leaves or whose shared sizes disagree."""
    seen = sorted(leaf for group in groups for leaf in group.leaves)
    if seen != list(range(len(shapes))):
        raise ValueError(
            f"{name} has groups over the leaves {seen}, but the carry has {len(shapes)} floating "
            f"leaves of shapes {list(shapes)}; name each of 0..{len(shapes) - 1} exactly once"
        )
    for group in groups:
        if len(group.leaves) != len(group.shared):
            raise ValueError(
                f"{name} has {group} with {len(group.leaves)} leaves but shared axes for "
                f"{len(group.shared)}; give one tuple of shared axes for each leaf"
            )
        seen = group.shapes(shapes)
        if [math.prod(s) for s in seen] != [math.prod(shapes[leaf]) for leaf in group.leaves]:
            raise ValueError(
                f"{name} views the leaves {group.leaves} as {group.views}, but they have shapes "
                f"{[shapes[leaf] for leaf in group.leaves]}; cut axes into factors of their sizes"
            )
        sizes = None
        for leaf, shape, shared in zip(group.leaves, seen, group.shared, strict=True):
            if len(set(shared)) != len(shared) or not set(shared) <= set(range(len(shape))):
                raise ValueError(
                    f"{name} shares the axes {shared} of leaf {leaf}, which has shape {shape}; "
                    f"shared axes must be distinct and lie in 0..{len(shape) - 1}"
                )
            here = tuple(shape[axis] for axis in shared)
            if sizes is not None and here != sizes:
                raise ValueError(
                    f"{name} shares axes of sizes {here} in leaf {leaf} (shape {shape}) but of "
                    f"sizes {sizes} in leaf {group.leaves[0]} (shape {shapes[group.leaves[0]]}); "
                    f"shared axes must agree in number and size, in the same order"
                )
            sizes = here
    return tuple(groups)
