"""Recurrent scales from mild to chaotic: never a wrong value, never a wrong gradient.

At scale 4 and above float32 `lax.scan` itself leaves the float64 trajectory, so the
oracles are local: every step is `f` of the step before it within a few ulp, and the
gradient is float64 backpropagation linearised at the states that were returned. Rows that
fell back from their first step are `lax.scan`'s bit for bit. `-s` prints the iterations.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from tests.recurrence.kit import QUICK, gru, in_float64, lstm, normal

WIDTH = 3
SCALES = (0.5, 1.0, 2.0, 4.0, 8.0)


def elman(params):
    weights = params["scale"] * params["weights"]

    def f(h, x):
        h = jnp.tanh(weights * h + x)
        return h, h

    return f


CELLS = {"gru": (gru, (3,), (3,)), "lstm": (lstm, (4,), (3,)), "elman": (elman, (), ())}
SOLVERS = {
    "shooting": jp.shooting(),
    "newton": jp.newton(),
    "quasi_newton": jp.quasi_newton(),
    "jacobi": jp.jacobi(max_iters=16),
}


@functools.cache
def draw(cell, time):
    rng = np.random.default_rng(time)
    _, weights, inputs = CELLS[cell]
    # Uniform in +-1, so that `scale` is the largest recurrent weight.
    params = {"weights": rng.uniform(-1, 1, (*weights, WIDTH)).astype(np.float32)}
    init = normal(rng, WIDTH)
    init = {"c": init, "h": np.tanh(init)} if cell == "lstm" else init
    return params, init, normal(rng, time, *inputs, WIDTH), normal(rng, time, WIDTH)


def with_states(cell, params):
    """The step, returning its whole carry as output."""
    f = CELLS[cell][0](params)

    def step(carry, x):
        carry, _ = f(carry, x)
        return carry, carry

    return step


def visible(states):
    return states["h"] if isinstance(states, dict) else states


@functools.cache
def solved(cell, solver):
    """States, diagnostics and gradients; the scale is an argument."""

    def run(params, init, xs, weights):
        def loss(params, init, xs):
            step = with_states(cell, params)
            (_, states), info = jp.solve_scan(step, init, xs, solver=SOLVERS[solver])
            return jnp.sum(weights * visible(states)), (states, info)

        return jax.grad(loss, (0, 1, 2), has_aux=True)(params, init, xs)

    return jax.jit(run, compiler_options=QUICK)


@functools.cache
def sequential(cell):
    run = lambda params, init, xs: lax.scan(with_states(cell, params), init, xs)[1]  # noqa: E731
    return jax.jit(run, compiler_options=QUICK)


@functools.cache
def linearised(cell):
    """One step from each given state (side by side), and float64 BPTT through them."""

    def run(params, init, xs, weights, states):
        before = jax.tree.map(lambda i, s: jnp.concatenate([i[None], s[:-1]]), init, states)

        def steps(params, before, xs):
            return jax.vmap(lambda b, x: with_states(cell, params)(b, x)[0])(before, xs)

        after = steps(params, before, xs)

        def backwards(later, inputs):
            x, b, w = inputs
            seen = {**later, "h": later["h"] + w} if isinstance(later, dict) else later + w
            pull = jax.vjp(lambda p, b, x: with_states(cell, p)(b, x)[0], params, b, x)[1]
            d_params, earlier, d_x = pull(seen)
            return earlier, (d_params, d_x)

        zero = jax.tree.map(jnp.zeros_like, init)
        d_init, (d_params, d_xs) = lax.scan(backwards, zero, (xs, before, weights), reverse=True)
        return after, (jax.tree.map(lambda g: jnp.sum(g, 0), d_params), d_init, d_xs)

    return run


@functools.cache
def in_float32(cell):
    """The same backpropagation in float32: the rounding that no solver can avoid."""
    return jax.jit(linearised(cell), compiler_options=QUICK)


def near(found, wanted, relative, what, plain=None):
    """Within `relative` of the size, or of four times the error that `plain` has."""
    leaves = [jax.tree.leaves(t) for t in (found, wanted, wanted if plain is None else plain)]
    for f, w, p in zip(*leaves, strict=True):
        f, w, p = (np.asarray(v, np.float64) for v in (f, w, p))
        assert np.all(np.isfinite(f)), what
        worst, size = np.max(np.abs(f - w)), max(np.max(np.abs(w)), 1e-30)
        allowed = max(relative * size, 4 * np.max(np.abs(p - w)))
        assert worst <= allowed, f"{what}: {worst:.3g} off, allowed {allowed:.3g}"


def assert_is_lax_scan(cell, solver, time):
    weights_of, init, xs, weights = draw(cell, time)
    line = []
    for scale in SCALES:
        params = {**weights_of, "scale": np.float32(scale)}
        grads, (states, info) = solved(cell, solver)(params, init, xs, weights)
        after, wanted = in_float64(linearised(cell), params, init, xs, weights, states)
        what = f"{cell} {solver} T={time} scale={scale}"
        # 2e-6: the accepted residual of 8 ulp and the rounding of one step.
        near(states, after, 2e-6, f"{what}: residual of a step")
        # Where tanh saturates, 1 - tanh^2 cancels in float32, for lax.scan as for us.
        plain = in_float32(cell)(params, init, xs, weights, states)[1]
        near(grads, wanted, 2e-5, f"{what}: gradient", plain)
        if not info.converged and int(info.fallback_steps) == time:
            plain = sequential(cell)(params, init, xs)
            for a, b in zip(jax.tree.leaves(states), jax.tree.leaves(plain), strict=True):
                np.testing.assert_array_equal(a, b)
        line.append((int(info.iterations), int(info.fallback_steps)))
    print(f"{cell:6} {solver:13} T={time:<5} iterations/fallback by scale:", *line)
    return line


# Time 4097 costs seconds a row: two of them stand for the rest in the quick set.
QUICK_LONG = {("gru", "shooting"), ("elman", "newton")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "solver", "time"),
    [
        pytest.param(
            cell,
            solver,
            time,
            marks=[pytest.mark.slow] if time > 512 and (cell, solver) not in QUICK_LONG else [],
        )
        for cell in CELLS
        for solver in SOLVERS
        for time in (1, 7, 512, 4097)
    ],
)
def test_no_wrong_value_and_no_wrong_gradient(cell, solver, time):
    line = assert_is_lax_scan(cell, solver, time)
    if solver in ("shooting", "newton"):
        assert line[0][1] == 0, "scale 0.5 is mild"


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_shooting_needs_far_fewer_iterations_than_newton_on_hard_cells(cell):
    weights_of, init, xs, _ = draw(cell, 512)
    params = {**weights_of, "scale": np.float32(4.0)}

    def info(solver):
        run = jax.jit(
            lambda p, i, x: jp.solve_scan(with_states(cell, p), i, x, solver=solver)[1],
            compiler_options=QUICK,
        )
        return run(params, init, xs)

    few, many = info(jp.shooting(max_iters=60)), info(jp.newton(max_iters=60))
    print(cell, "shooting", int(few.iterations), "newton", int(many.iterations))
    assert few.converged and few.fallback_steps == 0
    assert 2 * few.iterations <= many.iterations


def logistic(h, _):
    h = 3.9 * h * (1 - h)
    return h, h


def sine(h, _):
    h = jnp.sin(4.0 * h)
    return h, h


@pytest.mark.parametrize("f", [logistic, sine])
def test_chaotic_maps(f):
    init = np.float32([0.3, 0.31])
    for solver in SOLVERS.values():
        run = lambda h, s=solver: jp.solve_scan(f, h, None, 300, solver=s)  # noqa: E731
        (_, ys), info = jax.jit(run, compiler_options=QUICK)(init)
        assert not info.converged and info.fallback_steps > 0
        before = np.concatenate([init[None], ys[:-1]])
        after = in_float64(lambda h: f(h, None)[0], before)
        np.testing.assert_allclose(ys, after, rtol=0, atol=2e-6)
        assert np.std(ys) > 0.1
