"""Pointwise solvers: the unknowns are all states at once.

Each iteration evaluates the step at every time side by side, `F_t = f(h_{t-1}, x_t)`,
and updates the whole trajectory:

    Newton (DEER, ParaRNN):  h'_t = F_t + J_t (h'_{t-1} - h_{t-1}),  J_t = df/dh
    quasi-Newton:            the same with the diagonal of J_t
    Jacobi (Picard):         h'_t = F_t

After k iterations the first k states are exact. Non-finite updates fall back to
`F_t`, which keeps that guarantee when Newton overshoots. Newton is done when its next update is
within rounding twice in a row: an update may cross a kink, or what is as good as one, and the
second is taken behind it. Where a step holds kinks both sides must agree (see `beside`). The
updates of the other two understate the error, so they only bring the states near, and a few
iterations of Newton decide. Where those would need Jacobians that the solver is there to avoid, all
states must agree with the step bit for bit.
[deer], [elk], [pararnn]
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.recurrence.lanes import select, vary_like
from jaxpara.recurrence.solve import earlier_sizes, jacobian_products, sharded_time
from jaxpara.recurrence.solve.certified import (
    beside,
    carrying,
    exact,
    gaps,
    limit,
    moved_by,
    residual,
    scales,
    tested,
)
from jaxpara.recurrence.solve.complete import complete
from jaxpara.recurrence.solve.iterate import Attempt, iterate, leading
from jaxpara.recurrence.solve.linear_recurrences import block_operator, forward, held, step_operator
from jaxpara.recurrence.structure.jacobian_blocks import (
    Group,
    Groups,
    block_size,
    coupled_axes,
    coupled_size,
)
from jaxpara.recurrence.system import Leaves, Settings, Solution, System
from pallas_kernels import certificate

# Iterations of Newton that may follow those of a solver whose updates bound nothing, once these are
# below this power of what counts: Newton squares an error, so three or four are wanted.
_PROVING, _NEAR = 8, 0.25
# Steps whose rounding a gap between neighbours may hold.
_LOOK_BACK = 2


def newton(
    system: System,
    settings: Settings,
    guess: Leaves | None = None,
    *,
    finish: Callable[..., tuple[Any, jax.Array]] = complete,
) -> Solution:
    """Pointwise Newton with the exact Jacobian of the proved structure.

    `finish` does what the budget left open, see `shooting.shooting`.
    """
    return _solve(system, settings, guess, None, True, finish)


def quasi_newton(system: System, settings: Settings, guess: Leaves | None = None) -> Solution:
    """Pointwise Newton with the diagonal of the Jacobian."""
    shapes = [leaf.shape for leaf in system.init]
    if all(block_size(group, shapes) == 1 for group in system.groups):
        return newton(system, settings, guess)
    diagonal = tuple(Group((i,), (tuple(range(len(s))),)) for i, s in enumerate(shapes))

    def own(*tangents):
        return [_own_element(system.groups, t, i, system.init) for i, t in enumerate(tangents)]

    def blocks(pushed):
        rows = jax.vmap(own)(*pushed)
        return [r.reshape(r.shape[0], 1, 1, math.prod(r.shape[1:])) for r in rows]

    # Its diagonals are read off as many tangents as Newton's Jacobians.
    correct = _newton_correction(diagonal, settings, blocks)
    return _solve(system, settings, guess, correct, True)


def jacobi(system: System, settings: Settings, guess: Leaves | None = None) -> Solution:
    """Jacobi (Picard) iteration: the step applied to the previous trajectory."""

    def correct(system, before, after, states, xs, carried):
        return after, gaps(after, states, carried)

    # No Jacobian larger than it would hold for the adjoint.
    small = held(system.groups, system.init, Settings(linear="sequential"))
    one_by_one = settings.linear == "sequential" and settings.axis is None
    return _solve(system, settings, guess, correct, small or one_by_one)


def _exact(system: System, settings: Settings) -> Callable:
    groups = system.groups

    def blocks(pushed):
        return jax.vmap(lambda *p: jacobian_products.gather_columns(groups, p))(*pushed)

    return _newton_correction(groups, settings, blocks)


def _own_element(groups: Groups, tangents: jax.Array, leaf: int, like: Leaves) -> jax.Array:
    """`d s_i / d s_i` of one leaf from its tangents `[K, *leaf]`."""
    (group,) = (group for group in groups if leaf in group.leaves)
    row, seen = 0, group.shapes([part.shape for part in like])
    for other, shape, shared in zip(group.leaves, seen, group.shared, strict=True):
        rows = coupled_size(shape, shared)
        if other == leaf:
            break
        row += rows
    axes = coupled_axes(shape, shared)
    # A column for each coupled entry, which is the only one that it is wanted at.
    own = tangents[row : row + rows].reshape([shape[axis] for axis in axes] + list(shape))
    for done, axis in enumerate(axes):
        own = jnp.diagonal(own, axis1=0, axis2=len(axes) + axis - 2 * done)
    order = [axis for axis in range(len(shape)) if axis not in axes] + list(axes)
    return jnp.transpose(own, sorted(range(len(order)), key=order.__getitem__)).reshape(
        like[leaf].shape
    )


def _newton_correction(groups: Groups, settings: Settings, blocks: Callable):
    """What updates the states; and the updates, `carried` times, infinite where one was dropped.

    `blocks` makes Jacobians `[time, K, K, N]` of tangents `[time, Kmax, *leaf]`.
    """

    def correct(system, before, after, states, xs, carried):
        like = [b[0] for b in before]
        if groups == system.groups and not held(groups, like, settings):
            operator = step_operator(system, before)
        else:
            unit = vary_like(jacobian_products.basis(system.groups, like), before)
            pushed = jax.vmap(lambda s, x: system.push(s, x, unit)[1])(list(before), xs)
            operator = block_operator(groups, blocks(pushed), like)
        gap = gaps(after, states, carried)
        still = [jnp.zeros_like(leaf) for leaf in like]
        linear = settings._replace(chunks=None)
        delta = forward(operator, gap, still, linear, system.reverse)
        # Behind a state that stays the step decides, of two zeros as well.
        moved = [d - g for d, g in zip(delta, gap, strict=True)]
        new = [moved_by(a, m, carried) for a, m in zip(after, moved, strict=True)]
        fits = [jnp.isfinite(n) for n in new]
        bound = [jnp.where(f, d, jnp.inf) for f, d in zip(fits, delta, strict=True)]
        return [jnp.where(f, n, a) for f, n, a in zip(fits, new, after, strict=True)], bound

    return correct


def _solve(
    system: System, settings: Settings, guess, approach, certifying: bool, finish=complete
) -> Solution:
    """Iterates Newton's correction, where there is an `approach` after that one's.

    Args:
      system, settings, guess: as for every solver.
      approach: a correction that brings the states near, or None.
      certifying: Newton's corrections may follow; without them only bitwise agreement counts.
      finish: see `newton`.
    """
    axis = sharded_time.along(settings.axis, system.reverse)
    init = vary_like(list(system.init), system.xs)
    steps = system.length
    certain = system.certain and certifying

    def apply(before):
        return list(jax.vmap(lambda s, x: system.step(s, x)[0])(list(before), system.xs))

    def everywhere(number: jax.Array) -> jax.Array:
        return number if axis is None else jnp.max(axis.gather(number))

    def carried_by(states: Leaves) -> jax.Array:
        # Of some states: a CPU would pay for a pass over all of them.
        return carrying([s[:: math.isqrt(steps) or 1] for s in states], everywhere)

    def attempt(
        correct: Callable, scale_of: Callable, tol, states: Leaves, number: jax.Array
    ) -> Attempt:
        before = sharded_time.preceding(axis, init, states)
        after = apply(before)
        carried = carried_by(after)
        if not certain:
            new, _ = correct(system, before, after, states, system.xs, carried)
            return Attempt(exact(after, states), None, new)
        scale = scale_of(after)
        near = sharded_time.preceding(axis, [jnp.abs(i) for i in init], scale)
        sides = [
            correct(system, at, after, states, system.xs, carried)
            for at in beside(system, before, near, number, settings.tol)
        ]
        tests = [tested(after, states, bound, scale, tol, carried) for _, bound in sides]
        within, agreeing = (functools.reduce(jnp.logical_and, t) for t in zip(*tests, strict=True))
        return Attempt(agreeing, within, sides[0][0])

    def run(states: Leaves, correct: Callable, scale_of: Callable, tol, budget: int, **options):
        return iterate(
            functools.partial(attempt, correct, scale_of, tol),
            states,
            budget,
            init,
            everywhere=everywhere,
            **options,
        )

    def scale_lately(after: Leaves) -> Leaves:
        # Steps as far back as shooting looks in its chunks.
        window = certificate.WINDOW * math.isqrt(steps)
        return scales(after, after, init, window)

    def scale_now(after: Leaves) -> Leaves:
        return scales(after, after, init)

    def hidden(after: Leaves, states: Leaves, before: Leaves, counted: jax.Array) -> jax.Array:
        """`[time]`, which gaps of what is returned do not count, see `earlier_sizes`."""
        unit = carried_by(after)

        def passing(ends: Leaves, starts: Leaves, scale: Leaves) -> jax.Array:
            gap = gaps(ends, starts, unit)
            return tested(ends, starts, gap, scale, settings.tol, unit)[0]

        def explained(rows: jax.Array) -> jax.Array:
            left = earlier_sizes.travelled(
                system, before, states, rows, _LOOK_BACK, settings.tol, axis
            )
            return passing([a[rows] for a in after], [s[rows] for s in states], left)

        plain = passing(after, states, earlier_sizes.own(after, states))
        return earlier_sizes.unexplained(counted & ~plain, explained, everywhere)

    if guess is None:
        # One application of the step saves about one iteration over a constant guess.
        states = apply([jnp.broadcast_to(i, (steps, *i.shape)) for i in init])
    else:
        _check_guess(guess, init, steps)
        last = [g[-1] for g in guess]
        end = system.step(last, jax.tree.map(lambda x: x[-1], system.xs))[0]
        states = [jnp.concatenate([g[1:], e[None]]) for g, e in zip(guess, end, strict=True)]
    newton_correction = _exact(system, settings)
    proving = functools.partial(
        run, correct=newton_correction, scale_of=scale_lately, tol=settings.tol, twice=True
    )
    if approach is None:
        found = proving(states, budget=settings.max_iters)
        values, used, near = found.values, found.used, jnp.ones((), bool)
    else:
        tol = max((limit(i.dtype, settings.tol) for i in init), default=0.0) ** _NEAR
        end = run(states, approach, scale_now, tol, settings.max_iters)
        found, values, used, near = end, end.values, end.used, end.done
        if certain:
            # From near by Newton converges in a few iterations, and its updates tell the error.
            found = proving(end.values, budget=_PROVING)
            values = select(near, found.values, end.values)
            used = jnp.where(near, end.used + found.used, end.used)
    before = sharded_time.preceding(axis, init, values)
    # The barrier: a CPU would take all steps again for the comparison.
    after, ys = lax.optimization_barrier(jax.vmap(system.step)(before, system.xs))
    agreed, worst = exact(list(after), values), residual(list(after), values)
    # Where the approach did not come near, only what is exact needs no completion. What is exact
    # counts whatever its correction, which an infinite Jacobian makes a NaN.
    opening, done = jnp.where(near | (not certain), found.opening, 0), near & found.done
    if certain:
        # Corrections that counted may have hidden where the next one would have led.
        counted = jnp.arange(steps) < jnp.where(done, steps, opening)
        holds = ~hidden(list(after), values, before, counted & ~agreed)
        opening = jnp.minimum(opening, leading(holds))
        done &= everywhere(jnp.any(~holds).astype(jnp.float32)) == 0
    opening = jnp.maximum(opening, leading(agreed))
    done |= everywhere(jnp.any(~agreed).astype(jnp.float32)) == 0
    rows = jax.tree.map(lambda r: r[:, None], (list(values), ys))
    xs = jax.tree.map(lambda x: x[None], system.xs)
    rows, fallback = finish(system, rows, xs, None, before, done, opening, axis, (steps, 1))
    states, ys = jax.tree.map(lambda r: r[:, 0], rows)
    return Solution(states, ys, done, used, everywhere(worst), fallback, before)


def _check_guess(guess: Leaves, init: Leaves, steps: int) -> None:
    for g, i in zip(guess, init, strict=True):
        if g.shape != (steps, *i.shape):
            raise ValueError(
                f"guess has a leaf of shape {g.shape}; a pointwise solver takes the state before "
                f"every step and expects {(steps, *i.shape)}: pass SolveInfo.starts of an earlier "
                "call with the same solver and length"
            )
