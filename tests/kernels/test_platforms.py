"""Other platforms: lowered without a device, and run where there is a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from jaxpara.recurrence.solve import linear_kernel
from tests.recurrence.kit import solver_rows

SOLVERS = {
    "shooting": jp.shooting(),
    "newton": jp.newton(),
    "quasi_newton": jp.quasi_newton(),
    "jacobi": jp.jacobi(),
    "sequential": jp.sequential(),
}


def lstm_step(scale):
    def step(carry, gates):
        c, h = carry
        f = jax.nn.sigmoid(gates[0] + scale * h)
        c = f * c + (1 - f) * jnp.tanh(gates[1] - scale * h)
        h = jax.nn.sigmoid(gates[2] + scale * c) * jnp.tanh(c)
        return (c, h), h

    return step


def data(time, batch, state, dtype=np.float32):
    rng = np.random.default_rng(0)
    gates = tuple(rng.standard_normal((time, batch, state)).astype(dtype) for _ in range(3))
    return np.full(state, 0.5, dtype), gates


def loss_of(scan, **options):
    def loss(scale, gates):
        zero = jnp.zeros(gates[0].shape[1:], scale.dtype)
        return jnp.sum(jnp.sin(scan(lstm_step(scale), (zero, zero), gates, **options)[1]))

    return loss


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", solver_rows(SOLVERS))
def test_values_and_gradients_lower_for_an_accelerator(name, platform):
    scale, gates = data(32, 2, 4)
    run = jax.value_and_grad(loss_of(jp.newton_scan, solver=SOLVERS[name]))
    text = jax.jit(run).trace(scale, gates).lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.while" in text


# What users get unasked comes first: the kernels, and the fused reverse rule of `jp.nn`.
ON_A_GPU = {
    "auto, reverse": {"solver": jp.auto(), "derivative": "reverse"},
    "auto": {"solver": jp.auto()},
    **{name: {"solver": solver} for name, solver in SOLVERS.items()},
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_A_GPU)
@pytest.mark.parametrize("shape", [(1000, 2, 64), (31, 3, 5), (1, 1, 1)])
def test_a_gpu_gives_what_float64_on_the_host_gives(name, shape, caplog):
    linear_kernel.say.cache_clear()
    scale, gates = data(*shape)
    loss = loss_of(jp.newton_scan, **ON_A_GPU[name])
    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(scale, gates)
    assert linear_kernel.OFF not in caplog.text  # what is asked for a kernel has run in one
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = jax.value_and_grad(loss_of(lax.scan), (0, 1))
        expected, exact = jax.jit(wide)(*data(*shape, dtype=np.float64))
    # Sums over all steps in float32: the tolerance grows with the number of terms.
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-4)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
