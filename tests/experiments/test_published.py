"""DEER, quasi-DEER and ELK as written for the benchmark: right values, right gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments.contest import published
from experiments.contest.recurrence_problem import make_problem
from experiments.contest.rivals import RIVALS, CannotRun
from tests.recurrence.kit import QUICK

TIME, WIDTH = 16, 3


def steps(cell):
    """`(params, init, xs, step, diagonal)` of one sequence in float64."""
    problem = make_problem(cell, TIME, 1, WIDTH)
    wide = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(leaf, jnp.float64))
    params, gates = wide(problem.params), wide(tuple(g[:, 0] for g in problem.gates))
    init = 0.3 * jnp.ones(WIDTH, jnp.float64)
    return params, init, gates, lambda p, h, x: problem.step(p, h, x)[0], cell != "dense"


def by_scan(step, params, init, xs):
    def body(h, x):
        h = step(params, h, x)
        return h, h

    return lax.scan(body, init, xs)[1]


def relative(found, wanted):
    return max(
        float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    )


@pytest.mark.parametrize("cell", ["para_gru", "dense"])
@pytest.mark.parametrize("method", published.METHODS)
def test_a_published_method_has_the_values_and_gradients_of_lax_scan(cell, method):
    with jax.enable_x64(True):
        params, init, xs, step, diagonal = steps(cell)
        weights = jnp.asarray(np.random.default_rng(0).standard_normal((TIME, WIDTH)))

        def both(solve):
            def loss(params, init, xs):
                states = solve(params, init, xs)
                return jnp.sum(weights * states), states

            run = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
            return jax.jit(run, compiler_options=QUICK)(params, init, xs)

        def solved(max_iters):
            options = (method, diagonal, 1e-12, 1e-8, max_iters)
            return lambda *operands: published.solve(step, options, *operands)

        (_, wanted), exact = both(lambda *operands: by_scan(step, *operands))
        (_, states), grads = both(solved(200))
        assert relative(states, wanted) < 1e-10
        assert relative(grads, exact) < 1e-8
        # The negative control: stopped before it has converged.
        early = jax.jit(solved(2), compiler_options=QUICK)(params, init, xs)
        assert relative(early, wanted) > 1e-6


def test_damping_slows_elk_and_without_it_elk_is_quasi_deer():
    with jax.enable_x64(True):
        params, init, xs, step, diagonal = steps("para_gru")

        def after(method, damping, iterations=2):
            options = (method, diagonal, 0.0, damping, iterations)
            run = jax.jit(published.solve, static_argnums=(0, 1), compiler_options=QUICK)
            return run(step, options, params, init, xs)

        wanted = by_scan(step, params, init, xs)
        np.testing.assert_allclose(after("elk", 0.0), after("quasi_deer", 0.0), atol=1e-12)
        slow, fast = (relative(after("elk", d), wanted) for d in (0.5, 1e-8))
        assert slow > 3 * fast


def test_the_filter_is_the_kalman_filter():
    """Against the recursion of one chain, step by step in NumPy."""
    rng = np.random.default_rng(1)
    slopes, offsets, seen = (rng.standard_normal(9) for _ in range(3))
    slopes[0], damping = 0.0, 0.7
    mean, variance, expected = 0.0, 0.0, []
    for a, b, y in zip(slopes, offsets, seen, strict=True):
        mean, variance = a * mean + b, a * a * variance + 1.0
        gain = variance / (variance + 1 / damping)
        mean, variance = mean + gain * (y - mean), (1 - gain) * variance
        expected.append(mean)
    with jax.enable_x64(True):
        found = published._filtered(
            *(jnp.asarray(v[:, None]) for v in (slopes, offsets, seen)), 0.7
        )
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-12)


def test_the_published_methods_are_rivals_that_refuse_a_carry_of_two_leaves():
    lstm = make_problem("para_lstm", 8, 2, 4)
    for name in ("deer's method", "quasi-deer's method", "elk's method"):
        with pytest.raises(CannotRun, match="this cell's carry is a tuple"):
            RIVALS[name](lstm, "forward")
