"""Steps in narrow types that divide: differentiated in float32, with derivatives that stay safe."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from tests.recurrence.kit import QUICK

F32 = jnp.float32
SOLVERS = {"auto": jp.auto(), "shooting": jp.shooting(), "fused": jp.fused(implementation="xla")}


def test_narrow_denominators_add_up_in_float32():
    """Their gradient is one sum over 4096 steps, which bfloat16 ends at 256 equal terms."""

    def loss(c, init, xs):
        f = lambda h, x: ((0.5 * h + x) / c,) * 2  # noqa: E731
        _, ys = jp.newton_scan(f, init, xs, solver=jp.shooting(), derivative="reverse")
        return jnp.sum(ys.astype(F32))

    args = 2.0, np.ones(2), np.ones((4096, 2))
    narrow, wide = (
        jax.jit(jax.grad(loss), compiler_options=QUICK)(*(jnp.asarray(a, dtype) for a in args))
        for dtype in (jnp.bfloat16, F32)
    )
    np.testing.assert_allclose(np.float32(narrow), wide, rtol=0.03)


NARROW = {
    "1 / (1 + exp(-h))": lambda h, x, p: 1 / (1 + jnp.exp(-h)) + x * p,
    "1 - 1 / (2 + x)": lambda h, x, p: h * (1 - 1 / (2 + x)) * p,
    "2 / p": lambda h, x, p: 0.2 * h * x + 0.2 / p,
    "p ** -0.5": lambda h, x, p: 0.5 * h * x + p**-0.5,
    "(1 + h) ** -1.5": lambda h, x, p: (1 + h) ** -1.5 * x + p,
    "1 / x[0]": lambda h, x, p: 0.5 * h + 0.2 / x[0] + p,
}


@functools.cache
def gradients(name, solver):
    """A program of the step of that name; by `lax.scan` where there is no solver."""
    f = NARROW[name]
    scan = functools.partial(jp.newton_scan, solver=SOLVERS[solver]) if solver else lax.scan

    def loss(h, x, p):
        step = lambda h, x: (f(h, x, p).astype(h.dtype),) * 2  # noqa: E731
        return jnp.sum(scan(step, h, x)[1].astype(F32))

    return jax.jit(jax.grad(loss, (0, 1, 2)), compiler_options=QUICK)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("carry", [jnp.bfloat16, jnp.float16, F32])
@pytest.mark.parametrize("name", NARROW)
def test_numbers_in_a_narrow_step_are_as_wide_as_what_they_divide(name, carry, solver):
    """Narrow steps are differentiated in float32, while their jaxprs hold narrow literals."""
    # Inputs are narrow beside a float32 carry, too.
    narrow = jnp.bfloat16 if carry == F32 else carry
    args = [jnp.ones(5, carry), jnp.full((8, 5), 0.7, narrow), jnp.full(5, 0.5, narrow)]
    found = gradients(name, solver)(*args)
    exact = gradients(name, None)(*(a.astype(F32) for a in args))
    for ours, wanted in zip(found, exact, strict=True):
        # The states that the derivatives are taken at are rounded to 8 bits.
        limit = 0.03 * np.abs(wanted).max()
        np.testing.assert_allclose(np.float32(ours), wanted, rtol=0, atol=limit)


TWICE = {
    "0.6 / (1.5 + h)": lambda h: 0.6 / (1.5 + h),
    "2 ** -h": lambda h: 2.0**-h,
    "(1.5 + h) ** -1.5": lambda h: (1.5 + h) ** -1.5,
}


@pytest.mark.parametrize("within", [lambda f: f, jax.jit, jax.checkpoint])
@pytest.mark.parametrize("name", TWICE)
def test_a_literals_rule_outlives_the_trace_that_made_it(name, within):
    """Second derivatives, and one checkpointed block that a step calls twice."""
    f = within(TWICE[name])

    def step(h, x):
        new = (f(h) + x).astype(h.dtype)
        return new, f(h).astype(h.dtype) + new

    def loss(scan, h):
        xs = jnp.full((8, 3), 0.1, jnp.bfloat16)
        return jnp.sum(jnp.sin(scan(step, h, xs)[1].astype(F32)))

    h = jnp.asarray([0.5, 0.7, 0.9])

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(h):
        slopes = [jax.grad(functools.partial(loss, scan)) for scan in (jp.newton_scan, lax.scan)]
        return [(slope(h), jax.jvp(slope, (h,), (jnp.ones(3),))[1]) for slope in slopes]

    for found, wanted in zip(*both(h), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
