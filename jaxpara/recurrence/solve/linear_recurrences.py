"""Linear recurrences over leaves: the inner solve of Newton, tangents and adjoints.

An `Operator` is `J_t` for every step, either materialised as blocks `[K, K, N]` or
left as a pair of functions that apply it. Two systems are solved with it:

    forward:     v_t = J_t v_{t-1} + b_t
    transposed:  w_t = g_t + J_{t+1}^T w_{t+1},  walked from the last step to the first

Each is a recurrence like any other, so "chunked" is multiple shooting (exact after
one correction, verified, completed if a chunk product overflows), "sequential" is
`lax.scan`, and "associative" is `lax.associative_scan` over blocks. [blelloch]
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.recurrence.lanes import any_lane, vary_like
from jaxpara.recurrence.solve import jacobian_products, linear_kernel, sharded_time
from jaxpara.recurrence.solve.shooting import shooting
from jaxpara.recurrence.structure.jacobian_blocks import Groups, block_size
from jaxpara.recurrence.system import Leaves, Settings, System

METHODS = ("sequential", "associative", "chunked", "kernel")

# Jacobians are materialised up to these block sizes: a batched evaluation over all
# steps and a tight recurrence beat re-evaluating the step inside it, until the
# blocks outgrow the states that they come from.
MATERIALISED = {"sequential": 16, "associative": 128, "chunked": 8, "kernel": 8}


class Operator(NamedTuple):
    """`J_t` for all steps.

    Attributes:
      data: pytree with leading time, what `push` and `pull` need of one step.
      push: `(data_t, v) -> J_t v` on lists of leaves.
      pull: `(data_t, w) -> J_t^T w`.
      groups: the structure of `J`.
      materialised: whether `data` are the blocks `[time, K, K, N]` themselves.
      columns: whether they are columns `[time, K, *leaf]`.
    """

    data: Any
    push: Callable[[Any, Leaves], list[jax.Array]]
    pull: Callable[[Any, Leaves], list[jax.Array]]
    groups: Groups
    materialised: bool
    columns: bool = False


def block_operator(groups: Groups, matrices: Leaves, like: Sequence[Any]) -> Operator:
    """The operator of materialised Jacobians `[time, K, K, N]`; `like` are leaf shapes."""

    def applied(transpose):
        def function(matrix, v):
            moved = jacobian_products.apply(
                matrix, jacobian_products.to_lanes(groups, list(v)), transpose
            )
            return jacobian_products.from_lanes(groups, moved, like)

        return function

    return Operator(list(matrices), applied(False), applied(True), groups, True)


def elementwise(groups: Groups, like: Sequence[Any]) -> bool:
    """Whether every group couples only equal elements of leaves of one shape."""
    return all(
        like[i].shape == like[group.leaves[0]].shape
        and shared == tuple(range(like[i].ndim))
        and not group.views
        for group in groups
        for i, shared in zip(group.leaves, group.shared, strict=True)
    )


def column_operator(groups: Groups, columns: Leaves) -> Operator:
    """The operator of an elementwise Jacobian held as columns `[time, K, *leaf]`.

    Leaves stay as they are: no gathering into lanes, which costs more than the
    arithmetic where a step is small. Products of leaves of two types are summed in the wider one.
    """
    partners = {i: group.leaves for group in groups for i in group.leaves}

    def push(rows: Any, v: Leaves) -> list[jax.Array]:
        return [
            _total(row[j] * v[other] for j, other in enumerate(partners[i])).astype(row.dtype)
            for i, row in enumerate(rows)
        ]

    def pull(rows: Any, w: Leaves) -> list[jax.Array]:
        return [
            _total(rows[other][partners[i].index(i)] * w[other] for other in partners[i]).astype(
                rows[i].dtype
            )
            for i in range(len(rows))
        ]

    return Operator(list(columns), push, pull, groups, False, True)


def step_operator(system: System, before: Leaves) -> Operator:
    """The operator of a system's step at the states `before`, by the step's own tangents.

    Nothing of size `K x K` is held. This is the way for large blocks.
    """

    def push(data: Any, v: Leaves) -> list[jax.Array]:
        state, x = data
        return [leaf[0] for leaf in system.push(state, x, [leaf[None] for leaf in v])[1]]

    def pull(data: Any, w: Leaves) -> list[jax.Array]:
        state, x = data
        return jax.vjp(lambda s: list(system.step(s, x)[0]), list(state))[1](list(w))[0]

    return Operator((list(before), system.xs), push, pull, system.groups, False)


def held(groups: Groups, like: Sequence[Any], settings: Settings) -> bool:
    """Whether Jacobians of this structure are materialised; `like` are leaf shapes."""
    shapes = [leaf.shape for leaf in like]
    method = "chunked" if settings.axis is not None else settings.linear
    size = max((block_size(group, shapes) for group in groups), default=0)
    return size <= MATERIALISED.get(method, MATERIALISED["chunked"])


def _total(terms: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, terms)


def forward(
    operator: Operator, b: Leaves, init: Leaves, settings: Settings, reverse: bool = False
) -> list[jax.Array]:
    """All `v_t`, `[time, *leaf]`, of `v_t = J_t v_{t-1} + b_t` in scan order.

    Args:
      operator: `J_t`, in scan order.
      b: inhomogeneous terms `[time, *leaf]`.
      init: `v_0`; replicated if time is sharded.
      settings: `linear` picks the method, `axis` shards time.
      reverse: scan order runs against the mesh axis.
    """

    def step(v, inputs):
        data, b_t = inputs
        moved = operator.push(data, v)
        return [m + b for m, b in zip(moved, b_t, strict=True)], ()

    if settings.linear == "kernel" and settings.axis is None:
        found = linear_kernel.solve(operator, b, init, settings.implementation)
        if found is not None:
            return found
    if _method(operator, settings) == "sequential" and operator.materialised:
        return _sequential(operator, list(b), list(init))
    if _method(operator, settings) == "associative":
        first = operator.push(jax.tree.map(lambda d: d[0], operator.data), init)
        b = [b_.at[0].add(f) for b_, f in zip(b, first, strict=True)]
        return _associative(operator, operator.data, list(b))
    return list(_run(step, operator.push, operator, list(b), init, settings, reverse)[0])


def transposed(
    operator: Operator, g: Leaves, settings: Settings, reverse: bool = False
) -> tuple[list[jax.Array], list[jax.Array]]:
    """All `w_t` of `w_t = g_t + J_{t+1}^T w_{t+1}`, and `J_1^T w_1`.

    The latter is zero on all devices but the first.

    Args:
      operator: `J_t`, in scan order.
      g: cotangents `[time, *leaf]` of the states, in scan order.
      settings, reverse: as for `forward`.
    """
    zero = [jnp.zeros_like(g_[0]) for g_ in g]

    def step(u, inputs):
        data, g_t = inputs
        w = [a + b for a, b in zip(u, g_t, strict=True)]
        return operator.pull(data, w), w

    if _method(operator, settings) == "sequential":
        into, w = lax.scan(step, zero, (operator.data, list(g)), reverse=True)
        return w, into
    if settings.linear == "kernel" and settings.axis is None:
        offset = jax.vmap(lambda d, *g_: operator.pull(d, g_))(operator.data, *g)
        u = linear_kernel.solve(operator, offset, zero, settings.implementation, transpose=True)
        if u is not None:
            after = [jnp.concatenate([u_[1:], z[None]]) for z, u_ in zip(zero, u, strict=True)]
            return [a + b for a, b in zip(after, g, strict=True)], [u_[0] for u_ in u]
    flipped = jax.tree.map(lambda leaf: leaf[::-1], (operator.data, list(g)))
    if _method(operator, settings) == "associative":
        matrices = [jnp.swapaxes(m, 1, 2) for m in flipped[0]]
        offset = jax.vmap(lambda d, *g_: operator.pull(d, g_))(flipped[0], *flipped[1])
        u = _associative(operator, matrices, offset)
        before = [jnp.concatenate([z[None], u_[:-1]]) for z, u_ in zip(zero, u, strict=True)]
        w = [a + b for a, b in zip(before, flipped[1], strict=True)]
        return [w_[::-1] for w_ in w], [u_[-1] for u_ in u]

    backwards = operator._replace(data=flipped[0])
    states, w = _run(step, operator.pull, backwards, flipped[1], zero, settings, not reverse)
    last = [s[-1] for s in states]
    axis = sharded_time.along(settings.axis, not reverse)
    if axis is not None:
        # The initial state belongs to the first device; elsewhere nothing reaches it.
        mine = axis.rank() == axis.size - 1
        last = [jnp.where(mine, leaf, jnp.zeros_like(leaf)) for leaf in last]
    return [w_[::-1] for w_ in w], last


def _method(operator: Operator, settings: Settings) -> str:
    if settings.axis is not None:
        return "chunked"
    if settings.linear in ("kernel", "auto"):
        return "chunked"  # what a kernel refuses, and a solve outside of a call of ours
    if settings.linear == "associative" and not operator.materialised:
        return "chunked"
    return settings.linear


def _run(step, apply, operator, offsets, init, settings, reverse):
    """States `[time, *leaf]` and outputs of an affine `step`, in scan order."""
    xs = (operator.data, offsets)
    length = offsets[0].shape[0]
    if _method(operator, settings) == "sequential":

        def stacked(state, x):
            state, y = step(state, x)
            return state, (state, y)

        return lax.scan(stacked, list(init), xs)[1]

    def push(state, x, tangents):
        moved = jax.vmap(lambda *t: apply(x[0], t))(*tangents)
        return step(state, x)[0], moved

    # Its own derivative by construction; rounding is as large as a step below float32.
    certain = all(jnp.finfo(leaf.dtype).bits >= 32 for leaf in init)
    system = System(step, push, init, xs, length, operator.groups, certain, reverse=reverse)
    # A converged nonlinear solve may carry its own tolerance; a linear one is exact.
    solution = shooting(system, settings._replace(tol=None, max_iters=4))
    return solution.states, solution.ys


def _sequential(operator: Operator, b: Leaves, init: Leaves) -> list[jax.Array]:
    """`lax.scan` over rows `[K, N]`: leaves become rows before the loop, not in its every step."""
    groups = operator.groups
    rows = jax.vmap(lambda *leaves: jacobian_products.to_lanes(groups, leaves))(*b)
    states = _rows(operator.data, rows, jacobian_products.to_lanes(groups, init))
    return jax.vmap(lambda *v: jacobian_products.from_lanes(groups, v, init))(*states)


def _rows(matrices: Leaves, rows: Leaves, start: Leaves) -> list[jax.Array]:
    """All `v_t = J_t v_{t-1} + r_t`, `[time, K, N]`, one after another."""
    single = [matrix.shape[1] == 1 for matrix in matrices]
    matrices = [m[:, 0, 0] if s else m for m, s in zip(matrices, single, strict=True)]
    rows = [r[:, 0] if s else r for r, s in zip(rows, single, strict=True)]
    start = [
        (v[0] if s else v).astype(r.dtype) for v, r, s in zip(start, rows, single, strict=True)
    ]

    def step(state, inputs):
        new = [
            ((m * v if s else jacobian_products.apply([m], [v])[0]) + r).astype(r.dtype)
            for m, v, r, s in zip(inputs[0], state, inputs[1], single, strict=True)
        ]
        return new, new

    states = lax.scan(step, vary_like(start, matrices, rows), (matrices, rows))[1]
    return [v[:, None] if s else v for v, s in zip(states, single, strict=True)]


def _associative(operator: Operator, matrices: Leaves, offset: Leaves) -> list[jax.Array]:
    groups = operator.groups
    rows = jax.vmap(lambda *b: jacobian_products.to_lanes(groups, b))(*offset)

    def combine(left, right):
        (a1, b1), (a2, b2) = left, right
        product = jax.vmap(lambda x, y: jacobian_products.multiply(x, y))(a2, a1)
        moved = jax.vmap(lambda x, y: jacobian_products.apply(x, y))(a2, b1)
        return product, [m + b for m, b in zip(moved, b2, strict=True)]

    _, states = lax.associative_scan(combine, (list(matrices), list(rows)))
    # A product of Jacobians may overflow where no state does: infinity times zero is not zero.
    finite = functools.reduce(jnp.logical_and, [jnp.isfinite(s).all() for s in states])
    still = [jnp.zeros_like(r[0]) for r in rows]
    states = lax.cond(any_lane(~finite), lambda: _rows(matrices, rows, still), lambda: list(states))
    like = [o[0] for o in offset]
    return jax.vmap(lambda *s: jacobian_products.from_lanes(groups, s, like))(*states)
