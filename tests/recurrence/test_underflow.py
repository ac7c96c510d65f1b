"""States and products that come near the least normal number and grow again.

Processors flush what is smaller to 0. A gap or a product that was flushed would count as none, and
what it grows to would be certified.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from tests.recurrence.kit import QUICK, faded, sharp

SOLVERS = {
    "shooting": jp.shooting(),
    "short chunks": jp.shooting(chunks=16),
    "newton": jp.newton(linear="sequential"),
    "chunked": jp.newton(linear="chunked"),
}


def states_of(step):
    return lambda h, x: (step(h, x),) * 2


@functools.cache
def sharp_by_both(name):
    """One program for every draw."""

    def both(init, a, w):  # a solve for each lane: none waits for another
        run = lambda scan: scan(states_of(sharp), init, [a, w])  # noqa: E731
        solve = lambda *args: jp.solve_scan(*args, solver=SOLVERS[name])  # noqa: E731
        return run(solve), run(lax.scan)[1]

    return jax.jit(jax.vmap(both), compiler_options=QUICK)


@pytest.mark.parametrize("hold", [1, 2])
@pytest.mark.parametrize("name", ["short chunks", "newton", "chunked"])
def test_a_gap_that_would_be_flushed_counts_when_it_grows(name, hold):
    init, a, w, last = faded(256, seed=hold, hold=hold)
    ((_, ys), info), wanted = sharp_by_both(name)(init, a.T, w.T)
    found, lost = (np.abs(np.float64(v[:, -1]) / last - 1) for v in (ys, wanted))
    assert np.all(found <= 2e-4 + 4 * lost)  # the sharp step amplifies each rounding
    assert np.mean(info.converged) > 0.5


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("chunks", [None, 64])
def test_drift_shows_through_a_product_that_would_vanish(chunks, affine):
    # 13 steps that shrink by 1024 and 13 that grow by as much: every state is a normal number.
    period, count, drift = 26, 64, 9e-6
    factors = np.tile(np.float32([2.0**-10] * 13 + [2.0**10] * 13), count)
    shift = np.zeros(period * count, np.float32)
    shift[::period] = 1000 * drift

    def step(h, x):
        return x[0] * (h + x[1] * (1.0 if affine else jnp.tanh(h)))

    init, xs = jnp.float32(1000), (jnp.asarray(factors), jnp.asarray(shift))
    solve = functools.partial(jp.solve_scan, states_of(step), solver=jp.shooting(chunks=chunks))
    (last, _), info = jax.jit(solve, compiler_options=QUICK)(init, xs)
    np.testing.assert_allclose(last, 1000 * (1 + count * drift), rtol=2e-5)
    assert info.fallback_steps > 0  # nothing that vanishes proves


@pytest.mark.parametrize("linear", ["sequential", "chunked", "associative"])
def test_a_guess_near_another_solution_is_left(linear):
    factors = jnp.tile(jnp.asarray([2.0**-66, 2.0**-64, 2.0**66, 2.0**64]), 64)
    shift = jnp.tile(jnp.asarray([4e-4, 0, 0, 0]), 64)

    def step(h, x):
        h = x[0] * (h + x[1] * jnp.tanh(h))
        return h, h

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(init, factors, shift):
        without = lax.scan(step, init, (factors, 0 * shift))[1]
        guess = jnp.concatenate([init[None], without[:-1]])
        solve = functools.partial(jp.solve_scan, solver=jp.newton(linear=linear), guess=guess)
        return [scan(step, init, (factors, shift)) for scan in (solve, lax.scan)]

    (found, info), wanted = both(jnp.float32(1000), factors, shift)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-6)
    assert info.converged


@functools.cache
def fading(name):
    def both(rate, xs):
        step = states_of(lambda h, x: jnp.tanh(rate * h + x))
        solve = functools.partial(jp.solve_scan, solver=SOLVERS[name])
        return [scan(step, jnp.float32(1), xs) for scan in (solve, lax.scan)]

    return jax.jit(both, compiler_options=QUICK)


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", ["shooting", "newton"])
def test_a_state_that_fades_is_not_walked(name, rate):
    xs = jnp.where(jnp.arange(6000) < 50, jnp.sin(jnp.arange(6000.0)), 0)
    ((_, ys), info), (_, wanted) = fading(name)(rate, xs)
    assert info.fallback_steps == 0 and np.any((np.abs(ys) < 1e-20) & (ys != 0))
    # Down to the least normal number; the rest is rounding of the fading itself.
    np.testing.assert_allclose(ys, wanted, rtol=1e-4, atol=5e-38)
