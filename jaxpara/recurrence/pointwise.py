"""Pointwise solvers: the unknowns are all states at once.

Each iteration evaluates the step at every time side by side, `F_t = f(h_{t-1}, x_t)`,
and updates the whole trajectory:

    Newton (DEER, ParaRNN):  h'_t = F_t + J_t (h'_{t-1} - h_{t-1}),  J_t = df/dh
    quasi-Newton:            the same with the diagonal of J_t
    Jacobi (Picard):         h'_t = F_t

After k iterations the first k states are exact. Non-finite updates fall back to
`F_t`, which keeps that guarantee when Newton overshoots. [deer] [elk] [pararnn]
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpara.recurrence import jacobian, timeaxis
from jaxpara.recurrence.affine import block_operator, forward, held, step_operator
from jaxpara.recurrence.blocks import Group, Groups, coupled_axes, coupled_size
from jaxpara.recurrence.complete import complete
from jaxpara.recurrence.iterate import Attempt, iterate, leading
from jaxpara.recurrence.lanes import vary_like
from jaxpara.recurrence.system import Leaves, Settings, Solution, System, residuals


def newton(
    system: System,
    settings: Settings,
    guess: Leaves | None = None,
    *,
    finish: Callable[..., tuple[Any, jax.Array]] = complete,
) -> Solution:
    """Pointwise Newton with the exact Jacobian of the proved structure.

    `finish` does what the budget left open, see `shooting.shoot`.
    """
    groups = system.groups

    def blocks(pushed):
        return jax.vmap(lambda *p: jacobian.gather_columns(groups, p))(*pushed)

    correct = _newton_correction(groups, settings, blocks)
    return _iterate(system, settings, guess, correct, finish)


def quasi_newton(system: System, settings: Settings, guess: Leaves | None = None) -> Solution:
    """Pointwise Newton with the diagonal of the Jacobian."""
    shapes = [leaf.shape for leaf in system.init]
    diagonal = tuple(Group((i,), (tuple(range(len(s))),)) for i, s in enumerate(shapes))

    def own(*tangents):
        return [_own_element(system.groups, t, i, system.init) for i, t in enumerate(tangents)]

    def blocks(pushed):
        rows = jax.vmap(own)(*pushed)
        return [r.reshape(r.shape[0], 1, 1, math.prod(r.shape[1:])) for r in rows]

    return _iterate(system, settings, guess, _newton_correction(diagonal, settings, blocks))


def jacobi(system: System, settings: Settings, guess: Leaves | None = None) -> Solution:
    """Jacobi (Picard) iteration: the step applied to the previous trajectory."""
    return _iterate(system, settings, guess, None)


def _own_element(groups: Groups, tangents: jax.Array, leaf: int, like: Leaves) -> jax.Array:
    """`d s_i / d s_i` of one leaf from its tangents `[K, *leaf]`."""
    shape, row = like[leaf].shape, 0
    (group,) = (group for group in groups if leaf in group.leaves)
    for other, shared in zip(group.leaves, group.shared, strict=True):
        rows = coupled_size(like[other].shape, shared)
        if other == leaf:
            break
        row += rows
    axes = coupled_axes(shape, shared)
    # A column for each coupled entry, which is the only one that it is wanted at.
    own = tangents[row : row + rows].reshape([shape[axis] for axis in axes] + list(shape))
    for done, axis in enumerate(axes):
        own = jnp.diagonal(own, axis1=0, axis2=len(axes) + axis - 2 * done)
    order = [axis for axis in range(len(shape)) if axis not in axes] + list(axes)
    return jnp.transpose(own, sorted(range(len(order)), key=order.__getitem__))


def _newton_correction(groups: Groups, settings: Settings, blocks: Callable):
    """`blocks` makes Jacobians `[time, K, K, N]` of tangents `[time, Kmax, *leaf]`."""

    def correct(system, before, after, states, xs):
        like = [b[0] for b in before]
        if groups == system.groups and not held(groups, like, settings):
            operator = step_operator(system, before)
        else:
            unit = vary_like(jacobian.basis(system.groups, like), before)
            pushed = jax.vmap(lambda s, x: system.push(s, x, unit)[1])(list(before), xs)
            operator = block_operator(groups, blocks(pushed), like)
        gap = [a - s for a, s in zip(after, states, strict=True)]
        still = [jnp.zeros_like(leaf) for leaf in like]
        linear = settings._replace(chunks=None)
        delta = forward(operator, gap, still, linear, system.reverse)
        new = [s + d for s, d in zip(states, delta, strict=True)]
        return [jnp.where(jnp.isfinite(n), n, a) for n, a in zip(new, after, strict=True)]

    return correct


def _iterate(system: System, settings: Settings, guess, correct, finish=complete) -> Solution:
    axis = timeaxis.along(settings.axis, system.reverse)
    init = vary_like(list(system.init), system.xs)
    steps = system.length

    def apply(before):
        return list(jax.vmap(lambda s, x: system.step(s, x)[0])(list(before), system.xs))

    def attempt(states: Leaves) -> Attempt:
        before = timeaxis.preceding(axis, init, states)
        after = apply(before)
        excess, worst = residuals(after, states, init, settings.tol, 8, jnp.inf)
        opening, most = leading(excess <= 1), jnp.max(excess, initial=0.0)
        if axis is not None:
            most = jnp.max(axis.gather(most))
            worst = jnp.max(axis.gather(worst))
        new = after if correct is None else correct(system, before, after, states, system.xs)
        return Attempt(most, opening, worst, new)

    if guess is None:
        # One application of the step saves about one iteration over a constant guess.
        states = apply([jnp.broadcast_to(i, (steps, *i.shape)) for i in init])
    else:
        _check_guess(guess, init, steps)
        last = [g[-1] for g in guess]
        end = system.step(last, jax.tree.map(lambda x: x[-1], system.xs))[0]
        states = [jnp.concatenate([g[1:], e[None]]) for g, e in zip(guess, end, strict=True)]
    end = iterate(attempt, states, settings.max_iters, init)
    before = timeaxis.preceding(axis, init, end.values)
    ys = jax.vmap(lambda s, x: system.step(s, x)[1])(before, system.xs)
    rows = jax.tree.map(lambda r: r[:, None], (list(end.values), ys))
    xs = jax.tree.map(lambda x: x[None], system.xs)
    rows, fallback = finish(system, rows, xs, None, before, end.done, end.opening, axis, (steps, 1))
    states, ys = jax.tree.map(lambda r: r[:, 0], rows)
    return Solution(states, ys, end.done, end.used, end.residual, fallback, before)


def _check_guess(guess: Leaves, init: Leaves, steps: int) -> None:
    for g, i in zip(guess, init, strict=True):
        if g.shape != (steps, *i.shape):
            raise ValueError(
                f"guess has a leaf of shape {g.shape}; a pointwise solver takes the state before "
                f"every step and expects {(steps, *i.shape)}: pass SolveInfo.starts of an earlier "
                "call with the same solver and length"
            )
