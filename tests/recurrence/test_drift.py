"""Slow drifts, rare events and rounding steps: what a small residual does not show.

A state that moves less a step than a tolerance passes a test of residuals at the guess. Each row
is solved by every solver and compared with float64, with room for what `lax.scan` itself loses.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxpara as jp
from tests.recurrence.kit import QUICK, falling_sign, in_float64

F32 = jnp.float32


def rarely(time, every, size):
    xs = np.zeros(time, np.float32)
    xs[every - 1 :: every] = size
    return xs


def still(time):
    return np.zeros(time, np.float32)


# name: step, initial state, inputs
PROVED = {
    "clock": (lambda h, x: h + F32(2e-3), 1e4, still(16_384)),
    "moving average": (lambda h, x: h + F32(1e-6) * (2 - h), 1.0, still(16_384)),
    "floor never reached": (lambda h, x: jnp.maximum(h + F32(2e-3), -1e9), 1e4, still(4096)),
    "ceiling never reached": (lambda h, x: jnp.minimum(h + x, 2e9), 1e7, rarely(2048, 64, 1.0)),
    "nearly closed gate": (
        lambda h, x: (1 - jax.nn.sigmoid(x)) * h + jax.nn.sigmoid(x) * jnp.tanh(h + 3),
        0.3,
        still(4096) - 16,
    ),
    "slow contraction": (lambda h, x: F32(0.99) * h + x, 0.0, still(4096) + 1),
    "slow rotation": (
        lambda h, x: jnp.stack([h[0] - F32(1e-4) * h[1], h[1] + F32(1e-4) * h[0]]),
        (1.0, 0.0),
        still(8192),
    ),
}
UNPROVED = {
    "stopped": (lambda h, x: lax.stop_gradient(h) + x, 1.0, rarely(8192, 4, 1.2e-7)),
    "switched": (
        lambda h, x: jnp.where(h > 1.001, h + F32(1e-4), h + F32(2e-7)),
        1.0,
        still(8192),
    ),
    "rounded": (lambda h, x: lax.reduce_precision(h + F32(1e-3), 8, 10), 1.0, still(2048)),
}
ROWS = PROVED | UNPROVED
EVERYDAY = {"shooting": jp.shooting(), "newton": jp.newton()}
SOLVERS = EVERYDAY | {
    "shooting, many chunks": jp.shooting(chunks=1024),
    "quasi_newton": jp.quasi_newton(),
    "jacobi": jp.jacobi(),
    "jacobi, many iterations": jp.jacobi(max_iters=5000),
    "fused": jp.fused(implementation="xla"),
}


def states_of(step):
    return lambda h, x: (step(h, x),) * 2


@functools.cache
def solves(step, solver):
    """One program for all that solve this step so."""
    f = states_of(step)
    return jax.jit(lambda h, x: jp.solve_scan(f, h, x, solver=solver), compiler_options=QUICK)


@functools.cache
def wanted(row):
    """States of `lax.scan`, and in float64 with the same float32 constants."""
    step, init, xs = ROWS[row]
    f = states_of(step)
    plain = jax.jit(lambda h, x: lax.scan(f, h, x)[1])(jnp.asarray(init, F32), xs)
    with jax.enable_x64(True):
        begin = np.asarray(init, np.float32).astype(np.float64)
        exact = jax.jit(lambda h, x: lax.scan(f, h, x)[1])(begin, xs.astype(np.float64))
    return np.asarray(plain), np.asarray(exact)


def assert_arrives(row, states):
    """Within 1e-5 and twice what `lax.scan` itself loses to rounding."""
    plain, exact = wanted(row)
    error, lost = np.abs(states - exact).max(), np.abs(plain - exact).max()
    allowed = 1e-5 * np.abs(exact).max() + 2 * lost
    assert error <= allowed, f"{row}: {error:.3g} off, {allowed:.3g} allowed"


CASES = [
    pytest.param(row, solver, marks=() if solver in EVERYDAY else pytest.mark.slow)
    for row in ROWS
    for solver in SOLVERS
]


@pytest.mark.parametrize(("row", "solver"), CASES)
def test_slow_states_arrive_where_lax_scan_does(row, solver):
    step, init, xs = ROWS[row]
    (_, states), info = solves(step, SOLVERS[solver])(jnp.asarray(init, F32), xs)
    assert_arrives(row, np.asarray(states))
    assert info.converged == (info.fallback_steps == 0)


@pytest.mark.parametrize("row", ["clock", "moving average", "nearly closed gate", "stopped"])
def test_a_residual_of_eight_ulp_would_take_the_guess(row):
    """What these rows are for: the rule that they refute calls the constant guess solved."""
    step, init, xs = ROWS[row]
    guess = np.full(len(xs), init, np.float32)
    residual = np.abs(jax.vmap(step)(guess, xs) - guess).max()
    assert residual <= 8 * np.finfo(np.float32).eps * init
    with pytest.raises(AssertionError, match="off"):
        assert_arrives(row, guess)


def test_shooting_confirms_what_it_can_prove_and_walks_what_it_cannot():
    def info(row):
        step, init, xs = ROWS[row]
        return solves(step, EVERYDAY["shooting"])(jnp.asarray(init, F32), xs)[1]

    for row in ("moving average", "slow contraction", "slow rotation"):
        found = info(row)
        assert found.converged and found.iterations <= 4, row
    found = info("stopped")
    assert not found.converged and found.fallback_steps > 4096


# Below float32 a step rounds by as much as it moves: only lax.scan's own rounding is right.
NARROW = {
    "moving average": lambda h, x: h + jnp.asarray(0.01, h.dtype) * (2 - h),
    "counter": lambda h, x: h + jnp.asarray(1, h.dtype),
    "slow contraction": lambda h, x: jnp.asarray(0.98, h.dtype) * h + jnp.asarray(1, h.dtype),
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("row", NARROW)
def test_narrow_states_round_as_in_lax_scan(row, dtype):
    f, init = states_of(NARROW[row]), jnp.ones((), dtype)
    solvers = [functools.partial(jp.newton_scan, solver=solver) for solver in EVERYDAY.values()]
    every = lambda h: [scan(f, h, None, 512)[1] for scan in (lax.scan, *solvers)]  # noqa: E731
    plain, *each = jax.jit(every, compiler_options=QUICK)(init)
    for found in each:
        # One unit: another program may keep a product in float32 before it rounds.
        np.testing.assert_allclose(
            found.astype(F32), plain.astype(F32), rtol=float(jnp.finfo(dtype).eps)
        )


@functools.cache
def gradient_of_slow_states(scan):
    def loss(rate, init, xs):
        f = lambda h, x: ((h + rate * (x - h)),) * 2  # noqa: E731
        return jnp.sum(jnp.square(scan(f, init, xs)[1])) / len(xs)

    return jax.grad(loss, (0, 1, 2))


@pytest.mark.parametrize("derivative", [None, "reverse"])
@pytest.mark.parametrize("solver", EVERYDAY)
def test_gradients_of_slow_states(solver, derivative):
    xs = np.linspace(-1, 1, 4096, dtype=np.float32)
    args = (F32(1e-6), F32(1.0), xs)
    scan = functools.partial(jp.newton_scan, solver=EVERYDAY[solver], derivative=derivative)
    found = jax.jit(gradient_of_slow_states(scan), compiler_options=QUICK)(*args)
    exact = in_float64(gradient_of_slow_states(lax.scan), *args)
    # The Jacobian 1 - rate is a float32 number: half a unit off, the same way at every step.
    allowed = 1e-5 + len(xs) * np.finfo(np.float32).eps / 2
    for f, w in zip(found, exact, strict=True):
        assert np.abs(f - w).max() <= allowed * np.abs(w).max()


@pytest.mark.parametrize("row", ["clock", "moving average", "nearly closed gate"])
def test_slow_states_over_sharded_time(row):
    step, init, xs = ROWS[row]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("time",))

    def local(xs):
        solver = jp.shooting(axis="time")
        return jp.newton_scan(states_of(step), jnp.asarray(init, F32), xs, solver=solver)[1]

    run = jax.shard_map(local, mesh=mesh, in_specs=P("time"), out_specs=P("time"))
    assert_arrives(row, np.asarray(jax.jit(run, compiler_options=QUICK)(xs)))


def test_growth_inside_a_chunk_is_no_growth_of_its_error():
    """Deviations from a path grow 2^20-fold and shrink again within every chunk."""
    time, period = 2048, 64
    phase = np.arange(time) % period
    gain = np.where(phase < period // 2, 1.5, 1 / 1.5).astype(np.float32)
    path = np.sin(np.arange(time + 1) / 7).astype(np.float32) + 2

    def step(h, inputs):
        g, before, after = inputs
        return (after + g * jnp.tanh(h - before),) * 2

    xs = (gain, path[:-1], path[1:])
    init = F32(path[0] + 1e-3)
    scan = lambda h, x: lax.scan(step, h, x)[1]  # noqa: E731
    solve = functools.partial(jp.solve_scan, step, solver=jp.shooting(chunks=32))
    both = jax.jit(lambda h, x: (solve(h, x), scan(h, x)), compiler_options=QUICK)
    ((_, states), _), plain = both(init, xs)
    exact = in_float64(scan, init, xs)
    lost = np.abs(np.asarray(plain) - exact).max()
    assert np.abs(np.asarray(states) - exact).max() <= 1e-5 * np.abs(exact).max() + 2 * lost


# Of a difference: where it is not above 0, they stand still and so does their derivative.
KINKS = {
    "relu": jax.nn.relu,
    "a square root": lambda v: (v + jnp.sqrt(v * v)) / 2,
    "a sharp sigmoid": lambda v: F32(2e-6) * jax.nn.sigmoid(F32(1e8) * v),
    "an angle": lambda v: F32(2e-7) * jnp.arctan2(v, F32(-1)),
}


@functools.cache
def followed(kink, margin=6e-7):
    """A convex step, and a sum of by how much its state exceeds a reference that is `margin` less.

    Newton comes from one side: where its error exceeds the margin, the sum stands still and so does
    its derivative, though the next correction crosses the kink at every step.
    """
    exceeds = KINKS[kink]
    xs = np.float32(0.05) * np.sin(np.arange(2048, dtype=np.float32) / 9)

    def step(state, inputs):
        p, total = state
        x, reference = inputs
        new = (F32(0.45) * p * p + F32(0.1) + x, total + exceeds(p - reference))
        return new, new

    with jax.enable_x64(True):
        begin = (np.float64(F32(0.2)), np.float64(1))
        wide = xs.astype(np.float64)
        path = np.asarray(lax.scan(step, begin, (wide, wide))[1][0])
        before = np.concatenate([[begin[0]], path[:-1]])
        inputs = (xs, (before - margin).astype(np.float32))
        exact = lax.scan(step, begin, jax.tree.map(lambda a: a.astype(np.float64), inputs))[1]
    return step, inputs, before, np.asarray(exact[1])


@functools.cache
def followed_by_newton(kink):
    step = followed(kink)[0]

    def both(h, x, guess):
        solve = functools.partial(jp.solve_scan, solver=jp.newton(), guess=guess)
        return solve(step, h, x), lax.scan(step, h, x)[1][1]

    return jax.jit(both, compiler_options=QUICK)


@pytest.mark.parametrize("off", [-1.3e-3, 1.4e-3, -1.6e-3])
@pytest.mark.parametrize("kink", KINKS)
def test_a_correction_that_crosses_a_kink_is_tested_behind_it(kink, off):
    _, inputs, before, exact = followed(kink)
    init = (F32(0.2), F32(1))
    guess = [(before + off).astype(np.float32), np.ones(len(before), np.float32)]
    ((_, (_, total)), info), plain = followed_by_newton(kink)(init, inputs, guess)
    lost = np.abs(plain - exact).max()
    assert info.converged
    assert np.abs(total - exact).max() <= 1e-5 * exact.max() + 2 * lost
    # What a solve that stands on the wrong side returns, and would call converged.
    assert np.ptp(exact) > 5 * (1e-5 + 2 * lost)


def path_and_gains(rate):
    """Deviations from a path shrink by `rate` a step, grow 2000-fold in the middle, shrink again.

    Nothing of that shows on the path itself, on which `lax.scan` stays without an error.
    """
    time = 2048
    path = (np.sin(np.arange(time + 1) / 7) + 2).astype(np.float32)
    gains = np.full(time, rate, np.float32)
    gains[1024:1280], gains[1280:] = 1.03, 0.97

    def step(h, inputs):
        gain, before, after = inputs
        return (after + gain * jnp.tanh(h - before),) * 2

    return step, path, (gains, path[:-1], path[1:])


@pytest.mark.parametrize("iterations", [2, 3, 4])
def test_what_is_completed_starts_from_corrected_states(iterations):
    step, path, _ = path_and_gains(0.9)
    for solver in (jp.shooting(max_iters=iterations), jp.newton(max_iters=iterations)):
        run = jax.jit(
            lambda h, x, s=solver: jp.solve_scan(step, h, x, solver=s), compiler_options=QUICK
        )
        for rate in (0.8, 0.9, 0.92):
            (_, states), _ = run(path[0], path_and_gains(rate)[2])
            assert np.abs(states - path[1:]).max() <= 1e-5 * path.max(), (solver, rate)


@pytest.mark.parametrize("solver", ["shooting", "newton", "jacobi"])
def test_zeros_keep_their_sign(solver):
    """A correction of 0 does not tell 0 from -0; a reciprocal and an angle do."""
    f = lambda h, x: (-h, (h, 1 / h, jnp.arctan2(h, F32(-1))))  # noqa: E731
    solver = jp.shooting(chunks=7) if solver == "shooting" else SOLVERS[solver]
    run = jax.jit(lambda h, x: jp.newton_scan(f, h, x, solver=solver), compiler_options=QUICK)
    found, plain = run(F32(0), still(35))[1], lax.scan(f, F32(0), still(35))[1]
    np.testing.assert_array_equal(np.signbit(found[0]), np.arange(35) % 2 == 1)
    for ours, wanted in zip(found, plain, strict=True):
        # 1e-6: eight units, for an arctangent that is compiled in another fusion.
        np.testing.assert_allclose(ours, wanted, rtol=1e-6)


@pytest.mark.parametrize("falls", [1, 2, 3])
@pytest.mark.parametrize("solver", [jp.shooting(), jp.shooting(chunks=16), jp.newton()])
def test_a_gap_counts_by_what_is_left_of_the_states_before(solver, falls):
    step, init, xs = falling_sign(falls)
    (_, ys), _ = solves(step, solver)(init, xs)
    # 1e-5: what a certified solve may be off by, and a state that falls is corrected once.
    np.testing.assert_allclose(ys, lax.scan(states_of(step), init, xs)[1], rtol=1e-5)
    assert np.isclose(ys[-1], -4000)
