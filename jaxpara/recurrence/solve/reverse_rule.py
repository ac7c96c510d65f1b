"""The "reverse" rule: one fused backward pass, a `custom_vjp`; first-order gradients only.

Cotangents run through one reversed linear recurrence over recomputed Jacobians,

    w_t = g_t + J_{t+1}^T w_{t+1},

and one batched vjp of the step turns them into gradients; memory O(T). Only what has a cotangent
takes part, see `tangent_flow`. [deer], [pararnn]
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import custom_vjp_primal_tree_values

from jaxpara.recurrence.solve import sharded_time
from jaxpara.recurrence.solve.linear_recurrences import transposed
from jaxpara.recurrence.solve.problem import Problem, operator_of, steps_of
from jaxpara.recurrence.solve.tangent_leaves import floating, known, unfill, without_zeros
from jaxpara.recurrence.system import Leaves


def reverse_rule(problem: Problem, full, light, wanted, keep):
    """`light`, differentiated by the rule of this module; arguments as `general_rule.solve` makes.

    `wanted` takes what `full` returns to what `light` does: of the states the last ones, and all
    those of the leaves `keep`.
    """
    axis = sharded_time.along(problem.settings.axis, problem.reverse)

    @jax.custom_vjp
    def run(consts, init, xs, guess):
        return light(consts, init, xs, guess)

    def run_forward(*operands):
        consts, init, xs, guess = custom_vjp_primal_tree_values(operands)
        out = full(consts, init, xs, guess)
        return wanted(out), (consts, init, xs, out[0], _varied(operands[0]), _varied(operands[2]))

    def run_backward(residuals, cotangents):
        consts, init, xs, states, *varied = residuals
        stopped = problem._replace(still=_still(*varied))
        g_end, g_kept, g_ys = map(without_zeros, (*cotangents[0], cotangents[1]))
        g = _spread(states, keep, g_end, g_kept)
        outs = known(g_ys)
        live = sorted(problem.flow().live(known(g), outs))
        g = [
            jnp.zeros_like(s) if g_ is None and i in live else g_
            for i, (g_, s) in enumerate(zip(g, states, strict=True))
        ]
        before = sharded_time.preceding(axis, init, states)
        at = (consts, before, xs)
        (c, x), fill = floating((consts, xs))

        def through(leaves, outs, cts):
            """Gradients of the inputs by way of these results of all steps."""
            steps = steps_of(stopped, leaves, outs)

            def of_inputs(*inputs):
                consts, xs = fill(inputs)
                return steps(consts, before, xs)

            return jax.vjp(of_inputs, *c, *x)[1](cts)

        g_outs = [g_ys[i] for i in outs]
        found = None
        if problem.solver.gradients is not None and live:
            found = _at_once(stopped, live, at, init, states, g, outs, g_outs)
        if found is None:
            w, into_init = _by_parts(stopped, live, at, init, g, outs, g_outs)
            grads = through(live, outs, ([w[i] for i in live], g_outs))
        else:
            into_init, grads = found
            if outs:
                more = through((), outs, ([], g_outs))
                grads = [a + b for a, b in zip(grads, more, strict=True)]
        g_consts, g_xs = unfill((consts, xs), grads)
        return g_consts, into_init, g_xs, None

    run.defvjp(run_forward, run_backward, symbolic_zeros=True)
    return run


def _varied(operands) -> list[jax.Array]:
    """Which operands are differentiated, as residuals hold it: one number for those that are.

    A shape holds it, not the tree: a program that is differentiated by several of its arguments in
    turn keeps a forward pass for each, but the tree of the last one only.
    """
    return [jnp.zeros(1 if operand.perturbed else 0) for operand in operands]


def _still(consts_varied, xs_varied):
    """`(consts, xs)` without derivatives of operands that are not differentiated, as in `lax.scan`.

    A loop of unknown length, say, may depend on an input and cannot be pulled back through.
    """

    def one(leaf, varied):
        return leaf if varied.size else lax.stop_gradient(leaf)

    def still(consts, xs):
        # The other operands of a kernel follow the inputs.
        own = list(map(one, xs, xs_varied))
        return list(map(one, consts, consts_varied)), [*own, *xs[len(own) :]]

    return still


def _spread(states: Leaves, keep: Sequence[int], g_end, g_kept):
    """Cotangents of all states from those of the last ones and of the leaves that were kept."""
    g = [
        None if end is None else jnp.concatenate([jnp.zeros_like(s[:-1]), end[None]])
        for s, end in zip(states, g_end, strict=True)
    ]
    for i, kept in zip(keep, g_kept, strict=True):
        if kept is not None:
            g[i] = kept if g[i] is None else g[i] + kept
    return g


def _by_parts(problem: Problem, live, at, init, g, outs, g_outs):
    """Cotangents `w` of all new states, and those of the initial state, part by part."""
    flow, settings = problem.flow(), problem.settings
    consts, before, xs = at
    w: list[Any] = [None] * len(before)
    into_init = [jnp.zeros_like(leaf) for leaf in init]
    for part in reversed(flow.parts):
        if part[0] not in live:
            continue
        g_part, seen_init = _seen(problem, part, at, [g[i] for i in part], w, outs, g_outs)
        if flow.loops(part):
            operator = operator_of(problem, part, consts, before, xs)
            g_part, into = transposed(operator, g_part, settings, problem.reverse)
            seen_init = [a + b for a, b in zip(into, seen_init, strict=True)]
        for i, w_, into in zip(part, g_part, seen_init, strict=True):
            w[i], into_init[i] = w_, into
    return w, into_init


def _seen(problem: Problem, part: Sequence[int], at, g: Leaves, w, outs, g_outs):
    """Adds to `g` what later leaves and the outputs see of a part, the state before their step.

    Returns `(g, cotangent of the initial state)`.
    """
    flow = problem.flow()
    consts, before, xs = at
    later = [i for i in known(w) if flow.leaves[i].state & set(part)]
    pairs = [(k, c) for k, c in zip(outs, g_outs, strict=True) if flow.ys[k].state & set(part)]
    if not later and not pairs:
        return list(g), [jnp.zeros_like(g_[0]) for g_ in g]
    steps = steps_of(problem, later, [k for k, _ in pairs])

    def of_part(*leaves):
        whole = list(before)
        for i, leaf in zip(part, leaves, strict=True):
            whole[i] = leaf
        return steps(consts, whole, xs)

    _, pull = jax.vjp(of_part, *(before[i] for i in part))
    return _following(problem, g, pull(([w[i] for i in later], [c for _, c in pairs])))


def _at_once(problem: Problem, live, at, init, states, g, outs, g_outs):
    """Gradients of the initial state and of the inputs by the solver's own means, or None."""
    consts, before, xs = at
    others = [i for i in range(len(before)) if i not in live]
    plain = problem._replace(still=None)  # what has no derivative is stopped outside of the step
    g_live, seen_init = _seen(
        problem, live, at, [g[i] for i in live], [None] * len(before), outs, g_outs
    )

    def step(consts, state, x):
        whole = dict(zip([*live, *others], [*state, *x[len(xs) :]], strict=True))
        new, _ = plain.step(consts, [whole[i] for i in range(len(whole))], x[: len(xs)])
        return [new[i] for i in live], []

    assert problem.solver.gradients is not None
    found = problem.solver.gradients(
        step,
        problem.settings,
        consts,
        [init[i] for i in live],
        [*xs, *(before[i] for i in others)],
        [states[i] for i in live],
        g_live,
        problem.reverse,
        problem.still,
    )
    if found is None:
        return None
    into_init = [jnp.zeros_like(leaf) for leaf in init]
    for i, a, b in zip(live, found[0], seen_init, strict=True):
        into_init[i] = a + b
    return into_init, found[1][: len(found[1]) - len(others)]


def _following(problem: Problem, g: Leaves, seen: Leaves):
    """Moves cotangents of the state *before* each step to the step that made it.

    Returns `(g, cotangent of the initial state)`.
    """
    axis = sharded_time.along(problem.settings.axis, problem.reverse)
    first = [s[0] for s in seen]
    last = [jnp.zeros_like(f) for f in first]
    if axis is not None:
        backwards = sharded_time.Along(axis.name, not problem.reverse)
        last = backwards.previous(first, last)
        mine = axis.rank() == 0
        first = [jnp.where(mine, f, jnp.zeros_like(f)) for f in first]
    moved = [jnp.concatenate([s[1:], e[None]]) for s, e in zip(seen, last, strict=True)]
    return [a + b for a, b in zip(g, moved, strict=True)], first
