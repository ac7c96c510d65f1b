"""Which entries of dh'/dh can be non-zero, proved from the jaxpr of the step.

The step's jaxpr is differentiated by JAX itself (`jvp` of the jaxpr), so that
custom rules, `stop_gradient`, casts and rounding mean here what they mean in the
gradient; what the tangents of the carry reach is then followed through the linear
jaxpr that remains. Over-approximation is safe and under-approximation never
happens: an unknown primitive mixes everything.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Key, PyTree

from jaxpara import compat
from jaxpara.recurrence import jacobian
from jaxpara.recurrence.blocks import Group, Groups, Shape, block_size, coupled_axes, coupled_size
from jaxpara.recurrence.kinds import (
    Block,
    Dense,
    Diagonal,
    Structure,
    Unchecked,
    largest,
    unchecked,
)
from jaxpara.recurrence.patterns import TooLarge, axis_patterns, element_sets
from jaxpara.recurrence.propagate import NotAnalysable, Rules, propagate

# Made in kinds.py, found here.
__all__ = ["Block", "Dense", "Diagonal", "Structure", "Unchecked", "unchecked"]
__all__ += ["check_structure", "jacobian_structure", "require", "structure_of"]

SMALL = 128
"""Carries of up to this many elements are analysed element by element as well."""


def jacobian_structure(
    f: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]], init: PyTree, x: PyTree
) -> Structure:
    """Prove which entries of the Jacobian of one step can be non-zero.

    J[i, j] = d carry'[i] / d carry[j], for every carry and every x of these shapes.
    Blocks are products of whole axes: a state that packs [c, h] along one axis is
    analysed exactly, but its strided 2x2 blocks cannot be said and come out Dense
    (keep c and h as two leaves).

    Args:
      f: the step, as for `lax.scan`.
      init: the carry, arrays or `jax.ShapeDtypeStruct`.
      x: one time slice of xs, arrays or `jax.ShapeDtypeStruct`.

    Returns:
      `Diagonal`, `Block` or `Dense`, over the floating leaves of the carry in the
      order of `jax.tree.leaves`.

    Raises:
      TypeError: the carry that comes out has not the shapes of the one that goes in.
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
    shapes = _shapes(closed, carry_in)
    edges, heads = _edges(closed, carry_in, carry_out, known)
    if edges is None:
        return Dense()
    return _classify(_group(edges, shapes), shapes, heads)


def require(
    given: Structure, closed: Any, carry_in: Sequence[int], carry_out: Sequence[int]
) -> None:
    """Refuse a structure that leaves out what the proof cannot.

    Args:
      given: what is claimed of the step.
      closed, carry_in, carry_out: as for `structure_of`.

    Raises:
      ValueError: an entry that may be non-zero is not in `given`; names both structures.
    """
    shapes = _shapes(closed, carry_in)
    place = {}  # leaf -> its group, and its axis for each shared index
    for number, group in enumerate(given.resolve(shapes)):
        place |= {i: (number, s) for i, s in zip(group.leaves, group.shared, strict=True)}
    edges = _edges(closed, carry_in, carry_out, None)[0]
    if edges is None:
        edges = {(i, j): set() for i in place for j in place}

    def allowed(i, j):
        same = (*edges[i, j], *((p, q) for p in _ones(shapes[i]) for q in _ones(shapes[j])))
        (group, axes), (other, partners) = place[i], place[j]
        return group == other and set(zip(axes, partners, strict=True)) <= set(same)

    for i, j in edges:
        if not allowed(i, j) and math.prod(shapes[i]) and math.prod(shapes[j]):
            raise ValueError(
                f"structure={given} is sparser than {structure_of(closed, carry_in, carry_out)}, "
                f"which is proved: leaf {i} of the new carry may depend on other entries of leaf "
                f"{j}\nleave structure= out, or, if you know better, pass structure="
                f"jp.unchecked({type(given).__name__}(...)) and try it once with debug=True"
            )


def _ones(shape: Shape) -> list[int]:
    return [axis for axis, size in enumerate(shape) if size == 1]


def _shapes(closed, carry_in) -> list[Shape]:
    invars = compat.open_jaxpr(closed).invars
    return [tuple(invars[i].aval.shape) for i in carry_in]


def _edges(closed, carry_in, carry_out, known):
    """What may depend on what, or None where nothing is known; and the axes that are heads."""
    shapes = _shapes(closed, carry_in)
    heads: set[tuple[int, int]] = set()
    try:
        linear, into, back = _tangents(closed, carry_in, carry_out)
        edges = _axis_edges(linear, into, back, shapes, heads, known)
        # Element sets can only help where some block is larger than one entry.
        count = sum(map(math.prod, shapes))
        small = isinstance(count, int) and count <= SMALL  # jax.export has symbolic sizes
        if small and largest(_group(edges, shapes), shapes) > 1:
            edges = _sharpen(edges, _element_edges(linear, into, back, shapes, known))
    except (NotAnalysable, NotImplementedError):  # no rule, or no jvp: nothing is known
        return None, heads
    return edges, heads


def _tangents(closed, carry_in, carry_out):
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


def _run(linear, into, back, domain, start, known):
    ins = [
        start(into[i]) if i in into else None for i in range(len(compat.open_jaxpr(linear).invars))
    ]
    outs = propagate(linear, ins, domain, known)
    return [None if place is None else outs[place] for place in back]


Edges = dict[tuple[int, int], set[tuple[int, int]]]  # (out leaf, in leaf) -> axes with one index


def _axis_edges(linear, into, back, shapes, heads, known) -> Edges:
    def start(leaf):
        return {leaf: tuple((axis,) for axis in range(len(shapes[leaf])))}

    outs: list[Any] = _run(linear, into, back, axis_patterns(shapes, heads), start, known)
    return {
        (i, j): {(p, entry[0]) for p, entry in enumerate(entries) if len(entry) == 1}
        for i, value in enumerate(outs)
        for j, entries in (value or {}).items()
    }


def _element_edges(linear, into, back, shapes, known) -> Edges | None:
    sizes = [math.prod(s) for s in shapes]
    starts = np.cumsum([0, *sizes])
    identity = np.eye(sum(sizes), dtype=bool)

    def start(leaf):
        rows = identity[starts[leaf] : starts[leaf + 1]]
        return rows.reshape((*shapes[leaf], sum(sizes)))

    try:
        outs: list[Any] = _run(linear, into, back, element_sets(sum(sizes)), start, known)
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


def _classify(groups: Groups, shapes, heads) -> Structure:
    if all(block_size(group, shapes) == 1 for group in groups):
        return Diagonal()

    def dense(group):
        members = list(zip(group.leaves, group.shared, strict=True))
        mixed = any(
            coupled_size(shapes[leaf], shared) != 1 and coupled_axes(shapes[leaf], shared)
            for leaf, shared in members
        )
        return mixed and not any((leaf, a) in heads for leaf, shared in members for a in shared)

    return Dense(groups=groups) if any(map(dense, groups)) else Block(groups=groups)


def check_structure(
    structure: Structure,
    f: Callable[[list[Array]], Sequence[Array]],
    leaves: Sequence[Array],
    key: Key[Array, ""],
) -> None:
    """Compare one random vjp of a step with the same product by the structured Jacobian.

    u^T J by autodiff against u^T J from the blocks alone; they differ, for almost
    every u, when the structure leaves out an entry that is not zero here. With
    concrete values the comparison happens at once. Under a trace it is attached as
    a debug callback: the program raises when it runs, as JAX's runtime error with
    the same message (see `jax.effects_barrier` to wait for it).

    Args:
      structure: what is claimed.
      f: the step on the floating leaves of the carry, all else closed over.
      leaves: the state at which to check.
      key: draws u.

    Raises:
      ValueError: the structure is too sparse; names the leaves that deviate, and by how much.
    """
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    shapes, dtypes = [leaf.shape for leaf in leaves], [leaf.dtype for leaf in leaves]
    groups = structure.resolve(shapes)
    keys = jax.random.split(key, max(len(leaves), 1))
    cotangents = [
        jax.random.normal(k, s, jnp.float32).astype(d)
        for k, s, d in zip(keys, shapes, dtypes, strict=False)
    ]
    _, pull = jax.vjp(lambda *x: list(f(list(x))), *leaves)
    exact = pull(cotangents)
    # By vjps, which every differentiable step has; a custom_vjp has nothing else.
    blocks = jacobian.blocks_of(f, leaves, groups, reverse_mode=True)
    rows = jacobian.apply(blocks, jacobian.to_lanes(groups, cotangents), transpose=True)
    claimed = jacobian.from_lanes(groups, rows, leaves)
    # A value that is not finite says nothing about the structure.
    gaps = [
        jnp.max(jnp.where(jnp.isfinite(a), jnp.abs(a - b), 0), initial=0)
        for a, b in zip(exact, claimed, strict=True)
    ]
    scales = [jnp.max(jnp.where(jnp.isfinite(a), jnp.abs(a), 0), initial=0) for a in exact]

    def judge(gaps, scales):
        wrong = [
            f"leaf {leaf} (shape {shapes[leaf]}) deviates by {float(gap):.3g}, its largest entry "
            f"being {float(scale):.3g}"
            for leaf, (gap, scale) in enumerate(zip(gaps, scales, strict=True))
            if not gap <= math.sqrt(float(jnp.finfo(dtypes[leaf]).eps)) * max(float(scale), 1.0)
        ]
        if wrong:
            raise ValueError(
                f"structure {structure} is too sparse: in a random vjp with respect to the carry, "
                f"{'; '.join(wrong)}; leave out structure= to have it proved, or couple more axes"
            )

    if any(isinstance(value, Tracer) for value in [*gaps, *scales]):
        jax.debug.callback(judge, gaps, scales)
    else:
        judge(gaps, scales)
