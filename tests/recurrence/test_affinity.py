"""Which steps count as affine in their state, and that a kernel takes such a one in one pass.

A claim is checked against the definition: `f(s + t) - f(t)` must not depend on t.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from jaxpara.recurrence.kernel.elementwise import prepare
from tests.recurrence.kit import assert_close, in_float64

W = jnp.asarray([0.5, -0.3, 0.2])


@jax.custom_jvp
def half_hearted(h):
    return h * h


half_hearted.defjvp(lambda primals, tangents: (half_hearted(*primals), tangents[0]))

AFFINE = {
    "linear": lambda h, x: W * h + x,
    "gate": lambda h, x: h + jax.nn.sigmoid(x) * (jnp.tanh(W) - h),
    "quotient": lambda h, x: (h - x) / (2 + jnp.cos(x)) - (-h),
    "where": lambda h, x: jnp.where(x > 0, h, W * h - 1),
    "inner_jit": jax.jit(lambda h, x: jax.checkpoint(lambda h: 2 * h)(h) * x),
    "bfloat16_gate": lambda h, x: h * x.astype(jnp.bfloat16).astype(jnp.float32) + 1,
    "memoryless": lambda h, x: jnp.tanh(x),
}
ONLY_LOOKS_IT = {
    "square": lambda h, x: W * (h * h) + x,
    "reciprocal": lambda h, x: x / (2 + h),
    "sides": lambda h, x: jnp.where(h > 0, 0.5 * h, 0.2 * h) + x,
    "largest": lambda h, x: jnp.maximum(W * h, x),
    # The derivative of these does not depend on the state.
    "stopped": lambda h, x: W * h + x + lax.stop_gradient(jnp.tanh(h)),
    "straight_through": lambda h, x: h * x + lax.stop_gradient(jnp.sign(h) - h),
    "sign": lambda h, x: W * h + x * jnp.sign(h),
    "its_own_rule": lambda h, x: half_hearted(h) + x,
    # These are affine until they are rounded.
    "rounded": lambda h, x: (W * h + x).astype(jnp.bfloat16).astype(jnp.float32),
    "less_precise": lambda h, x: lax.reduce_precision(W * h + x, 8, 7),
}


def verdict(f, dtype=jnp.float32):
    step = lambda consts, s, x: ([f(s[0], x[0]).astype(s[0].dtype)], [])  # noqa: E731
    return prepare(step, [], [jnp.zeros((2, 3), dtype)], [jnp.ones((4, 2, 3))]).affine


@pytest.mark.parametrize("name", AFFINE)
def test_a_step_that_is_affine_is_proved_to_be(name):
    assert verdict(AFFINE[name])
    h, t, x = np.random.default_rng(0).standard_normal((3, 2, 3)).astype(np.float32)
    f = AFFINE[name]
    np.testing.assert_allclose(f(h + t, x) - f(t, x), f(h, x) - f(0 * h, x), atol=1e-6)


@pytest.mark.parametrize("name", ONLY_LOOKS_IT)
def test_a_step_that_only_looks_affine_is_not_taken_for_it(name):
    assert not verdict(ONLY_LOOKS_IT[name])


def test_a_narrow_carry_is_rounded_at_every_step_and_so_not_affine():
    assert verdict(AFFINE["linear"]) and not verdict(AFFINE["linear"], jnp.bfloat16)


@pytest.mark.parametrize(
    ("name", "affine"),
    [
        ("linear", True),
        pytest.param("min_gru", True, marks=pytest.mark.slow),
        pytest.param("para_gru", False, marks=pytest.mark.slow),
    ],
)
def test_cells_linear_in_the_state_take_one_pass(name, affine):
    cell = getattr(jp.cells, name)(4, 3)
    params = cell.init(jax.random.key(0))
    x = np.random.default_rng(1).standard_normal((40, 2, 4)).astype(np.float32)

    def run(scan, params, x):
        start = cell.start(params, (2,))
        return scan(functools.partial(cell.step, params), start, cell.project(params, x))

    solver = jp.fused(implementation="mosaic_tpu_interpret", chunks=4)
    info = jax.jit(functools.partial(run, functools.partial(jp.solve_scan, solver=solver)))
    (carry, ys), found = info(params, x)
    assert found.converged and (found.iterations == 1) == affine and found.fallback_steps == 0
    wanted = in_float64(functools.partial(run, lax.scan), params, x)
    assert_close((carry, ys), wanted, 3e-6)
