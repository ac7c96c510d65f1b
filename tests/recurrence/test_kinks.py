"""States that rest on a kink: the derivative there is that of one side, and they go to the other.

A small kick grows where the derivative at rest says that it dies out. No value may pass as solved
that is not, and a step whose kinks are only crossed must not be walked for them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from tests.recurrence.kit import QUICK, in_float64, normal

STEPS, AT = 1024, 30
SOLVERS = {
    "newton": jp.newton(),
    "quasi_newton": jp.quasi_newton(),
    "jacobi": jp.jacobi(),
    "shooting": jp.shooting(),
    "short_chunks": jp.shooting(chunks=64),
    "long_chunks": jp.shooting(chunks=8),
}
SLOPES = np.array([1.02, 1.05, 1.3, 2.0, 0.9], np.float32)

# What exceeds 1, upwards: with the derivative 0, 1/2, 1/2 and 1/2 at 1 itself.
EXCESS = {
    "relu": lambda h: jax.nn.relu(h - 1),
    "maximum": lambda h: jnp.maximum(h, 1) - 1,
    "clip": lambda h: jnp.clip(h, 1, 1000) - 1,
    "abs": lambda h: (jnp.abs(h - 1) + h - 1) / 2,
}


def at_rest(excess, slope, xs):
    """The step, and its states from 1 by `lax.scan` in the dtype of the inputs."""

    def step(h, x):
        h = jnp.minimum(1 + slope * EXCESS[excess](h) + x, 100)
        return h, h

    return step, lax.scan(step, jnp.ones((), xs.dtype), xs)[1]


@functools.cache
def from_rest(excess):
    """States of every slope by `lax.scan`. Cached: what is one function is compiled once."""
    return jax.vmap(lambda slope, xs: at_rest(excess, slope, xs)[1], (0, None))


@functools.cache
def solved(excess, solver):
    """For each slope a lane of its own, which is judged by itself."""

    def run(slope, xs):
        step, scanned = at_rest(excess, slope, xs)
        (_, ys), _ = jp.solve_scan(step, jnp.float32(1), xs, solver=SOLVERS[solver])
        return ys, scanned

    return jax.jit(jax.vmap(run, (0, None)), compiler_options=QUICK)


# Every kink with half of the solvers, and every solver with half of the kinks; the rest are slow.
PAIRED = [
    pytest.param(excess, solver, marks=pytest.mark.slow if (i + j) % 2 else ())
    for i, excess in enumerate(EXCESS)
    for j, solver in enumerate(SOLVERS)
]


@pytest.mark.parametrize("kick", [5e-6, 2.4e-7, -5e-6])
@pytest.mark.parametrize(("excess", "solver"), PAIRED)
def test_a_kick_from_rest_is_not_lost(excess, solver, kick):
    xs = np.zeros(STEPS, np.float32)
    xs[AT] = kick
    ys, scanned = solved(excess, solver)(SLOPES, xs)
    exact = in_float64(from_rest(excess), SLOPES, xs)
    lost = np.maximum.accumulate(np.abs(scanned - exact), axis=1)
    assert np.all(np.abs(ys - exact) <= 1e-5 * exact + 2 * lost)
    # What this would notice: a state that stays what it was.
    grown = np.max(np.abs(exact - 1) - 2 * lost, axis=1)
    assert kick < 0 or grown[3] > 10


def meeting(excess, h, x):
    """Two elements that are equal, of which one grows once it exceeds the other."""
    grown = jnp.minimum(1 + 1.05 * excess(h) + x, 100)
    h = jnp.stack([grown, h[1]])
    return h, h


def opposite(lasting, h, x):
    """The second element falls below its kink, which lifts the first above its own."""
    low = jax.nn.relu(1 - h[1])
    first = jnp.minimum(1 + 1.05 * jax.nn.relu(h[0] - 1) + 0.3 * low, 100)
    h = jnp.stack([first, jnp.maximum(1 - lasting * low + x, 0.5)])
    return h, h


PAIRS = {
    "difference": functools.partial(meeting, lambda h: jax.nn.relu(h[0] - h[1])),
    "largest": functools.partial(meeting, lambda h: jnp.max(h) - h[1]),
    "largest so far": functools.partial(meeting, lambda h: lax.cummax(h)[1] - h[1]),
    "opposite kinks": functools.partial(opposite, 1.0),
    "opposite kinks, one kick": functools.partial(opposite, 0.0),
}


@functools.cache
def scanned_pair(pair):
    return jax.jit(lambda h, xs: lax.scan(PAIRS[pair], h, xs)[1], compiler_options=QUICK)


@pytest.mark.parametrize("solver", ["newton", "short_chunks"])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_kick_from_where_two_elements_rest_is_not_lost(pair, solver):
    step, init = PAIRS[pair], jnp.ones(2)
    run = jax.jit(
        lambda xs: jp.solve_scan(step, init, xs, solver=SOLVERS[solver]), compiler_options=QUICK
    )
    scan = scanned_pair(pair)
    # 31: the last step of a chunk, so that what it does is first a gap between two of them.
    for kick, at in ((5e-6, 30), (-5e-6, 31), (-2.4e-7, 31)):
        xs = np.zeros(STEPS, np.float32)
        xs[at] = kick
        (_, states), _ = run(xs)
        scanned = scan(init, xs)
        with jax.enable_x64(True):
            exact = np.asarray(scan(np.ones(2), xs.astype(np.float64)))
        lost = np.maximum.accumulate(np.abs(scanned - exact), axis=0)
        assert np.all(np.abs(states - exact) <= 1e-5 * exact + 2 * lost), (kick, at)


@functools.cache
def three_at_rest(solver):
    """Which of the elements grows is an argument."""

    def run(grows, xs):
        def step(h, x):
            grown = jnp.minimum(1 + 1.05 * (jnp.max(h) - 1) + x, 100)
            h = jnp.where(jnp.arange(3) == grows, grown, jnp.ones(3))
            return h, h

        found = jp.newton_scan(step, jnp.ones(3), xs, solver=SOLVERS[solver])[1]
        return found, lax.scan(step, jnp.ones(3), xs)[1]

    return jax.jit(run, compiler_options=QUICK)


@pytest.mark.parametrize("solver", ["newton", "short_chunks"])
@pytest.mark.parametrize("grows", range(3))
def test_a_kick_from_where_three_elements_rest_is_not_lost(grows, solver):
    xs = np.zeros(STEPS, np.float32)
    xs[AT] = 5e-6
    found, scanned = three_at_rest(solver)(grows, xs)
    assert scanned[-1, grows] == 100
    np.testing.assert_array_equal(found, scanned)


def crossing(weights, steps=512):
    """A ReLU network: kinks everywhere, crossed and not rested on."""

    def step(h, x):
        h = jax.nn.relu(h @ weights + x)
        return h, h

    return step, np.zeros(8, np.float32), normal(np.random.default_rng(1), steps, 8)


@pytest.mark.parametrize("solver", ["newton", "quasi_newton", "shooting"])
def test_a_network_of_relus_is_not_walked(solver):
    weights = 0.3 * normal(np.random.default_rng(0), 8, 8)
    step, init, xs = crossing(weights)
    both = lambda h, x: (  # noqa: E731
        jp.solve_scan(step, h, x, solver=SOLVERS[solver]),
        lax.scan(step, h, x)[1],
    )
    ((_, ys), info), scanned = jax.jit(both, compiler_options=QUICK)(init, xs)
    # 2e-6: sixteen units of the largest state, for products of eight terms in another order.
    np.testing.assert_allclose(ys, scanned, atol=2e-6 * np.max(scanned))
    assert info.converged and info.fallback_steps == 0
