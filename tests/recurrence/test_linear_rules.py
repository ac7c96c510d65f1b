"""A custom rule that is no derivative runs step by step, with the derivatives of `lax.scan`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from tests.recurrence.kit import QUICK


def rule(forward, backward):
    f = jax.custom_vjp(forward)
    f.defvjp(lambda x: (forward(x), x), lambda x, g: (backward(x, g),))
    return f


LINEAR = {
    "its derivative": (jnp.sin, lambda x, g: g * jnp.cos(x)),
    "straight through": (lambda x: jnp.round(x), lambda x, g: g),
    "masked": (jnp.tanh, lambda x, g: jnp.where(x > 0, g, 0.0)),
    "halved": (jnp.tanh, lambda x, g: g / (2 + x * x)),
    "nothing": (jnp.tanh, lambda x, g: jnp.zeros_like(g)),
    "jitted": (jnp.tanh, lambda x, g: jax.jit(lambda g: 0.5 * g - 0.25 * g)(g)),
    "read beyond its end": (
        jnp.tanh,
        lambda x, g: g.at[jnp.array([0, 7])].get(mode="fill", fill_value=0),
    ),
    "by a branch of the state": (
        jnp.tanh,
        lambda x, g: lax.cond(jnp.sum(x) > 0, lambda g: 2 * g, lambda g: g, g),
    ),
}
OTHER = {
    "narrowed": (jnp.tanh, lambda x, g: g.astype(jnp.bfloat16).astype(g.dtype)),
    "clipped": (lambda x: x, lambda x, g: jnp.clip(g, -0.1, 0.1)),
    "scaled to norm one": (lambda x: x, lambda x, g: g / (1e-6 + jnp.sqrt(jnp.sum(g * g)))),
    "filled where there was nothing": (
        jnp.tanh,
        lambda x, g: g + jnp.zeros(2).at[jnp.array([0, 7])].get(mode="fill", fill_value=0.5),
    ),
    "filled": (jnp.tanh, lambda x, g: g.at[jnp.array([0, 7])].get(mode="fill", fill_value=5.0)),
    "its sign": (jnp.tanh, lambda x, g: jnp.sign(g)),
    "a constant added": (jnp.tanh, lambda x, g: g + 0.1),
    "a constant": (jnp.tanh, lambda x, g: jnp.ones_like(g)),
    "rounded": (jnp.tanh, lambda x, g: jnp.round(g * 8) / 8),
    "by a branch of the gradient": (
        jnp.tanh,
        lambda x, g: lax.cond(jnp.sum(g) > 1, lambda g: 2 * g, lambda g: g, g),
    ),
}
XS = np.linspace(-1, 1, 12, dtype=np.float32).reshape(6, 2)


EVERY_WAY = (None, jp.shooting(), jp.sequential())


def in_one_program(run, *args):
    """`run(scan)(*args)` for `lax.scan` and for some solvers: what is short compiles at once."""
    ours = [functools.partial(jp.newton_scan, solver=s) for s in EVERY_WAY]
    every = lambda *args: [run(scan)(*args) for scan in (lax.scan, *ours)]  # noqa: E731
    return jax.jit(every, compiler_options=QUICK)(*args)


@pytest.mark.parametrize("name", LINEAR | OTHER)
def test_gradients_are_those_of_lax_scan(name):
    f = rule(*(LINEAR | OTHER)[name])

    def gradients(scan):
        def loss(w, init, xs):
            step = lambda h, x: ((f(w * h + x)),) * 2  # noqa: E731
            return jnp.sum(jnp.square(scan(step, init, xs)[1]))

        return jax.grad(loss, (0, 1, 2))

    wanted, *each = in_one_program(gradients, jnp.float32(1.3), jnp.ones(2), XS)
    for gradient in each:
        for found, right in zip(gradient, wanted, strict=True):
            # Cotangents are summed in float32 in another order.
            np.testing.assert_allclose(found, right, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", LINEAR | OTHER)
def test_what_is_proved_linear_is_solved_in_parallel(name):
    f = rule(*(LINEAR | OTHER)[name])
    step = lambda h, x: ((f(1.3 * h + x)),) * 2  # noqa: E731
    choice = jp.explain_choice(step, jnp.ones(2), XS, solver=jp.shooting())
    assert (choice.solver is not None) == (name in LINEAR)
    assert ("not proved to be linear" in choice.reason) == (name in OTHER)


def pushing(forward, forwards):
    f = jax.custom_jvp(forward)
    f.defjvp(lambda x, t: (forward(*x), forwards(*x, *t)))
    return f


# Rules of a `custom_jvp`: what they do to a tangent.
PUSHES = {
    "slower": (jnp.sin, lambda x, t: 0.5 * t * jnp.cos(x)),
    "straight through": (lambda x: jnp.round(x), lambda x, t: t),
    "borrowed": (jnp.tanh, lambda x, t: jax.jvp(jax.nn.softplus, (x,), (t,))[1]),
    "narrowed, as the tangent of a cast": (
        lambda x: x.astype(jnp.bfloat16).astype(x.dtype),
        lambda x, t: t.astype(jnp.bfloat16).astype(x.dtype),
    ),
    "by a solve": (jnp.tanh, lambda x, t: jnp.linalg.solve(jnp.eye(2) + jnp.outer(x, x), t)),
}
CLIPS = {
    "clipped": (jnp.tanh, lambda x, t: jnp.clip(t, -0.1, 0.1)),
    "its size": (jnp.tanh, lambda x, t: t * jnp.abs(t)),
    "moved": (jnp.tanh, lambda x, t: t + 0.1),
}


@pytest.mark.parametrize("name", PUSHES | CLIPS)
def test_tangents_are_those_of_lax_scan(name):
    f = pushing(*(PUSHES | CLIPS)[name])
    step = lambda h, x: ((f(0.7 * h + x)),) * 2  # noqa: E731

    def slope(scan, h, t):
        return jax.jvp(lambda h: scan(step, h, XS), (h,), (t,))

    at = jnp.ones(2), jnp.array([1.0, -2.0])
    scans = functools.partial(jp.newton_scan, solver=jp.shooting()), lax.scan
    both = jax.jit(lambda *at: [slope(scan, *at) for scan in scans], compiler_options=QUICK)
    rtol = 1e-2 if "cast" in name else 2e-6  # eight bits, which lax.scan rounds elsewhere
    for ours, wanted in zip(*both(*at), strict=True):
        for a, b in zip(ours, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)
    choice = jp.explain_choice(step, at[0], XS, solver=jp.shooting())
    assert (choice.solver is not None) == (name in PUSHES)
    assert ("not proved to be linear" in choice.reason) == (name in CLIPS)


def test_what_a_rule_closes_over_has_no_tangent():
    weights = jnp.array([0.5, 1.5])

    def closing(*others):
        def forward(h):
            return jnp.tanh(h * weights * sum(others, 1))

        f = jax.custom_vjp(forward)
        f.defvjp(lambda h: (forward(h), h), lambda h, g: (0.5 * g * h * weights,))
        return f

    loss = lambda scan, step: jax.value_and_grad(  # noqa: E731
        lambda h: jnp.sum(scan(step, h, XS)[1] ** 2)
    )
    f = closing()
    step = lambda h, x: (f(h) + x,) * 2  # noqa: E731
    wanted, *each = in_one_program(lambda scan: loss(scan, step), jnp.ones(2))
    for found in each:
        for ours, right in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours, right, rtol=1e-6)
    assert jp.explain_choice(step, jnp.ones(2), XS, solver=jp.shooting()).solver is not None
    # By the state itself nobody can differentiate it, and lax.scan only runs it.
    step = lambda h, x: (closing(h)(x) + h,) * 2  # noqa: E731
    found = jp.newton_scan(step, jnp.ones(2), XS, solver=jp.shooting())
    np.testing.assert_allclose(found[1], lax.scan(step, jnp.ones(2), XS)[1], rtol=1e-6)
    reason = jp.explain_choice(step, jnp.ones(2), XS, solver=jp.shooting()).reason
    assert reason.endswith("custom_vjp that closes over the carry: pass it as an argument")


def halved(v):
    """A loop of unknown length, which JAX pulls no cotangent through."""
    return lax.while_loop(lambda v: jnp.max(jnp.abs(v)) > 0.5, lambda v: v / 2, v)


EVERY = [
    *(jp.shooting(), jp.newton(), jp.quasi_newton(), jp.jacobi(), jp.sequential()),
    jp.fused(implementation="xla"),
]


@pytest.mark.parametrize("solver", EVERY, ids=lambda s: s.solve.__name__)
def test_what_cannot_be_pulled_back_is_solved_all_the_same(solver):
    own = rule(jnp.tanh, lambda x, g: g * (1 - jnp.square(jnp.tanh(x))))
    step = lambda h, x: ((own(halved(h) + x)),) * 2  # noqa: E731
    init = jnp.array([0.3, 0.9])
    scans = functools.partial(jp.newton_scan, solver=solver), lax.scan
    both = jax.jit(lambda h: [scan(step, h, XS) for scan in scans], compiler_options=QUICK)
    found, wanted = both(init)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-6)
    choice = jp.explain_choice(step, init, XS, solver=solver)
    assert "loop of unknown length" in choice.reason


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("solver", EVERY, ids=lambda s: s.solve.__name__)
def test_inputs_that_are_not_differentiated_may_pass_through_anything(solver, own):
    f = rule(jnp.tanh, lambda x, g: g * (1 - jnp.square(jnp.tanh(x)))) if own else jnp.tanh

    def gradient(scan, w, init):
        def loss(w, init):
            step = lambda h, x: ((f(w * h + halved(x))),) * 2  # noqa: E731
            return jnp.sum(jnp.square(scan(step, init, XS)[1]))

        return jax.grad(loss, (0, 1))(w, init)

    scans = functools.partial(jp.newton_scan, solver=solver, derivative="reverse"), lax.scan
    both = jax.jit(lambda *args: [gradient(s, *args) for s in scans], compiler_options=QUICK)
    for ours, wanted in zip(*both(jnp.float32(1.3), jnp.ones(2)), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5)
