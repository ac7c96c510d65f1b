"""Slow drifts, rare events and rounding steps: what a small residual does not show.

A state that moves less than the tolerance a step passes a test of residuals at the guess. Each row
is solved by every solver and compared with float64 and with what `lax.scan` itself loses.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from recurrence_cases import QUICK

import jaxpara as jp

F32 = jnp.float32


def rarely(time, every, size):
    xs = np.zeros(time, np.float32)
    xs[every - 1 :: every] = size
    return xs


def still(time):
    return np.zeros(time, np.float32)


# name: step, initial state, inputs, whether a correction can bound the error
ROWS = {
    "clock": (lambda h, x: h + F32(2e-3), 1e4, still(20_000), True),
    "ema": (lambda h, x: h + F32(1e-6) * (2 - h), 1.0, still(20_000), True),
    "floor never reached": (
        lambda h, x: jnp.maximum(h + F32(2e-3), -1e9), 1e4, still(4096), True,
    ),
    "ceiling never reached": (
        lambda h, x: jnp.minimum(h + x, 2e9), 1e7, rarely(2048, 64, 1.0), True,
    ),
    "nearly closed gate": (
        lambda h, x: (1 - jax.nn.sigmoid(x)) * h + jax.nn.sigmoid(x) * jnp.tanh(h + 3),
        0.3, still(4096) - 16, True,
    ),
    "stopped": (
        lambda h, x: lax.stop_gradient(h) + x, 1.0, rarely(16_384, 4, 1.2e-7), False,
    ),
    "switched": (
        lambda h, x: jnp.where(h > 1.001, h + F32(1e-4), h + F32(2e-7)), 1.0, still(8192), False,
    ),
    "rounded": (
        lambda h, x: lax.reduce_precision(h + F32(1e-3), 8, 10), 1.0, still(2048), False,
    ),
    "contracting slowly": (lambda h, x: F32(0.99) * h + x, 0.0, still(4000) + 1, True),
    "oscillator": (
        lambda h, x: jnp.stack([h[0] - F32(1e-4) * h[1], h[1] + F32(1e-4) * h[0]]),
        (1.0, 0.0), still(8192), True,
    ),
}  # fmt: skip
SOLVERS = {
    "shooting": jp.shooting(),
    "shooting 1024": jp.shooting(chunks=1024),
    "newton": jp.newton(),
    "quasi_newton": jp.quasi_newton(),
    "jacobi": jp.jacobi(),
    "fused": jp.fused(implementation="xla"),
}


@functools.cache
def wanted(row):
    """`(lax.scan, float64)` states."""
    step, init, xs, _ = ROWS[row]
    f = lambda h, x: (step(h, x), step(h, x))  # noqa: E731
    plain = jax.jit(lambda h, x: lax.scan(f, h, x)[1])(jnp.asarray(init, F32), xs)
    with jax.enable_x64(True):
        begin = np.asarray(init, np.float32).astype(np.float64)
        exact = jax.jit(lambda h, x: lax.scan(f, h, x)[1])(begin, xs.astype(np.float64))
    return np.asarray(plain), np.asarray(exact)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("row", ROWS)
def test_slow_states_arrive_where_lax_scan_does(row, solver):
    step, init, xs, _ = ROWS[row]
    f = lambda h, x: (step(h, x),) * 2  # noqa: E731
    run = jax.jit(
        lambda h, x: jp.solve_scan(f, h, x, solver=SOLVERS[solver]), compiler_options=QUICK
    )
    (end, states), info = run(jnp.asarray(init, F32), xs)
    plain, exact = wanted(row)
    lost = np.abs(plain - exact).max(axis=-1) if plain.ndim > 1 else np.abs(plain - exact)
    error = np.abs(np.asarray(states, np.float64) - plain)
    print(
        f"{row:22} {solver:14} iters {int(info.iterations):3} walked {int(info.fallback_steps):6}"
        f" conv {bool(info.converged)} err {error.max():.2e} scan's {lost.max():.2e}"
        f" end {np.ravel(end)[0]:.6f} scan {np.ravel(plain[-1])[0]:.6f}"
    )
    assert error.max() <= 1e-5 * np.abs(plain).max() + 2 * lost.max()
