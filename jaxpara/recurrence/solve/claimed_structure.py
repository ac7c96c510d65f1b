"""Structures that a user gives: refused where the proof does not imply them, or tried out."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Key

from jaxpara.recurrence.solve import jacobian_products
from jaxpara.recurrence.structure.jacobian_blocks import Groups, Shape
from jaxpara.recurrence.structure.kinds import Structure
from jaxpara.recurrence.structure.proof import Edges, edges_of, ones, shapes_in, structure_of


def require(
    given: Structure, closed: Any, carry_in: Sequence[int], carry_out: Sequence[int]
) -> None:
    """Refuses a structure without entries that the proof cannot leave out.

    Args:
      given: what is claimed of the step.
      closed, carry_in, carry_out: as for `structure_of`.

    Raises:
      ValueError: an entry that may be non-zero is not in `given`; names both structures.
    """
    shapes = shapes_in(closed, carry_in)
    groups, proved = given.resolve(shapes), structure_of(closed, carry_in, carry_out)
    if groups == proved.resolve(shapes):
        return
    place, seen = {}, {}  # leaf -> its group, and its axis for each shared index; its shape there
    for number, group in enumerate(groups):
        place |= {i: (number, s) for i, s in zip(group.leaves, group.shared, strict=True)}
        seen |= dict(zip(group.leaves, group.shapes(shapes), strict=True))
    if any(group.views for group in groups):
        edges = _edges_between(proved.resolve(shapes), shapes, seen)
    else:
        edges = edges_of(closed, carry_in, carry_out)
    if edges is None:
        edges = {(i, j): set() for i in place for j in place}

    def allowed(i, j):
        same = (*edges[i, j], *((p, q) for p in ones(seen[i]) for q in ones(seen[j])))
        (group, axes), (other, partners) = place[i], place[j]
        return group == other and set(zip(axes, partners, strict=True)) <= set(same)

    for i, j in edges:
        if not allowed(i, j) and math.prod(shapes[i]) and math.prod(shapes[j]):
            raise ValueError(
                f"structure={given} is sparser than {proved}, "
                f"which is proved: leaf {i} of the new carry may depend on other entries of leaf "
                f"{j}\nleave structure= out, or, if you know better, pass structure="
                f"jp.unchecked({type(given).__name__}(...)) and try it once with debug=True"
            )


def _edges_between(groups: Groups, shapes: Sequence[Shape], seen: Mapping[int, Shape]) -> Edges:
    """What groups say of leaves seen in these shapes; of one that is cut otherwise, no axis."""
    edges: Edges = {}
    for group in groups:
        members = list(zip(group.leaves, group.shared, group.shapes(shapes), strict=True))
        for i, axes, own in members:
            for j, partners, other in members:
                alike = own == seen[i] and other == seen[j]
                edges[i, j] = set(zip(axes, partners, strict=True)) if alike else set()
    return edges


def check_structure(
    structure: Structure,
    f: Callable[[list[Array]], Sequence[Array]],
    leaves: Sequence[Array],
    key: Key[Array, ""],
) -> None:
    """Compare one random vjp of a step with the same product by the structured Jacobian.

    u^T J by autodiff against u^T J from the blocks only; they differ, for almost
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
    blocks = jacobian_products.blocks_of(f, leaves, groups, reverse_mode=True)
    rows = jacobian_products.apply(
        blocks, jacobian_products.to_lanes(groups, cotangents), transpose=True
    )
    claimed = jacobian_products.from_lanes(groups, rows, leaves)
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
