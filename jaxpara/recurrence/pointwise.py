"""Pointwise solvers: the unknowns are all states at once.

Each iteration evaluates the step at every time side by side, `F_t = f(h_{t-1}, x_t)`,
and updates the whole trajectory:

    Newton (DEER, ParaRNN):  h'_t = F_t + J_t (h'_{t-1} - h_{t-1}),  J_t = df/dh
    quasi-Newton:            the same with the diagonal of J_t
    Jacobi (Picard):         h'_t = F_t

After k iterations the first k states are exact. Non-finite updates fall back to
`F_t`, which keeps that guarantee when Newton overshoots. Newton is done when its next update is
within rounding, twice in a row where the step has kinks, which an update may cross. The updates of
the other two understate the error: where they are within rounding, a few iterations of Newton's own
decide, for small blocks; behind larger ones all states must agree with the step bit for bit.
[deer] [elk] [pararnn]
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpara.recurrence import jacobian, timeaxis
from jaxpara.recurrence.affine import block_operator, forward, held, step_operator
from jaxpara.recurrence.blocks import Group, Groups, block_size, coupled_axes, coupled_size
from jaxpara.recurrence.certain import Proof
from jaxpara.recurrence.complete import complete
from jaxpara.recurrence.iterate import Attempt, iterate, leading
from jaxpara.recurrence.lanes import select, vary_like
from jaxpara.recurrence.system import (
    Leaves,
    Settings,
    Solution,
    System,
    excess,
    opposite,
    residuals,
    scales,
)
from pallas_kernels import certificate

# Iterations of Newton's own that may follow those of a solver whose updates bound nothing, for
# blocks up to this size; behind larger ones its states must agree bit for bit.
_CLOSING, _SMALL = 4, 8


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
    return _solve(system, settings, guess, _exact(system, settings), True, finish)


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

    return _solve(system, settings, guess, _newton_correction(diagonal, settings, blocks), False)


def jacobi(system: System, settings: Settings, guess: Leaves | None = None) -> Solution:
    """Jacobi (Picard) iteration: the step applied to the previous trajectory."""

    def correct(system, before, after, states, xs):
        return after, [a - s for a, s in zip(after, states, strict=True)]

    return _solve(system, settings, guess, correct, False)


def _exact(system: System, settings: Settings) -> Callable:
    groups = system.groups

    def blocks(pushed):
        return jax.vmap(lambda *p: jacobian.gather_columns(groups, p))(*pushed)

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
    """What updates the states; and the updates, infinite where one was dropped.

    `blocks` makes Jacobians `[time, K, K, N]` of tangents `[time, Kmax, *leaf]`.
    """

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
        # Of two zeros the one that the step makes: their reciprocals differ.
        new = [jnp.where(n == a, a, n) for n, a in zip(new, after, strict=True)]
        fits = [jnp.isfinite(n) for n in new]
        bound = [jnp.where(f, d, jnp.inf) for f, d in zip(fits, delta, strict=True)]
        return [jnp.where(f, n, a) for f, n, a in zip(fits, new, after, strict=True)], bound

    return correct


def _solve(
    system: System, settings: Settings, guess, correct, exactly: bool, finish=complete
) -> Solution:
    """Iterates `correct`; `exactly`: it is Newton's own, and bounds the error of the states."""
    axis = timeaxis.along(settings.axis, system.reverse)
    init = vary_like(list(system.init), system.xs)
    steps = system.length

    def apply(before):
        return list(jax.vmap(lambda s, x: system.step(s, x)[0])(list(before), system.xs))

    def everywhere(number: jax.Array) -> jax.Array:
        return number if axis is None else jnp.max(axis.gather(number))

    def attempt(correct: Callable, bounding: bool, states: Leaves) -> Attempt:
        before = timeaxis.preceding(axis, init, states)
        after = apply(before)
        exact, worst = residuals(after, states)
        new, bound = correct(system, before, after, states, system.xs)
        units = None
        if bounding:
            # Steps as far back as shooting looks in its chunks.
            window = certificate.WINDOW * math.isqrt(steps)
            units = excess(bound, scales(after, after, init, window), settings.tol)
            units = jnp.where(opposite(after, states), jnp.inf, units)
        return Attempt(exact, units, everywhere(worst), new)

    def run(states: Leaves, correct: Callable, bounding: bool, budget: int, guessed: bool):
        return iterate(
            functools.partial(attempt, correct, bounding),
            states,
            budget,
            init,
            everywhere=everywhere,
            guessed=guessed,
            twice=bounding and system.certain is not Proof.SMOOTH,
        )

    if guess is None:
        # One application of the step saves about one iteration over a constant guess.
        states = apply([jnp.broadcast_to(i, (steps, *i.shape)) for i in init])
    else:
        _check_guess(guess, init, steps)
        last = [g[-1] for g in guess]
        end = system.step(last, jax.tree.map(lambda x: x[-1], system.xs))[0]
        states = [jnp.concatenate([g[1:], e[None]]) for g, e in zip(guess, end, strict=True)]
    small = all(block_size(g, [i.shape for i in init]) <= _SMALL for g in system.groups)
    bounding = bool(system.certain) and (exactly or small)
    closing = bounding and not exactly
    end = run(states, correct, bounding, settings.max_iters, True)
    found, values, used = end, end.values, end.used
    if closing:
        # Their own updates understate the error; Newton's tells it, and is small by now.
        found = run(end.values, _exact(system, settings), True, _CLOSING, False)
        values = select(end.done, found.values, end.values)
        used = jnp.where(end.done, end.used + found.used, end.used)
    before = timeaxis.preceding(axis, init, values)
    after, ys = jax.vmap(system.step)(before, system.xs)
    exact, worst = residuals(list(after), values)
    # Where the solver itself did not finish, only what is exact needs no completion.
    opening = jnp.where(end.done | (not closing), found.opening, leading(exact))
    done = end.done & found.done
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
