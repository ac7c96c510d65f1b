"""Which entries of dh'/dh can be non-zero, proved from the jaxpr of the step.

The step's jaxpr is differentiated by JAX itself (`jvp` of the jaxpr), so that
custom rules, `stop_gradient`, casts and rounding mean here what they mean in the
gradient. The entries that the tangents of the carry reach are then followed through the
linear jaxpr that remains. Over-approximation is safe, and under-approximation never happens:
an unknown primitive mixes everything.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxpara import compat
from jaxpara.recurrence.structure import custom_vjps
from jaxpara.recurrence.structure.axis_patterns import (
    Cuts,
    TooLarge,
    axis_patterns,
    element_sets,
    split_entry,
    whole_axes,
)
from jaxpara.recurrence.structure.jacobian_blocks import (
    Group,
    Groups,
    Shape,
    block_size,
    coupled_axes,
    coupled_size,
)
from jaxpara.recurrence.structure.kinds import (
    Block,
    Dense,
    Diagonal,
    Structure,
    Unchecked,
    largest,
    unchecked,
)
from jaxpara.recurrence.structure.propagate import UNKNOWN, Rules, propagate

# Made in kinds.py, found here.
__all__ = ["Block", "Dense", "Diagonal", "Structure", "Unchecked", "unchecked"]
__all__ += ["jacobian_structure", "structure_of"]

Tangents = tuple[Any, dict[int, int], list[int | None]]

PASSES = 8
"""How often axes are cut before it is given up."""

SMALL = 128
"""Carries of up to this many elements are analysed element by element as well."""


def jacobian_structure(
    f: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]], init: PyTree, x: PyTree
) -> Structure:
    """Proves which entries of the Jacobian of one step can be non-zero.

    J[i, j] = d carry'[i] / d carry[j], for every carry and every x of these shapes.
    Blocks are products of whole axes, or of parts of axes that the step itself cuts by a
    reshape (heads packed along one axis). A state that packs [c, h] along one axis is
    analysed exactly, but no structure expresses its strided 2x2 blocks. The answer is then
    Dense. Keep c and h as two leaves instead.

    Args:
      f: the step, as for `lax.scan`.
      init: the carry, arrays or `jax.ShapeDtypeStruct`.
      x: one time slice of xs, arrays or `jax.ShapeDtypeStruct`.

    Returns:
      `Diagonal`, `Block` or `Dense`, over the floating leaves of the carry in the
      order of `jax.tree.leaves`.

    Raises:
      TypeError: the carry that comes out does not have the shapes of the one that goes in.
    """
    closed, (out, _) = jax.make_jaxpr(f, return_shape=True)(init, x)
    going, coming = jax.tree.leaves(init), jax.tree.leaves(out)
    if [jnp.shape(a) for a in going] != [b.shape for b in coming]:
        raise TypeError(
            f"jacobian_structure got a step whose carry goes in with shapes "
            f"{[jnp.shape(a) for a in going]} and comes out with {[b.shape for b in coming]}; "
            f"return a carry like init (x is one time slice, without the time axis)"
        )
    avals = compat.open_jaxpr(closed).invars[: len(going)]
    floating = [i for i, var in enumerate(avals) if jnp.issubdtype(var.aval.dtype, jnp.inexact)]
    return structure_of(closed, floating, floating)


def structure_of(
    closed: Any, carry_in: Sequence[int], carry_out: Sequence[int], *, known: Rules | None = None
) -> Structure:
    """The structure of a traced step.

    Args:
      closed: the closed jaxpr of the step.
      carry_in: positions among its inputs of the carry's floating leaves; all other
        inputs are constants for the derivative.
      carry_out: positions among its outputs of the same leaves.
      known: rules for primitives or jitted functions by name, see `propagate`.

    Returns:
      As `jacobian_structure`.
    """
    shapes = shapes_in(closed, carry_in)
    heads: set[tuple[int, int]] = set()
    try:
        flows = _tangents(closed, carry_in, carry_out)
        edges, cuts = _axis_edges(flows, [[(n,) for n in s] for s in shapes], heads, known)
        groups = _group(_sharper(edges, flows, shapes, known), shapes)
        if cuts and (finer := _cut_finer(flows, shapes, cuts, known)) is not None:
            seen, finer_heads = finer
            if largest(seen, shapes) < largest(groups, shapes):
                groups, heads = seen, finer_heads
    except UNKNOWN:
        return Dense()
    return _classify(groups, shapes, heads)


def _cut_finer(flows, shapes, cuts, known):
    """Groups over leaves some of whose axes are cut, as a reshape in the step does; their heads."""
    views = [[(n,) for n in shape] for shape in shapes]
    for _ in range(PASSES):
        views = [_cut(view, leaf, cuts) for leaf, view in enumerate(views)]
        heads: set[tuple[int, int]] = set()
        edges, cuts = _axis_edges(flows, views, heads, known)
        if not cuts:
            seen = [tuple(n for sizes in view for n in sizes) for view in views]
            groups = [
                g
                if all(seen[i] == shapes[i] for i in g.leaves)
                else g._replace(views=tuple(seen[i] for i in g.leaves))
                for g in _group(edges, seen)
            ]
            return tuple(groups), heads
    return None


def _cut(view, leaf, cuts):
    """The axes of a leaf, those cut in two that `cuts` names, from the inside."""
    number, new = 0, []
    for sizes in view:
        pieces: list[int] = []
        for n in sizes:
            inner = min((k for i, axis, k in cuts if (i, axis) == (leaf, number)), default=n)
            pieces += [n] if inner == n else [n // inner, inner]
            number += 1
        new.append(tuple(pieces))
    return new


def ones(shape: Shape) -> list[int]:
    """The axes of size one, which all have the same index."""
    return [axis for axis, size in enumerate(shape) if size == 1]


def shapes_in(closed: Any, carry_in: Sequence[int]) -> list[Shape]:
    """The shapes of the carry's floating leaves."""
    invars = compat.open_jaxpr(closed).invars
    return [tuple(invars[i].aval.shape) for i in carry_in]


def _sharper(edges, flows: Tangents, shapes, known):
    # Element sets can only help where some block is larger than one entry; jax.export has
    # symbolic sizes.
    count = sum(map(math.prod, shapes))
    small = isinstance(count, int) and count <= SMALL
    if not small or largest(_group(edges, shapes), shapes) == 1:
        return edges
    return _sharpen(edges, _element_edges(flows, shapes, known))


def _tangents(closed, carry_in, carry_out) -> Tangents:
    """The jaxpr of the step's jvp, where tangents go in, and where they come out."""
    nonzero = [False] * len(compat.open_jaxpr(closed).invars)
    for i in carry_in:
        nonzero[i] = True
    linear, reached = compat.jvp_jaxpr(closed, nonzero)
    order = sorted(carry_in)
    into = {len(nonzero) + order.index(i): leaf for leaf, i in enumerate(carry_in)}
    places = np.cumsum([len(reached) - 1, *reached])
    back = [int(places[i + 1]) if reached[i] else None for i in carry_out]
    return linear, into, back


def _run(flows: Tangents, domain, start, known):
    linear, into, back = flows
    ins = [
        start(into[i]) if i in into else None for i in range(len(compat.open_jaxpr(linear).invars))
    ]
    outs = propagate(linear, ins, domain, {**custom_vjps.RULES, **(known or {})})
    return [None if place is None else outs[place] for place in back]


Edges = dict[tuple[int, int], set[tuple[int, int]]]  # (out leaf, in leaf) -> axes with one index


def _axis_edges(flows: Tangents, views, heads, known) -> tuple[Edges, Cuts]:
    """Edges in the axes of the leaves as they are cut, and what should be cut to know more."""
    seen = [tuple(n for sizes in view for n in sizes) for view in views]
    cuts: Cuts = set()

    def start(leaf):
        return {leaf: whole_axes(views[leaf])}

    outs: list[Any] = _run(flows, axis_patterns(seen, heads, cuts), start, known)
    edges: Edges = {}
    for i, value in enumerate(outs):
        for j, entries in (value or {}).items():
            pairs = {(p, q) for p in ones(seen[i]) for q in ones(seen[j])}
            number = 0
            for sizes, entry in zip(views[i], entries, strict=True):
                for piece in split_entry(j, entry, sizes, seen[j], cuts):
                    if len(piece) == 1 and piece[0] >= 0:
                        pairs.add((number, piece[0]))
                    elif any(atom >= 0 for atom in piece):
                        inner = piece[-1]
                        cuts.add((i, number, -inner if inner < 0 else seen[j][inner]))
                    number += 1
            edges[i, j] = pairs
    return edges, cuts


def _element_edges(flows: Tangents, shapes, known) -> Edges | None:
    sizes = [math.prod(s) for s in shapes]
    starts = np.cumsum([0, *sizes])
    identity = np.eye(sum(sizes), dtype=bool)

    def start(leaf):
        rows = identity[starts[leaf] : starts[leaf + 1]]
        return rows.reshape((*shapes[leaf], sum(sizes)))

    try:
        outs: list[Any] = _run(flows, element_sets(sum(sizes)), start, known)
    except TooLarge:
        return None
    edges: Edges = {}
    for i, value in enumerate(outs):
        if value is None:
            continue
        for j in range(len(shapes)):
            part = value[..., starts[j] : starts[j + 1]].reshape((*shapes[i], *shapes[j]))
            if part.any():
                at, own = np.argwhere(part).T, len(shapes[i])
                edges[i, j] = {
                    (p, q)
                    for p in range(own)
                    for q in range(len(shapes[j]))
                    if shapes[i][p] == shapes[j][q] and (at[p] == at[own + q]).all()
                }
    return edges


def _sharpen(axes: Edges, elements: Edges | None) -> Edges:
    """Both are proved, so an edge needs both and axes may be matched by either."""
    if elements is None:
        return axes
    return {edge: axes[edge] | elements[edge] for edge in axes.keys() & elements.keys()}


def _group(edges: Edges, shapes: Sequence[Shape]) -> Groups:
    """Connected leaves, and the axes along which every edge between them is an identity."""
    matches: dict[int, list] = {leaf: [] for leaf in range(len(shapes))}
    for (i, j), pairs in edges.items():
        matches[i].append((j, pairs))
        matches[j].append((i, {(q, p) for p, q in pairs}))
    groups, left = [], set(range(len(shapes)))
    while left:
        root = min(left)
        # One label an axis of the root, carried along a spanning tree of the edges.
        axes: dict[int, list[Any]] = {root: list(range(len(shapes[root])))}
        queue = [root]
        for leaf in queue:
            for other, pairs in matches[leaf]:
                if other not in axes:
                    axes[other] = [_partner(axis, pairs) for axis in axes[leaf]]
                    queue.append(other)
        left -= axes.keys()
        leaves = tuple(sorted(axes))
        labels = [
            label
            for label in range(len(shapes[root]))
            if all(axes[leaf][label] is not None for leaf in leaves)
            and all(
                (axes[leaf][label], axes[other][label]) in pairs
                for leaf in leaves
                for other, pairs in matches[leaf]
            )
        ]
        distinct: list[int] = []
        for label in labels:
            if all(axes[leaf][label] != axes[leaf][old] for leaf in leaves for old in distinct):
                distinct.append(label)
        shared = tuple(tuple(axes[leaf][label] for label in distinct) for leaf in leaves)
        groups.append(Group(leaves, shared))
    return tuple(groups)


def _partner(axis: int | None, pairs) -> int | None:
    """The axis of the other leaf that carries the same index, the same position first."""
    found = sorted((q != axis, q) for p, q in pairs if p == axis)
    return found[0][1] if found else None


def edges_of(closed: Any, carry_in: Sequence[int], carry_out: Sequence[int]) -> Edges | None:
    """For each pair (new leaf, leaf) that may depend, the axes with one index; None: unknown."""
    shapes = shapes_in(closed, carry_in)
    try:
        flows = _tangents(closed, carry_in, carry_out)
        edges = _axis_edges(flows, [[(n,) for n in s] for s in shapes], set(), None)[0]
        return _sharper(edges, flows, shapes, None)
    except UNKNOWN:
        return None


def _classify(groups: Groups, shapes, heads) -> Structure:
    if all(block_size(group, shapes) == 1 for group in groups):
        return Diagonal()

    def dense(group):
        seen = group.shapes(shapes)
        mixed = any(
            coupled_size(shape, shared) != 1 and coupled_axes(shape, shared)
            for shape, shared in zip(seen, group.shared, strict=True)
        )
        members = zip(group.leaves, group.shared, strict=True)
        return mixed and not any((leaf, a) in heads for leaf, shared in members for a in shared)

    return Dense(groups=groups) if any(map(dense, groups)) else Block(groups=groups)
