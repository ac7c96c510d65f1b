"""The kernels that multiply with integer weights: interpreted, simulated, lowered, on a device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

import jaxpara as jp
from pallas_kernels import compat
from pallas_kernels.quantised_dot import gpu, packing, quantised_dot, reference, tpu
from tests.recurrence.kit import QUICK

slow = pytest.mark.slow
hopper = pytest.mark.skipif(
    compat.version() < (0, 11), reason="Mosaic GPU needs JAX >= 0.11, which needs Python >= 3.12"
)
simulated = pytest.mark.skipif(
    compat.version() < (0, 12), reason="tried with the simulator of JAX 0.12 alone"
)


def case(bits, groups, *, rows, columns, m, dtype, exact=True):
    """Operands, the integers packed if they are small; with `exact` all sums are below 2^24."""
    draw, q = np.random.default_rng(3), 2 ** (bits - 1) - 1
    values = jnp.asarray(draw.integers(-q - 1, q + 1, (rows, columns)), jnp.int8)
    if exact:
        x = draw.integers(-20, 21, (m, rows))
        scale, offset = (draw.integers(1, 4, (groups, columns)) for _ in range(2))
    else:
        x, offset = draw.standard_normal((m, rows)), draw.standard_normal((groups, columns))
        scale = 0.1 + draw.random((groups, columns))
    held = packing.pack(values, bits) if bits <= 4 else values
    scale, offset = jnp.float32(scale), jnp.float32(offset)
    return jnp.asarray(x, dtype), values, held, scale, offset


def dense(values, scale, offset):
    each = values.shape[0] // scale.shape[0]
    spread = lambda a: np.repeat(np.float64(a), each, 0)  # noqa: E731
    return np.float64(values) * spread(scale) + spread(offset)


def wanted(x, values, scale, offset):
    return np.float64(np.asarray(x, np.float32)) @ dense(values, scale, offset)


@pytest.mark.parametrize(
    ("bits", "groups", "m", "dtype"),
    [
        pytest.param(8, 1, 5, jnp.float32, marks=slow),
        (4, 2, 33, jnp.float32),
        pytest.param(4, 4, 300, jnp.bfloat16, marks=slow),
        pytest.param(8, 2, 16, jnp.bfloat16, marks=slow),
    ],
)
def test_the_tpu_kernel_interpreted_is_the_dequantised_product(bits, groups, m, dtype):
    exact = dtype == jnp.bfloat16
    x, values, held, *more = case(
        bits, groups, rows=512, columns=256, m=m, dtype=dtype, exact=exact
    )
    call = jax.jit(
        lambda *a: tpu.quantised_dot(*a, bits=bits, interpret=True), compiler_options=QUICK
    )
    found, right = call(x, held, *more), wanted(x, values, *more)
    if exact:
        np.testing.assert_array_equal(found, right)
    else:
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=2e-6 * np.abs(right).max())


@slow
def test_no_read_races_with_a_write_in_the_tpu_kernel_on_two_simulated_cores(capfd):
    x, values, held, *more = case(4, 2, rows=512, columns=256, m=9, dtype=jnp.bfloat16)
    how = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    found = jax.jit(lambda *a: tpu.quantised_dot(*a, bits=4, interpret=how))(x, held, *more)
    np.testing.assert_array_equal(found, wanted(x, values, *more))
    assert "RACE DETECTED" not in capfd.readouterr().out


@simulated
@slow
@pytest.mark.parametrize(
    ("bits", "groups", "m", "dtype"), [(8, 1, 3, jnp.float16), (4, 2, 70, jnp.bfloat16)]
)
def test_the_gpu_kernel_simulated_is_the_dequantised_product_exactly(bits, groups, m, dtype):
    module = compat.mosaic_gpu()
    how = module.InterpretGPUParams(detect_races=True)
    x, values, held, *more = case(bits, groups, rows=256 * groups, columns=128, m=m, dtype=dtype)
    found = gpu.quantised_dot(x, held, *more, bits=bits, interpret=how)
    np.testing.assert_array_equal(found, wanted(x, values, *more))


def lowered(kernel, platform, device, bits, dtype):
    x, _, held, *more = case(bits, 2, rows=512, columns=256, m=8, dtype=dtype)
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(**device))
    with jax.sharding.use_abstract_mesh(mesh):
        call = jax.jit(lambda *a: kernel(*a, bits=bits))
        return call.trace(x, held, *more).lower(lowering_platforms=(platform,)).as_text()


H100 = {"device_kind": "NVIDIA H100", "num_cores": 132, "platform": "gpu"}
V5E = {"device_kind": "TPU v5 lite", "num_cores": 1, "platform": "tpu"}


@pytest.mark.parametrize("bits", [pytest.param(4, marks=slow), 8])
def test_the_kernels_lower_for_their_devices(bits):
    text = lowered(tpu.quantised_dot, "tpu", V5E, bits, jnp.bfloat16)
    assert "tpu_custom_call" in text


@hopper
@slow
@pytest.mark.parametrize("bits", [4, 8])
def test_the_gpu_kernel_lowers_for_a_gpu(bits):
    text = lowered(gpu.quantised_dot, "cuda", H100, bits, jnp.bfloat16)
    assert "mosaic_gpu_v2" in text


@pytest.mark.parametrize(("kernel", "dtype"), [(tpu, jnp.float32), (gpu, jnp.bfloat16)])
def test_the_kernels_refuse_what_they_cannot_take(kernel, dtype):
    def call(x=(2, 128), values=(128, 128), dtype=dtype, bits=8, kind=jnp.int8):
        operands = jnp.zeros(x, dtype), jnp.zeros(values, kind), jnp.ones((1, 1))
        return kernel.quantised_dot(*operands, bits=bits)

    with pytest.raises(NotImplementedError, match="multiples of 128"):
        call(values=(128, 5))
    with pytest.raises(NotImplementedError, match="of int32: "):
        call(dtype=jnp.int32)
    with pytest.raises(NotImplementedError, match="6 bits packed"):
        call(values=(96, 128), bits=6, kind=jnp.uint8)


def test_a_kernel_that_does_not_run_here_is_refused_by_name():
    w = jp.weights.quantised_array(np.zeros((128, 128), np.int8), np.ones((1, 1, 128), np.float32))
    for name, platform in (("mosaic_tpu", "tpu"), ("mosaic_gpu", "cuda or gpu")):
        with pytest.raises(NotImplementedError, match=f"runs on {platform}, not on cpu"):
            jp.weights.quantised_dot(np.zeros((1, 128), np.float32), w, implementation=name)


@pytest.fixture
def as_on_a_tpu(monkeypatch):
    """Its kernel, interpreted; the list holds the shapes of `x` that it was called with."""
    run, seen = tpu.quantised_dot, []

    def interpreted(x, *more, **options):
        seen.append(x.shape)
        return run(x, *more, **options, interpret=True)

    monkeypatch.setattr(tpu, "quantised_dot", interpreted)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    return seen


@slow
def test_batched_inputs_become_rows_and_batched_weights_a_loop(as_on_a_tpu):
    x, _, held, scale, _ = case(8, 1, rows=128, columns=128, m=6, dtype=jnp.float32)
    stacked = jnp.stack([held, held[::-1]])
    xs = x.reshape(2, 3, 128)

    def batch(run, axis):
        one = lambda x, held: run(x, held, scale, bits=8)  # noqa: E731
        return jax.jit(jax.vmap(one, (0, axis)))(xs, held if axis is None else stacked)

    for axis, rows in ((None, 6), (0, 3)):
        found, right = batch(quantised_dot, axis), batch(reference.quantised_dot, axis)
        assert as_on_a_tpu[-1] == (rows, 128)  # the first was traced without a batch
        np.testing.assert_array_equal(found, right)


def test_a_kernel_has_the_derivative_of_the_reference(as_on_a_tpu):
    x, _, held, scale, offset = case(
        8, 1, rows=128, columns=128, m=3, dtype=jnp.float32, exact=False
    )
    weights = jnp.cos(jnp.arange(128.0))

    def both(run):
        def loss(x, scale, offset):
            return jnp.sum(weights * run(x, held, scale, offset, bits=8))

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, scale, offset)

    found, right = both(quantised_dot), both(reference.quantised_dot)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-2), found, right)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 70, 512])
def test_on_a_gpu_the_product_is_the_dequantised_one_exactly(bits, m):
    x, values, held, *more = case(bits, 4, rows=1024, columns=512, m=m, dtype=jnp.bfloat16)
    placed = jax.device_put((x, held, *more), jax.devices("gpu")[0])
    call = jax.jit(lambda *a: quantised_dot(*a, bits=bits, implementation="mosaic_gpu"))
    np.testing.assert_array_equal(call(*placed), wanted(x, values, *more))
