"""Jacobians and their products, small axes first.

For a group of coupled leaves (see `jacobian_blocks`) a state is `[K, N]` and a Jacobian
`[K, K, N]`: for the small `K` of diagonal and elementwise cells every product is a
few fused multiply-adds over contiguous lanes instead of `N` tiny matrix products.

A Jacobian in flight (`P` in multiple shooting) is kept as *columns*: for each leaf
`[Kmax, *leaf]`, column `j` holding the derivative with respect to element `j` of
every block of every group at once.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.recurrence.lanes import vary_like
from jaxpara.recurrence.structure.jacobian_blocks import (
    Groups,
    block_count,
    block_size,
    coupled_axes,
    coupled_size,
)

Leaves = Sequence[jax.Array]

# Above these block sizes a batched matrix product beats unrolled multiply-adds: of a block with a
# vector, of two blocks.
_VECTOR, _MATRIX = 16, 8


def _shapes(leaves: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [leaf.shape for leaf in leaves]


def to_lanes(groups: Groups, leaves: Leaves) -> list[jax.Array]:
    """Leaves of one state to a list of `[K, N]`, one a group."""

    def rows(leaf, shape, shared):
        leaf = leaf.reshape(shape)
        order = coupled_axes(leaf.shape, shared) + tuple(shared)
        lanes = math.prod(leaf.shape[axis] for axis in shared)
        return jnp.transpose(leaf, order).reshape(coupled_size(leaf.shape, shared), lanes)

    def one(group):
        seen = zip(group.leaves, group.shapes(_shapes(leaves)), group.shared, strict=True)
        parts = [rows(leaves[i], shape, shared) for i, shape, shared in seen]
        if len(parts) == 1:
            return parts[0]
        return jnp.concatenate([p.astype(jnp.result_type(*parts)) for p in parts])

    return [one(group) for group in groups]


def from_lanes(groups: Groups, lanes: Leaves, like: Sequence[Any]) -> list[jax.Array]:
    """The inverse of `to_lanes`; `like` gives shapes and dtypes."""
    leaves = {}
    for group, block in zip(groups, lanes, strict=True):
        row = 0
        seen = zip(group.leaves, group.shapes(_shapes(like)), group.shared, strict=True)
        for i, shape, shared in seen:
            order = coupled_axes(shape, shared) + tuple(shared)
            rows = coupled_size(shape, shared)
            part = block[row : row + rows].reshape([shape[axis] for axis in order])
            inverse = sorted(range(len(order)), key=order.__getitem__)
            part = jnp.transpose(part, inverse).reshape(like[i].shape)
            leaves[i] = part.astype(like[i].dtype)
            row += rows
    return [leaves[i] for i in range(len(like))]


def basis(groups: Groups, like: Sequence[Any]) -> list[jax.Array]:
    """Unit columns: for each leaf `[Kmax, *leaf]`, one at element `j` of every block."""
    shapes = _shapes(like)
    size = max((block_size(group, shapes) for group in groups), default=1)

    def column(j):
        units = []
        for group in groups:
            rows, count = block_size(group, shapes), block_count(group, shapes)
            unit = (jnp.arange(rows) == j).astype(jnp.float32)
            units.append(jnp.broadcast_to(unit[:, None], (rows, count)))
        return from_lanes(groups, units, like)

    columns = jax.vmap(column)(jnp.arange(size))
    return [vary_like(c, leaf) for c, leaf in zip(columns, like, strict=True)]


def gather_columns(groups: Groups, columns: Leaves) -> list[jax.Array]:
    """Columns `[Kmax, *leaf]` to Jacobians `[K, K, N]`, entry `[i, j]` = d out i / d in j."""
    lanes = jax.vmap(lambda *c: to_lanes(groups, c))(*columns)
    return [jnp.swapaxes(c[: c.shape[1]], 0, 1) for c in lanes]


def spread_columns(groups: Groups, matrices: Leaves, like: Sequence[Any]) -> list[jax.Array]:
    """The inverse of `gather_columns`; columns that a group lacks are zero."""
    size = max(m.shape[0] for m in matrices)

    def padded(matrix):
        return jnp.pad(jnp.swapaxes(matrix, 0, 1), ((0, size - matrix.shape[0]), (0, 0), (0, 0)))

    return jax.vmap(lambda *c: from_lanes(groups, c, like))(*map(padded, matrices))


def apply(matrices: Leaves, lanes: Leaves, transpose: bool = False) -> list[jax.Array]:
    """`J v`, or `J^T v`, group by group: `[K, K, N]` with `[K, N]`."""

    def one(matrix, vector):
        rows = matrix.shape[0]
        if rows == 1:
            return matrix[0] * vector
        if rows <= _VECTOR:
            if transpose:
                return jnp.sum(matrix * vector[:, None], axis=0)
            return jnp.sum(matrix * vector[None], axis=1)
        subscripts = "ijn,in->jn" if transpose else "ijn,jn->in"
        return jnp.einsum(subscripts, matrix, vector, precision=lax.Precision.HIGHEST)

    return [one(m, v) for m, v in zip(matrices, lanes, strict=True)]


def multiply(left: Leaves, right: Leaves) -> list[jax.Array]:
    """`A B`, group by group, both `[K, K, N]`."""

    def one(a, b):
        if a.shape[0] == 1:
            return a * b
        if a.shape[0] <= _MATRIX:
            return jnp.sum(a[:, :, None] * b[None], axis=1)
        return jnp.einsum("ikn,kjn->ijn", a, b, precision=lax.Precision.HIGHEST)

    return [one(a, b) for a, b in zip(left, right, strict=True)]


def columns_of(f: Callable, state: Leaves, groups: Groups) -> list[jax.Array]:
    """Columns `[Kmax, *leaf]` of the Jacobian of `f`, from leaves to leaves, at `state`."""
    _, push = jax.linearize(lambda *s: f(list(s)), *state)
    return list(jax.vmap(lambda *t: push(*t))(*basis(groups, state)))


def blocks_of(f: Callable, state: Leaves, groups: Groups, reverse_mode: bool) -> list[jax.Array]:
    """Jacobian `[K, K, N]` of `f`, from leaves to leaves, at `state`.

    `reverse_mode` uses vjps, for functions whose author gave only a `custom_vjp`.
    """
    state = list(state)
    if not reverse_mode:
        return gather_columns(groups, columns_of(f, state, groups))
    _, pull = jax.vjp(lambda *s: f(list(s)), *state)
    rows = jax.vmap(lambda *t: pull(list(t)))(*basis(groups, state))
    return [jnp.swapaxes(block, 0, 1) for block in gather_columns(groups, rows)]
