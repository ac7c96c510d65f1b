"""Gradients of parameters under narrow states are summed in float32, whoever takes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpara as jp
from jaxpara.recurrence import wide
from jaxpara.recurrence.wide import widened
from tests.recurrence.kit import QUICK

T, D = 300, 40
SOLVERS = {
    "sequential": jp.sequential(),
    "shooting": jp.shooting(),
    "newton": jp.newton(),
    "jacobi": jp.jacobi(),
    "fused": jp.fused(),
    "kernel": jp.fused(implementation="xla"),
    "tpu": jp.fused(implementation="mosaic_tpu_interpret"),
}
# A bfloat16 adjoint of 2 - 2^-k is 2 after eight steps; of single terms nothing else is rounded.
NEAR = 2e-3


def inputs(dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(0).uniform(0.5, 1.5, (T, D)), dtype)


def exact(x):
    """d/dp of the sum over t of `h_t = h_{t-1} / 2 + p x_t`, in float64, a sum over lanes too."""
    x = np.asarray(x, np.float64)
    weights = 2.0 - 0.5 ** np.arange(T - 1, -1, -1.0)
    return (weights[:, None] * x).sum(axis=0)


def loss(p, x, solver, derivative):
    def step(h, x):
        for part in jax.tree.leaves(p):
            x = part.astype(h.dtype) * x
        h = 0.5 * h + x
        return h, h

    solve = functools.partial(jp.newton_scan, solver=solver, derivative=derivative)
    return solve(step, jnp.zeros(D, x.dtype), x)[1].astype(jnp.float32).sum()


def gradient(p, x, solver, derivative):
    return quick(jax.grad(lambda p, x: loss(p, x, solver, derivative)))(p, x)


def quick(function):
    return jax.jit(function, compiler_options=QUICK)


def error(found, wanted):
    found = np.asarray(found, np.float64)
    return np.max(np.abs(found - wanted) / np.abs(wanted))


@pytest.mark.parametrize("derivative", ["general", "reverse"])
@pytest.mark.parametrize("name", SOLVERS)
def test_float32_parameters_under_a_bfloat16_state(name, derivative):
    if name == "tpu" and derivative == "general":
        pytest.skip("the general rule runs the kernel of linear recurrences, which sums nothing")
    x = inputs()
    of_all, of_each = gradient((jnp.float32(1), jnp.ones(D)), x, SOLVERS[name], derivative)
    assert error(of_all, exact(x).sum()) < NEAR
    assert error(of_each, exact(x)) < NEAR


@pytest.mark.parametrize("derivative", ["general", "reverse"])
def test_narrow_sums_are_what_this_would_notice(monkeypatch, derivative):
    monkeypatch.setattr(wide, "narrow", lambda dtype: False)
    x = inputs()
    # Not the solver of another test: its compiled gradient would be found.
    found = gradient(jnp.float32(1), x, jp.shooting(chunks=30), derivative)
    assert error(found, exact(x).sum()) > 50 * NEAR


@pytest.mark.parametrize("derivative", ["general", "reverse"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_parameter_is_rounded_once(dtype, derivative):
    x = inputs(dtype)
    found = gradient(jnp.asarray(1, dtype), x, SOLVERS["sequential"], derivative)
    assert found.dtype == dtype
    assert error(found, exact(x).sum()) < NEAR + float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("derivative", ["general", "reverse"])
def test_a_batch_is_summed_in_float32(derivative):
    x = inputs()
    batch = jnp.stack([x] * 30)

    def total(p):
        one = lambda x: loss(p, x, SOLVERS["shooting"], derivative)  # noqa: E731
        return jax.vmap(one)(batch).sum()

    assert error(quick(jax.grad(total))(jnp.float32(1)), 30 * exact(x).sum()) < NEAR


def test_outputs_sum_in_float32_too():
    x = inputs()

    def total(p, derivative):
        def step(h, x):
            h = 0.5 * h + x
            return h, p.astype(h.dtype) * x

        ys = jp.newton_scan(
            step, jnp.zeros(D, x.dtype), x, solver=SOLVERS["shooting"], derivative=derivative
        )[1]
        return ys.astype(jnp.float32).sum()

    for derivative in ("general", "reverse"):
        wanted = np.asarray(x, np.float64).sum()
        slope = quick(jax.grad(functools.partial(total, derivative=derivative)))
        assert error(slope(jnp.float32(1)), wanted) < 1e-6


def branched(p, x):
    """Calls, branches, a checkpoint, moves, a rule of JAX's own and narrow types of all kinds."""
    p = p.astype(x.dtype)
    y = jax.jit(lambda x: jnp.where(x > 1, p * x, x - p))(x)
    y = lax.cond(p > 0, lambda y: p * y, lambda y: y / p, y)
    y = jax.checkpoint(lambda y: jnp.tanh(y * p))(y)
    y = jax.nn.softplus(jnp.stack([y, jnp.broadcast_to(p, y.shape)]).sum(0)) + y.astype(jnp.float32)
    return jnp.clip(y, 0, 3).astype(jnp.float16) * p.astype(jnp.float16), jnp.int32(3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_values_stay_bit_for_bit(dtype):
    x = inputs(dtype)
    for found, wanted in zip(
        widened(branched)(jnp.float32(0.7), x), branched(jnp.float32(0.7), x), strict=True
    ):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def test_derivative_through_branches_and_checkpoints():
    x = inputs()
    total = lambda f, p, x: f(p, x)[0].astype(jnp.float32).sum()  # noqa: E731
    found = jax.grad(functools.partial(total, widened(branched)))(jnp.float32(0.7), x)
    finer = jax.grad(functools.partial(total, branched))(jnp.float32(0.7), x.astype(jnp.float32))
    rough = jax.grad(functools.partial(total, branched))(jnp.float32(0.7), x)
    assert error(found, finer) < 2.0**-8  # single terms are rounded to bfloat16
    assert error(rough, finer) > 0.01


def test_a_region_with_other_kinds_of_mesh_axes_keeps_its_mesh():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    product = jax.sharding.explicit_axes(
        lambda p, x: p.astype(x.dtype) * x, axes=("data",), in_sharding=(P(), P("data"))
    )
    around = jax.sharding.auto_axes(
        lambda p, x: widened(product)(p, x), axes=("data",), out_sharding=P("data")
    )
    total = lambda p, x: around(p, x).astype(jnp.float32).sum()  # noqa: E731
    x = inputs()
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("data")))
        found = quick(jax.grad(total))(jnp.float32(1), placed)
    assert error(found, np.asarray(x, np.float64).sum()) < 1e-6


def test_second_order_under_a_narrow_state():
    x = inputs()

    def total(p):
        def step(h, x):
            h = (0.5 * h + p.astype(h.dtype) ** 2 * x).astype(h.dtype)
            return h, h

        ys = jp.newton_scan(step, jnp.zeros(D, x.dtype), x, solver=SOLVERS["shooting"])[1]
        return ys.astype(jnp.float32).sum()

    assert error(quick(jax.grad(jax.grad(total)))(jnp.float32(1)), 2 * exact(x).sum()) < 2 * NEAR


def test_float32_functions_are_left_alone():
    calls = []

    def plain(x):
        calls.append(1)
        return jnp.sin(x)

    jaxpr = jax.make_jaxpr(widened(plain))(jnp.ones(3))
    assert len(calls) == 2 and [e.primitive.name for e in jaxpr.eqns] == ["sin"]
