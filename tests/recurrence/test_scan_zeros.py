"""Zero tangents and cotangents meet no infinite derivative that `lax.scan` would not meet.

The oracle is `lax.scan` itself, NaNs included: what is infinite there is infinite here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from jaxpara.recurrence.structure.tangent_flow import flow
from tests.recurrence import kit

SOLVERS = {
    "shooting": jp.shooting(),
    "newton": jp.newton(),
    "associative": jp.newton(linear="associative"),
    "jacobi": jp.jacobi(),
    "sequential": jp.sequential(),
    "fused": jp.fused(implementation="xla"),
}
WAYS = [(name, mode) for name in SOLVERS for mode in (None, "reverse")]
QUICK = [("shooting", None), ("shooting", "reverse"), ("sequential", None)]
SLOW = [pytest.param(*way, marks=pytest.mark.slow) for way in WAYS if way not in QUICK]


def root(v):
    """Zero, with an infinite derivative."""
    return jnp.sqrt(v * 0.0)


def unread(c, x):
    return [0.9 * c[0] + x, root(c[0])], None


def unread_by_itself(c, x):
    return [0.9 * c[0] + x, root(c[1])], None


def unread_chain(c, x):
    return [0.9 * c[0] + x, root(c[0]) + c[1], c[1] + c[2]], None


def unread_output(c, x):
    return [jnp.sin(c[0]) + x, 0.5 * c[1]], root(c[0] + c[1])


def upstream(c, x):
    return [0.9 * c[0] + c[1] + x, root(c[1])], None


def not_taken(c, x):
    safe = lax.cond(c[0] < 9, lambda v: 0.9 * v, root, c[0])
    return [safe + x, lax.switch(1, [root, jnp.sin], c[1] * x)], None


STEPS = [unread, unread_by_itself, unread_chain, unread_output, upstream, not_taken]
# Shooting meets every step by both rules, every other solver by one or the other in turn.
IN_TURN = [
    (f, name, mode)
    for k, f in enumerate(STEPS)
    for s, name in enumerate(SOLVERS)
    for m, mode in enumerate((None, "reverse"))
    if name == "shooting" or (k + s) % 2 == m
]


def with_scan(f, scan, used):
    """First results only, of inputs that enter each leaf and every step."""

    def run(a, b, x):
        init = [a, b, b][: 3 if f is unread_chain else 2]
        carry, _ = scan(f, init, x * jnp.linspace(0.5, 1.0, 5))
        return sum(carry[i] ** 2 for i in used)

    return run


def quick(function):
    return jax.jit(function, compiler_options=kit.QUICK)


def assert_near(found, wanted):
    """Finite where the others are, and equal: 2e-6 is sixteen units, for sums in another order."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "mode"), QUICK + SLOW)
def test_the_gradient_of_an_unread_root_is_that_of_the_leaf_beside_it(name, mode):
    scan = functools.partial(jp.newton_scan, solver=SOLVERS[name], derivative=mode)

    def loss(x):
        step = lambda c, _: ([c[0] * 0.9, jnp.sqrt(c[0] * 0.0)], None)  # noqa: E731
        return scan(step, [x, x], None, 5)[0][0]

    np.testing.assert_allclose(quick(jax.grad(loss))(1.0), 0.9**5, rtol=1e-6)


def gradients(f, scan):
    """Of the first leaf alone, and of the first two."""
    every = [jax.grad(with_scan(f, scan, used), (0, 1, 2)) for used in ((0,), (0, 1))]
    return quick(lambda *args: [gradient(*args) for gradient in every])(0.7, 0.3, 1.0)


@functools.cache
def gradients_of_lax_scan(f):
    return gradients(f, lax.scan)


@pytest.mark.slow
@pytest.mark.parametrize(("f", "name", "mode"), IN_TURN)
def test_gradients_are_finite_where_those_of_lax_scan_are(f, name, mode):
    wanted = gradients_of_lax_scan(f)
    scan = functools.partial(jp.newton_scan, solver=SOLVERS[name], derivative=mode)
    assert_near(gradients(f, scan), wanted)
    assert np.isfinite(wanted[0][0])


def tangents(f, scan):
    xs, n = jnp.linspace(0.5, 1.0, 5), 3 if f is unread_chain else 2

    def run(at):
        every = jax.jvp(lambda *a: scan(f, [a[0], a[1], 0.2][:n], xs * a[2]), at, (1.0,) * 3)[1]
        # A symbolic zero: the second leaf has no tangent of its own.
        one = jax.jvp(lambda a: scan(f, [a, 0.3, 0.2][:n], xs), at[:1], (1.0,))[1]
        return every, one

    return quick(run)((0.7, 0.3, 1.0))


@functools.cache
def tangents_of_lax_scan(f):
    return tangents(f, lax.scan)


@pytest.mark.slow
@pytest.mark.parametrize("f", STEPS)
@pytest.mark.parametrize("name", ["shooting", "associative", "sequential"])
def test_tangents_are_finite_where_those_of_lax_scan_are(f, name):
    scan = functools.partial(jp.newton_scan, solver=SOLVERS[name])

    assert_near(tangents(f, scan), tangents_of_lax_scan(f))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("shooting", STEPS[1::2]), ("sequential", STEPS[::2])])
def test_hessians_are_finite_where_those_of_lax_scan_are(name, steps):
    scan = functools.partial(jp.newton_scan, solver=SOLVERS[name])
    for f in steps:
        second = lambda s, f=f: quick(jax.hessian(with_scan(f, s, (0,)), (0, 2)))  # noqa: E731
        assert_near(second(scan)(0.7, 0.3, 1.0), second(lax.scan)(0.7, 0.3, 1.0))


def test_parts_come_in_the_order_in_which_they_feed_one_another():
    def step(w, a, b, c, d, x):
        return b + d, jnp.sin(c), b * w + x, lax.stop_gradient(a) + d, a * x

    closed = jax.make_jaxpr(step)(*[1.0] * 6)
    found = flow(closed, 1, [1, 2, 3, 4], [0, 1, 2, 3], [4])
    assert found.parts == ((3,), (1, 2), (0,))
    assert [found.loops(part) for part in found.parts] == [True, True, False]
    assert found.leaves[2].consts == {0} and found.leaves[2].xs == {0}
    assert found.moving((), {3}, ()) == {0, 3} and found.moving({0}, (), ()) == {0, 1, 2}
    assert found.live({1}, ()) == {1, 2} and found.live((), {0}) == {0, 1, 2, 3}


def in_turn(scan):
    """Gradients of one jitted program by one argument, by the other, by the first once more."""

    @jax.jit
    def solve(w, xs):
        def step(h, x):
            h = jnp.tanh(w * h + x)
            return h, 2 * h

        return scan(step, jnp.zeros(4), xs)

    def of_weights(w, read):
        return jnp.sum(solve(w, xs)[read])

    def repeated(w):
        return jnp.sum(lax.scan(lambda w, _: (w, of_weights(w, 0)), w, length=3)[1])

    w, xs = jnp.full(4, 0.5), jnp.sin(jnp.arange(64.0)).reshape(16, 4)
    first = jax.grad(of_weights)(w, 1)
    other = jax.grad(lambda xs: jnp.sum(solve(w, xs)[1]))(xs)
    # These see the same program in another trim, and what JAX keeps of it from before.
    trimmed = jax.jit(jax.grad(jax.checkpoint(of_weights, static_argnums=1)), static_argnums=1)
    again = [trimmed(w, 0), trimmed(w, 1), jax.grad(repeated)(w)]
    return first, other, again


@functools.cache
def in_turn_by_lax_scan():
    return in_turn(lax.scan)


@pytest.mark.parametrize(
    "derivative, name",
    [
        pytest.param(derivative, name, marks=pytest.mark.slow if name == "shooting" else ())
        for derivative in (None, "reverse")
        for name in ("shooting", "newton", "fused")
    ],
)
def test_one_program_is_differentiated_by_its_arguments_in_turn(name, derivative):
    scan = functools.partial(jp.newton_scan, solver=SOLVERS[name], derivative=derivative)
    for a, b in zip(*map(jax.tree.leaves, (in_turn(scan), in_turn_by_lax_scan())), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


# Both solvers have every shape and both rules, and every shape both rules.
EMPTY = [
    (solver, shape, (None, "reverse")[(s + k) % 2])
    for s, solver in enumerate([jp.fused(implementation="xla"), jp.newton(linear="kernel")])
    for k, shape in enumerate([(0,), (0, 3), (3, 0)])
]


@pytest.mark.parametrize(("solver", "shape", "derivative"), EMPTY)
def test_leaves_without_elements_have_gradients(shape, solver, derivative):
    step = lambda c, x: ((jnp.tanh(c[0] * 0.5 + x), c[1] * 2.0), c[0])  # noqa: E731
    init, xs = (jnp.ones(3), jnp.zeros(shape)), jnp.ones((7, 3))

    def loss(scan, c):
        (_, empty), ys = scan(step, c, xs)
        return jnp.sum(ys) + jnp.sum(empty)

    scan = functools.partial(jp.newton_scan, solver=solver, derivative=derivative)
    gradient = lambda scan: jax.grad(functools.partial(loss, scan))(init)  # noqa: E731
    found, exact = quick(lambda: (gradient(scan), gradient(lax.scan)))()
    np.testing.assert_allclose(found[0], exact[0], rtol=1e-6)
    assert found[1].shape == shape
