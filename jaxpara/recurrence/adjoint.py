"""Derivatives of a solved recurrence, by the implicit function theorem.

At the solution the tangents obey one linear recurrence,

    dh_t = J_t dh_{t-1} + (df/dx_t) dx_t + (df/dp) dp,

whatever solver found it. The general rule is a `custom_jvp` that poses it through
`lax.custom_linear_solve`, so that every transform and every order follows. The
"reverse" rule is a `custom_vjp`: one reversed linear recurrence over recomputed
Jacobians and one batched vjp of the step; memory O(T). [deer] [pararnn]
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.recurrence import fused, jacobian, timeaxis
from jaxpara.recurrence.affine import (
    Operator,
    block_operator,
    column_operator,
    elementwise,
    forward,
    transposed,
)
from jaxpara.recurrence.blocks import Groups, block_size, elements
from jaxpara.recurrence.leaves import (
    as_before,
    as_float,
    differentiable,
    floating,
    jvp,
    shapes_of,
    unfill,
    without_zeros,
)
from jaxpara.recurrence.sequential import only_kept, sequential
from jaxpara.recurrence.system import Leaves, Settings, Solver, System

# Jacobians are materialised up to these block sizes: a batched evaluation over all
# steps and a tight recurrence beat re-evaluating the step inside it, until the
# blocks outgrow the states that they come from.
_MATERIALISED = {"sequential": 8, "associative": 128, "chunked": 8, "kernel": 8}


class Problem(NamedTuple):
    """A traced recurrence in scan order, ready to be solved and differentiated.

    Attributes:
      step: `(consts, state, x) -> (state, outputs)`, lists of leaves.
      groups: proved structure of its Jacobian.
      solver: the solver.
      vjp_only: the step contains a `custom_vjp`, so it must not be pushed forward.
      reverse: scan order runs against the mesh axis.
      unroll: as for `lax.scan`.
    """

    step: Callable[..., Any]
    groups: Groups
    solver: Solver
    vjp_only: bool
    reverse: bool
    unroll: int | bool


def solve(problem: Problem, derivative: str, keep: tuple[int, ...], consts, init, xs, guess):
    """`(end, kept states, outputs, converged, iterations, residual, fallback_steps, starts)`.

    End, states and outputs are differentiable in `consts`, `init` and `xs`.

    Args:
      problem: what to solve.
      derivative: "general" or "reverse".
      keep: the leaves whose states after every step are wanted; a sequential solve
        that is not differentiated stores no others.
      consts, init, xs: lists of leaves; `xs` with leading time.
      guess: starts of an earlier solve, or None.
    """

    settings = problem.solver.settings

    def packed(states, ys, diagnostics):
        inert.update(outputs=shapes_of(ys), diagnostics=shapes_of(diagnostics))
        smooth = [y for y in ys if differentiable(y)]
        # Integers leave the rule as floats: the tangent of an integer has a type of
        # its own that cannot vary over a mesh axis.
        rest = [as_float(y) for y in ys if not differentiable(y)]
        return states, smooth, (rest, jax.tree.map(as_float, diagnostics))

    def full(*operands):
        system = _system(problem, *operands[:3])
        solution = problem.solver.solve(system, settings, operands[3])
        return packed(list(solution.states), list(solution.ys), solution[2:])

    def wanted(out):
        states, smooth, rest = out
        return ([s[-1] for s in states], [states[i] for i in keep]), smooth, rest

    def light(*operands):
        if problem.solver.solve is not sequential:
            return wanted(full(*operands))
        states, ys, diagnostics = only_kept(_system(problem, *operands[:3]), keep)
        return packed(states, ys, diagnostics)

    inert = {}
    # Behind a sequential solve the blocked general rule is also the fastest reverse one.
    if settings.linear == "sequential" and not problem.vjp_only:
        derivative = "general"
    rule = {"general": _general, "reverse": _reverse}[derivative]
    run = rule(problem, full, light, wanted)
    (end, states), smooth, rest = run(list(consts), list(init), list(xs), guess)
    rest, diagnostics = jax.tree.map(lax.stop_gradient, rest)
    smooth, rest = iter(smooth), iter(rest)
    ys = [
        next(smooth) if differentiable(like) else as_before(next(rest), like)
        for like in inert["outputs"]
    ]
    return (end, states, ys, *jax.tree.map(as_before, diagnostics, inert["diagnostics"]))


def _system(problem: Problem, consts, init, xs) -> System:
    def step(state, x):
        return problem.step(consts, state, x)

    def push(state, x, columns):
        if not problem.vjp_only:
            new, linear = jax.linearize(lambda *s: list(step(list(s), x)[0]), *state)
            return new, jax.vmap(lambda *c: linear(*c))(*columns)
        new = step(state, x)[0]
        matrices = jacobian.blocks_of(lambda s: step(s, x)[0], state, problem.groups, True)
        product = jacobian.multiply(matrices, jacobian.gather_columns(problem.groups, columns))
        return new, jacobian.spread_columns(problem.groups, product, new)

    length = jax.tree.leaves(xs)[0].shape[0]
    return System(step, push, init, xs, length, problem.groups, problem.reverse, problem.unroll)


def _operator(problem: Problem, consts, before: Leaves, xs) -> Operator:
    """`J_t` at the solution: blocks where they are small, else the step's own jvp, vjp."""
    shapes = [b.shape[1:] for b in before]
    size = max(block_size(group, shapes) for group in problem.groups)
    like = [jax.ShapeDtypeStruct(b.shape[1:], b.dtype) for b in before]

    def at(x):
        return lambda state: list(problem.step(consts, list(state), x)[0])

    if size <= 8 and elementwise(problem.groups, like) and not problem.vjp_only:
        columns = jax.vmap(lambda s, x: jacobian.columns_of(at(x), s, problem.groups))
        return column_operator(problem.groups, columns(list(before), xs))
    if size <= _MATERIALISED[problem.solver.settings.linear]:
        matrices = jax.vmap(
            lambda s, x: jacobian.blocks_of(at(x), s, problem.groups, problem.vjp_only)
        )(list(before), xs)
        return block_operator(problem.groups, matrices, like)

    def push(data, v):
        state, x = data
        return jax.jvp(at(x), (list(state),), (list(v),))[1]

    def pull(data, w):
        state, x = data
        return jax.vjp(at(x), list(state))[1](list(w))[0]

    return Operator((list(before), xs), push, pull, problem.groups, False)


def _general(problem: Problem, full, light, wanted):
    settings = problem.solver.settings
    axis = timeaxis.along(settings.axis, problem.reverse)

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
        d_init = [jnp.zeros_like(i) if d is None else d for d, i in zip(d_init, init, strict=True)]
        before = timeaxis.preceding(axis, init, states)
        along = _tangents if settings.linear != "sequential" else _blocked_tangents
        delta, dy, _ = along(problem, consts, d_consts, d_init, (before, xs, d_xs))
        return out, (delta, dy, jax.tree.map(jnp.zeros_like, rest))

    def rule_wanted(primals, tangents):
        out, d_out = rule(primals, tangents)
        return wanted(out), wanted(d_out)

    run_full.defjvp(rule, symbolic_zeros=True)
    run.defjvp(rule_wanted, symbolic_zeros=True)
    return run


def _tangents(problem: Problem, consts, d_consts, d_init, rows):
    """Tangents of states and outputs over `rows = (before, xs, d_xs)`, and of the end."""
    settings = problem.solver.settings
    axis = timeaxis.along(settings.axis, problem.reverse)
    before, xs, d_xs = rows

    def steps(consts, before, xs):
        new, ys = jax.vmap(lambda s, x: problem.step(consts, s, x))(list(before), xs)
        return new, [y for y in ys if differentiable(y)]

    b, dy = jvp(lambda c, x: steps(c, before, x), (consts, xs), (d_consts, d_xs))
    operator = _operator(problem, consts, before, xs)
    if settings.linear == "sequential":

        def forward_step(v, inputs):
            data, b_t = inputs
            v = [m + b for m, b in zip(operator.push(data, v), b_t, strict=True)]
            return v, v

        # A plain scan over a linear step: JAX transposes it into the reversed one.
        end, delta = lax.scan(forward_step, list(d_init), (operator.data, b))
    else:
        delta = linear_solve(operator, b, d_init, settings, problem.reverse)
        end = [d[-1] for d in delta]
    if dy:
        moved = timeaxis.preceding(axis, d_init, delta)
        _, through = jvp(lambda s: steps(consts, s, xs), (before,), (moved,))
        dy = [a + b for a, b in zip(dy, through, strict=True)]
    return delta, dy, end


def _blocked_tangents(problem: Problem, consts, d_consts, d_init, rows):
    """`_tangents` in blocks of time, recomputed block by block when transposed.

    On a CPU the vectors of all steps would each travel through main memory; those of
    a block stay in cache, and the backward pass keeps nothing but the states.
    """
    before = rows[0]
    steps = before[0].shape[0]
    size = min(steps, _block_steps(sum(elements(b.shape[1:]) for b in before)))
    count = steps // size

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(d, rows):
        delta, dy, end = _tangents(problem, consts, d_consts, d, rows)
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
    operator: Operator, b: Leaves, init: Leaves, settings: Settings, reverse: bool = False
) -> list[jax.Array]:
    """All `v_t` of `v_t = J_t v_{t-1} + b_t` from `v_0 = init`, differentiable.

    Posed as a linear solve whose transpose is the reversed recurrence, so that linear
    maps in it keep their derivatives of every order.
    """
    axis = timeaxis.along(settings.axis, reverse)
    still = [jnp.zeros_like(i) for i in init]
    first = operator.push(jax.tree.map(lambda d: d[0], operator.data), init)
    if axis is not None:
        first = [jnp.where(axis.rank() == 0, f, jnp.zeros_like(f)) for f in first]
    b = _together([b_.at[0].add(f) for b_, f in zip(b, first, strict=True)])

    def matvec(v):
        moved = jax.vmap(operator.push)(operator.data, timeaxis.preceding(axis, still, v))
        return [a - m for a, m in zip(v, moved, strict=True)]

    return lax.custom_linear_solve(
        matvec,
        b,
        solve=lambda _, b: forward(operator, b, still, settings, reverse),
        transpose_solve=lambda _, g: transposed(operator, g, settings, reverse)[0],
    )


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


def _reverse(problem: Problem, full, light, wanted):
    settings = problem.solver.settings
    axis = timeaxis.along(settings.axis, problem.reverse)

    @jax.custom_vjp
    def run(consts, init, xs, guess):
        return light(consts, init, xs, guess)

    def run_forward(consts, init, xs, guess):
        out = full(consts, init, xs, guess)
        return wanted(out), (consts, init, xs, out[0])

    def run_backward(residuals, cotangents):
        consts, init, xs, states = residuals
        seen_by, g_ys, rest = cotangents
        # `wanted` is linear in the states: its transpose spreads their cotangents.
        spread = jax.linear_transpose(lambda s: wanted((s, g_ys, rest))[0], states)
        (g,) = spread(seen_by)
        before = timeaxis.preceding(axis, init, states)
        (c, x), fill = floating((consts, xs))

        def steps(before, *inputs):
            consts, xs = fill(inputs)
            new, ys = jax.vmap(lambda s, x: problem.step(consts, s, x))(list(before), xs)
            return new, [y for y in ys if differentiable(y)]

        inputs = [*c, *x]
        from_outputs = [jnp.zeros_like(i) for i in init]
        if g_ys:
            still = [jnp.zeros_like(s) for s in g]
            (_, ys), pull_state = jax.vjp(lambda b: steps(b, *inputs), before)
            seen = pull_state((still, g_ys))[0]
            g, from_outputs = _following(problem, g, seen)
        found = None
        if problem.solver.solve is fused.fused:
            found = fused.gradients(
                problem.step, settings, consts, init, xs, states, g, problem.reverse
            )
        if found is None:
            operator = _operator(problem, consts, before, xs)
            w, into_init = transposed(operator, g, settings, problem.reverse)
            _, pull = jax.vjp(lambda *i: steps(before, *i), *inputs)
            grads = pull((w, g_ys))
        else:
            into_init, grads = found
            if g_ys:
                _, pull = jax.vjp(lambda *i: steps(before, *i)[1], *inputs)
                grads = [a + b for a, b in zip(grads, pull(g_ys), strict=True)]
        g_consts, g_xs = unfill((consts, xs), grads)
        g_init = [a + b for a, b in zip(into_init, from_outputs, strict=True)]
        return g_consts, g_init, g_xs, None

    run.defvjp(run_forward, run_backward)
    return run


def _following(problem: Problem, g: Leaves, seen: Leaves):
    """Moves cotangents of the state *before* each step to the step that made it.

    Returns `(g, cotangent of the initial state)`.
    """
    axis = timeaxis.along(problem.solver.settings.axis, problem.reverse)
    first = [s[0] for s in seen]
    last = [jnp.zeros_like(f) for f in first]
    if axis is not None:
        backwards = timeaxis.Along(axis.name, not problem.reverse)
        last = backwards.previous(first, last)
        mine = axis.rank() == 0
        first = [jnp.where(mine, f, jnp.zeros_like(f)) for f in first]
    moved = [jnp.concatenate([s[1:], e[None]]) for s, e in zip(seen, last, strict=True)]
    return [a + b for a, b in zip(g, moved, strict=True)], first
