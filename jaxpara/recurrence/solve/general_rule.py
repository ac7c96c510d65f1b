"""Derivatives of a solved recurrence, by the implicit function theorem.

At the solution the tangents obey one linear recurrence,

    dh_t = J_t dh_{t-1} + (df/dx_t) dx_t + (df/dp) dp,

whatever solver found it. The general rule is a `custom_jvp` that poses it through
`lax.custom_linear_solve`, so that every transform and every order follows. The
"reverse" rule is a `custom_vjp`, see `reverse_rule`. [deer], [pararnn]
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.recurrence.solve import sharded_time
from jaxpara.recurrence.solve.linear_recurrences import Operator, forward, transposed
from jaxpara.recurrence.solve.problem import Problem, operator_of, steps_of, system_of
from jaxpara.recurrence.solve.reverse_rule import reverse_rule
from jaxpara.recurrence.solve.tangent_leaves import (
    as_before,
    as_float,
    differentiable,
    jvp,
    known,
    only,
    shapes_of,
    without_zeros,
)
from jaxpara.recurrence.structure.jacobian_blocks import elements
from jaxpara.recurrence.structure.tangent_flow import merged
from jaxpara.recurrence.system import Leaves, Settings
from jaxpara.recurrence.wide import narrow


def solve(problem: Problem, keep: tuple[int, ...], consts, init, xs, guess):
    """`(end, kept states, outputs, converged, iterations, residual, fallback_steps, starts)`.

    End, states and outputs are differentiable in `consts`, `init` and `xs`.

    Args:
      problem: what to solve.
      keep: the leaves whose states after every step are wanted; a sequential solve
        that is not differentiated stores no others.
      consts, init, xs: lists of leaves; `xs` with leading time.
      guess: starts of an earlier solve, or None.
    """

    settings = problem.settings

    def packed(states, ys, diagnostics):
        inert.update(outputs=shapes_of(ys), diagnostics=shapes_of(diagnostics))
        smooth = [y for y in ys if differentiable(y)]
        # Integers leave the rule as floats: the tangent of an integer has a type of
        # its own that cannot vary over a mesh axis.
        rest = [as_float(y) for y in ys if not differentiable(y)]
        return states, smooth, (rest, jax.tree.map(as_float, diagnostics))

    def full(*operands):
        system = system_of(problem, *operands[:3])
        solution = problem.solver.solve(system, settings, operands[3])
        return packed(list(solution.states), list(solution.ys), solution[2:])

    def wanted(out):
        states, smooth, rest = out
        return ([s[-1] for s in states], [states[i] for i in keep]), smooth, rest

    def light(*operands):
        if problem.solver.kept is None:
            return wanted(full(*operands))
        return packed(*problem.solver.kept(system_of(problem, *operands[:3]), keep))

    inert = {}
    # Behind a sequential solve the blocked general rule is also the fastest reverse one.
    blocked = settings.linear == "sequential" and not problem.choice.vjp_only
    if blocked or problem.choice.derivative == "general":
        run = _general(problem, full, light, wanted)
    else:
        run = reverse_rule(problem, full, light, wanted, keep)
    (end, states), smooth, rest = run(list(consts), list(init), list(xs), guess)
    rest, diagnostics = jax.tree.map(lax.stop_gradient, rest)
    smooth, rest = iter(smooth), iter(rest)
    ys = [
        next(smooth) if differentiable(like) else as_before(next(rest), like)
        for like in inert["outputs"]
    ]
    return (end, states, ys, *jax.tree.map(as_before, diagnostics, inert["diagnostics"]))


def _general(problem: Problem, full, light, wanted):
    settings = problem.settings
    axis = sharded_time.along(settings.axis, problem.reverse)

    @jax.custom_jvp
    def run(consts, init, xs, guess):
        return light(consts, init, xs, guess)

    @jax.custom_jvp
    def run_full(consts, init, xs, guess):
        return full(consts, init, xs, guess)

    def rule(primals, tangents):
        consts, init, xs, guess = primals
        out = run_full(consts, init, xs, guess)
        states, _, rest = out
        d_consts, d_init, d_xs = [without_zeros(t) for t in tangents[:3]]
        moving = problem.flow().moving(*map(known, (d_consts, d_init, d_xs)))
        d_init = [
            jnp.zeros_like(leaf) if d is None and i in moving else d
            for i, (d, leaf) in enumerate(zip(d_init, init, strict=True))
        ]
        before = sharded_time.preceding(axis, init, states)
        along = _tangents if settings.linear != "sequential" else _blocked_tangents
        delta, dy, _ = along(problem, consts, d_consts, d_init, (before, xs, d_xs))
        delta = [jnp.zeros_like(s) if d is None else d for d, s in zip(delta, states, strict=True)]
        return out, (delta, dy, jax.tree.map(jnp.zeros_like, rest))

    def rule_wanted(primals, tangents):
        out, d_out = rule(primals, tangents)
        return wanted(out), wanted(d_out)

    run_full.defjvp(rule, symbolic_zeros=True)
    run.defjvp(rule_wanted, symbolic_zeros=True)
    return run


def _tangents(problem: Problem, consts, d_consts, d_init, rows):
    """Tangents of states and outputs over `rows = (before, xs, d_xs)`, and of the end.

    Part by part, see `tangent_flow`: each is a linear recurrence of its own, driven by those before
    it. A leaf whose `d_init` is None never moves.
    """
    flow, settings = problem.flow(), problem.settings
    axis = sharded_time.along(settings.axis, problem.reverse)
    before, xs, d_xs = rows
    nothing: list[Any] = [None] * len(before)
    delta, end, moved = (list(nothing) for _ in range(3))

    def slopes(f, fed):
        tangents = [only(d, f) for d, f in zip((d_consts, moved, d_xs), fed, strict=True)]
        return jvp(f, (consts, list(before), xs), tangents)

    for part in flow.parts:
        first = [d_init[i] for i in part]
        if first[0] is None:
            continue
        b = slopes(steps_of(problem, part, ()), merged(flow.leaves[i] for i in part))[0]
        solution, last = _solved(problem, part, b, first, (consts, before, xs))
        ahead = sharded_time.preceding(axis, first, solution)
        for i, d, e, m in zip(part, solution, last, ahead, strict=True):
            delta[i], end[i], moved[i] = d, e, m
    ys = range(len(flow.ys))
    dy = slopes(steps_of(problem, (), ys), merged(flow.ys))[1] if flow.ys else []
    return delta, dy, end


def _solved(problem: Problem, part: Sequence[int], b, first, at):
    """`v_t = J_t v_{t-1} + b_t` from `v_0 = first`, for the leaves of a part: all, and the last."""
    settings = problem.settings
    if not problem.flow().loops(part):
        return b, [b_[-1] for b_ in b]
    operator = operator_of(problem, part, *at)
    if settings.linear != "sequential":
        # JAX does not transpose a branch that is taken at some of many steps side by side.
        branches = problem.flow().branches and not operator.materialised
        over_time = _one_by_one if branches else jax.vmap
        solution = linear_solve(operator, b, first, settings, problem.reverse, over_time=over_time)
        return solution, [s[-1] for s in solution]

    def forward_step(v, inputs):
        data, b_t = inputs
        v = [m + b for m, b in zip(operator.push(data, v), b_t, strict=True)]
        return v, v

    # A plain scan over a linear step: JAX transposes it into the reversed one.
    last, solution = lax.scan(forward_step, list(first), (operator.data, b))
    return solution, last


def _blocked_tangents(problem: Problem, consts, d_consts, d_init, rows):
    """`_tangents` in blocks of time, recomputed block by block when transposed.

    On a CPU the vectors of all steps would each travel through main memory; those of
    a block stay in cache, and the backward pass keeps nothing but the states.
    """
    before = rows[0]
    steps = before[0].shape[0]
    size = min(steps, _block_steps(sum(elements(b.shape[1:]) for b in before)))
    count = steps // size

    # The transposed scan sums the cotangents of these over the blocks, in their dtype.
    wide = [t.astype(jnp.float32) if t is not None and narrow(t.dtype) else t for t in d_consts]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(d, rows):
        own = [t if t is None else t.astype(c.dtype) for t, c in zip(wide, consts, strict=True)]
        delta, dy, end = _tangents(problem, consts, own, d, rows)
        return end, (delta, dy)

    head = jax.tree.map(lambda r: r[: count * size].reshape(count, size, *r.shape[1:]), rows)
    end, out = lax.scan(block, list(d_init), head)
    out = jax.tree.map(lambda o: o.reshape(count * size, *o.shape[2:]), out)
    if count * size < steps:
        end, tail = block(end, jax.tree.map(lambda r: r[count * size :], rows))
        out = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, tail)
    return *out, end


def _block_steps(elements: int) -> int:
    """Steps in a block: about 2048 elements of the state, within 8 to 64 steps.

    Measured on CPUs with D from 8 to 3072: below eight steps the loop itself costs,
    above about 2048 elements XLA no longer inlines the body of the small loops.
    """
    return max(8, min(64, 2048 // max(1, elements)))


def linear_solve(
    operator: Operator,
    b: Leaves,
    init: Leaves,
    settings: Settings,
    reverse: bool = False,
    *,
    over_time: Callable[[Callable], Callable] = jax.vmap,
) -> list[jax.Array]:
    """All `v_t` of `v_t = J_t v_{t-1} + b_t` from `v_0 = init`, differentiable.

    Posed as a linear solve whose transpose is the reversed recurrence, so that linear
    maps in it keep their derivatives of every order. `over_time` applies the operator to
    all steps where those are taken.
    """
    axis = sharded_time.along(settings.axis, reverse)
    still = [jnp.zeros_like(i) for i in init]
    first = operator.push(jax.tree.map(lambda d: d[0], operator.data), init)
    if axis is not None:
        first = [jnp.where(axis.rank() == 0, f, jnp.zeros_like(f)) for f in first]
    b = _together([b_.at[0].add(f) for b_, f in zip(b, first, strict=True)])

    def matvec(v):
        moved = over_time(operator.push)(operator.data, sharded_time.preceding(axis, still, v))
        return [a - m for a, m in zip(v, moved, strict=True)]

    return lax.custom_linear_solve(
        matvec,
        b,
        solve=lambda _, b: forward(operator, b, still, settings, reverse),
        transpose_solve=lambda _, g: transposed(operator, g, settings, reverse)[0],
    )


def _one_by_one(f: Callable) -> Callable:
    return lambda *rows: lax.map(lambda row: f(*row), rows)


def _together(b: list[jax.Array]) -> list[jax.Array]:
    """The same values, each depending linearly on all of them.

    A leaf that the perturbation does not enter directly has a constant zero here, and the
    transpose of a linear solve takes a right-hand side that is linear in all of its leaves.
    """
    if len(b) == 1:
        return b
    token = sum(jnp.sum(b_).astype(jnp.float32) for b_ in b)
    # Selects on a constant, which XLA folds away: no value changes, not even that of a NaN.
    return [jnp.where(False, jnp.asarray(token).astype(b_.dtype), b_) for b_ in b]
