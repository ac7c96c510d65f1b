"""Between the leaves of a state and the blocks of its Jacobian.

A `Group` couples some leaves: `shared` axes carry the same index in and out and
number the N blocks, all other axes and all leaves together make the K entries of
one block. Everything here is for one state; callers `vmap` over time.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Shape = tuple[int, ...]


class Group(NamedTuple):
    """Leaves that are coupled with one another.

    Attributes:
      leaves: positions in the list of the carry's floating leaves.
      shared: for each of these leaves the axes along which entry in depends only on
        the entry with the same index, in an order that matches across the leaves.
    """

    leaves: tuple[int, ...]
    shared: tuple[tuple[int, ...], ...]


Groups = tuple[Group, ...]


def coupled_axes(shape: Shape, shared: Sequence[int]) -> tuple[int, ...]:
    """The axes of a leaf that are not shared, in order."""
    return tuple(axis for axis in range(len(shape)) if axis not in shared)


def coupled_size(shape: Shape, shared: Sequence[int]) -> int:
    """How many entries of a block one leaf contributes."""
    return math.prod(shape[axis] for axis in coupled_axes(shape, shared))


def block_size(group: Group, shapes: Sequence[Shape]) -> int:
    """K, the size of one block of a group."""
    return sum(
        coupled_size(shapes[leaf], shared)
        for leaf, shared in zip(group.leaves, group.shared, strict=True)
    )


def block_count(group: Group, shapes: Sequence[Shape]) -> int:
    """N, the number of blocks of a group."""
    return math.prod(shapes[group.leaves[0]][axis] for axis in group.shared[0])


def _to_rows(leaf, shared, lead: int):
    """[*lead, *leaf] -> [*lead, N, k] for one leaf of a group."""
    shape = leaf.shape[lead:]
    order = (*shared, *coupled_axes(shape, shared))
    moved = jnp.transpose(leaf, (*range(lead), *(lead + axis for axis in order)))
    count = math.prod(shape[axis] for axis in shared)
    return moved.reshape(*leaf.shape[:lead], count, coupled_size(shape, shared))


def to_blocks(groups: Groups, leaves: Sequence[Array]) -> list[Float[Array, "blocks entry"]]:
    """Gather one state into one [N, K] array a group.

    Args:
      groups: resolved groups.
      leaves: the floating leaves of one state.

    Returns:
      One array [N, K] for each group, in the groups' order.
    """
    return [
        jnp.concatenate(
            [
                _to_rows(leaves[leaf], shared, 0)
                for leaf, shared in zip(group.leaves, group.shared, strict=True)
            ],
            axis=-1,
        )
        for group in groups
    ]


def from_blocks(
    groups: Groups, blocks: Sequence[Float[Array, "blocks entry"]], like: Sequence[Array]
) -> list[Array]:
    """Undo `to_blocks`.

    Args:
      groups: resolved groups.
      blocks: one [N, K] array a group.
      like: arrays, or anything with shape and dtype, one for each leaf.

    Returns:
      The leaves, with the shapes and dtypes of `like`.
    """
    leaves: list = [None] * len(like)
    for group, block in zip(groups, blocks, strict=True):
        start = 0
        for leaf, shared in zip(group.leaves, group.shared, strict=True):
            shape = like[leaf].shape
            order = (*shared, *coupled_axes(shape, shared))
            size = coupled_size(shape, shared)
            moved = block[:, start : start + size].reshape([shape[axis] for axis in order])
            back = sorted(range(len(order)), key=order.__getitem__)
            leaves[leaf] = jnp.transpose(moved, back).astype(like[leaf].dtype)
            start += size
    return leaves


def basis(groups: Groups, shapes: Sequence[Shape], dtypes: Sequence) -> list[Array]:
    """Tangents that read off every block at once.

    Tangent j has a one at entry j of every block of every group, and nothing where
    a group has no entry j; K pushes of the Jacobian then hold all its blocks
    (the columns of one block never meet those of another).

    Args:
      groups: resolved groups.
      shapes: the leaves' shapes.
      dtypes: the leaves' dtypes.

    Returns:
      For each leaf an array [Kmax, *leaf].
    """
    width = max((block_size(group, shapes) for group in groups), default=0)
    tangents: list = [None] * len(shapes)
    for group in groups:
        start = 0
        for leaf, shared in zip(group.leaves, group.shared, strict=True):
            shape, size = shapes[leaf], coupled_size(shapes[leaf], shared)
            ones = jnp.arange(width)[:, None] == start + jnp.arange(size)[None, :]
            spread = [1 if axis in shared else n for axis, n in enumerate(shape)]
            ones = ones.astype(dtypes[leaf]).reshape(width, *spread)
            tangents[leaf] = jnp.broadcast_to(ones, (width, *shape))
            start += size
    return tangents


def blocks_from_tangents(
    groups: Groups, tangents: Sequence[Array]
) -> list[Float[Array, "blocks row column"]]:
    """The blocks of J from J pushed onto `basis`.

    Args:
      groups: resolved groups.
      tangents: for each leaf [Kmax, *leaf], the Jacobian applied to the basis.

    Returns:
      For each group [N, K, K]; entry [n, i, j] is d(entry i out) / d(entry j in).
    """
    shapes = [tangent.shape[1:] for tangent in tangents]
    blocks = []
    for group in groups:
        size = block_size(group, shapes)
        rows = [
            _to_rows(tangents[leaf][:size], shared, 1)
            for leaf, shared in zip(group.leaves, group.shared, strict=True)
        ]
        blocks.append(jnp.moveaxis(jnp.concatenate(rows, axis=-1), 0, -1))
    return blocks


def jacobian_blocks(groups: Groups, f, leaves: Sequence[Array]):
    """The blocks of the Jacobian of `f`, and its value, at one state.

    Args:
      groups: resolved groups.
      f: list of leaves -> list of leaves.
      leaves: where to linearise.

    Returns:
      The value of `f`, and one [N, K, K] array for each group.
    """
    tangents = basis(groups, [x.shape for x in leaves], [x.dtype for x in leaves])
    value, push = jax.linearize(lambda *x: list(f(list(x))), *leaves)
    return value, blocks_from_tangents(groups, jax.vmap(push)(*tangents))
