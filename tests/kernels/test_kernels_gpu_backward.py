"""The Mosaic GPU backward kernel: simulated against float64, lowered, and on a real GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import tests.kernels.kit as cells
from pallas_kernels import compat, mosaic, shapes
from pallas_kernels.nonlinear_recurrence import gpu_backward

needs_mosaic = pytest.mark.skipif(compat.version() < (0, 11), reason="needs JAX >= 0.11")
by_name = pytest.mark.parametrize("case", cells.CASES, ids=lambda case: case.name)


def run(case, operands, states, *, races=False, **settings):
    """The kernel in the simulator: `(d_init, d_xs, d_params, walked)`."""
    interpret = compat.mosaic_gpu().InterpretGPUParams(detect_races=races)
    call = jax.jit(lambda *a: gpu_backward.backward(case.cell, *a, interpret=interpret, **settings))
    return jax.block_until_ready(
        call(operands.init, operands.xs, operands.params, states, operands.cotangents)
    )


def stored(truth, like):
    return [jnp.asarray(s, h.dtype) for s, h in zip(truth.states, like, strict=True)]


def errors(got, truth):
    d_init, d_xs, d_params, _ = got
    return [
        cells.relative_error(d_init, truth.d_init),
        cells.relative_error(d_xs, truth.d_xs),
        cells.relative_error(d_params, truth.d_params),
    ]


def check(case, steps, batch, width, *, reverse=False, tolerance=2e-6, **settings):
    operands = cells.draw(case, steps, batch, width)
    truth = cells.oracle(case, operands, reverse=reverse)
    got = run(case, operands, stored(truth, operands.init), reverse=reverse, **settings)
    assert max(errors(got, truth)) < tolerance, errors(got, truth)
    np.testing.assert_array_equal(got[3], 0)


@needs_mosaic
def test_gradients_of_a_gru_are_float64_bptt_and_no_two_warpgroups_race():
    # Two windows, the last one not full; two warpgroups; a second block of channels, not full.
    check(cells.GRU, *shapes.SIMULATED[3], chunks=16, window=64, races=True)


@needs_mosaic
@pytest.mark.slow
@by_name
def test_gradients_of_a_reversed_recurrence_are_float64_bptt(case):
    check(case, 70, 1, 16, chunks=8, window=32, reverse=True)


@needs_mosaic
@pytest.mark.slow
def test_gradients_of_two_states_are_float64_bptt_in_every_sequence():
    check(cells.LSTM, 40, 2, 16, chunks=8, window=32)


@needs_mosaic
@pytest.mark.slow
def test_one_step_is_the_vjp_of_the_step():
    check(cells.STRANGE, *shapes.SIMULATED[0])


@needs_mosaic
@pytest.mark.slow
def test_blocks_of_32_channels_and_four_warpgroups_give_the_same(monkeypatch):
    monkeypatch.setattr(gpu_backward, "_BLOCKS_WANTED", 1)  # as with many sequences
    check(cells.GRU, 128, 1, 40, chunks=32, window=128, races=True)


@needs_mosaic
@pytest.mark.slow
def test_each_sequence_may_have_its_own_parameters():
    operands = cells.draw(cells.GRU, 33, 2, 16)
    params = [jnp.concatenate([p, -0.5 * p]) for p in operands.params]
    own = operands._replace(params=params)
    truth = cells.oracle(cells.GRU, own)
    got = run(cells.GRU, own, stored(truth, own.init))
    assert max(errors(got, truth)) < 2e-6


@needs_mosaic
@pytest.mark.slow
def test_bfloat16_storage_rounds_results_and_nothing_else():
    operands = cells.draw(cells.GRU, 64, 1, 16, dtype=jnp.bfloat16)
    narrow = cells.GRU._replace(cell=cells.rounded(cells.GRU.cell))
    states = cells.scanned(narrow.cell, operands)
    truth = cells.oracle(cells.GRU, operands, linearise_at=states)
    got = run(narrow, operands, states)
    assert [a.dtype for a in (*got[0], *got[1])] == [jnp.bfloat16] * 4
    assert [a.dtype for a in got[2]] == [jnp.float32] * 3
    d_init, d_xs, d_params = errors(got, truth)
    assert max(d_init, d_xs) < 2**-8  # half a unit in the last place of bfloat16
    assert d_params < 2e-6  # never stored as bfloat16


def spiked(first):
    """An affine recurrence in which the product of J^T over two steps overflows, and BPTT does not.

    Two decays of 1e30 at `first` and after it, on states of zero; the step behind them forgets, and
    so nothing ever flows back through them.
    """
    operands = cells.draw(cells.AFFINE, 96, 2, 16)
    a, b = (np.array(x) for x in operands.xs)
    given = np.array(operands.cotangents[0])
    a[first : first + 2, 0, 3] = 1e30
    a[first + 2, 0, 3] = 0.0
    a[first - 1, 0, 3], b[first - 1 : first + 2, 0, 3] = 0.0, 0.0
    given[first : first + 2, 0, 3] = 0.0
    return operands._replace(xs=[jnp.asarray(a), jnp.asarray(b)], cotangents=[jnp.asarray(given)])


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "steps", "walked", "reverse"),
    [
        (46, 96, 32, False),  # in the second of three windows
        (90, 93, 29, False),  # in the last, which three steps of padding fill up
        (90, 93, 29, True),
        (2, 72, 8, False),  # in the first, which has two chunks
        (2, 72, 8, True),
    ],
)
def test_an_overflowing_product_walks_its_window_and_no_other(first, steps, walked, reverse):
    # Chunks of four steps: the overflow is at the end of one.
    order = slice(None, None, -1) if reverse else slice(None)
    operands = spiked(first)
    operands = operands._replace(
        xs=[x[:steps][order] for x in operands.xs],
        cotangents=[g[:steps][order] for g in operands.cotangents],
    )
    truth = cells.oracle(cells.AFFINE, operands, reverse=reverse)
    assert all(np.isfinite(d).all() for d in truth.d_xs)
    settings = {"chunks": 8, "window": 32, "reverse": reverse, "races": True}
    got = run(cells.AFFINE, operands, stored(truth, operands.init), **settings)
    assert max(errors(got, truth)) < 2e-6
    np.testing.assert_array_equal(got[3], [walked, 0])  # of the first sequence alone


@needs_mosaic
@pytest.mark.slow
def test_nan_reaches_the_steps_before_it_in_its_own_channel_alone():
    operands = cells.draw(cells.GRU, 64, 1, 16)
    states = stored(cells.oracle(cells.GRU, operands), operands.init)
    clean = run(cells.GRU, operands, states, chunks=8, window=32)
    xs = [operands.xs[0].at[40, 0, 5].set(jnp.nan), *operands.xs[1:]]
    got = run(cells.GRU, operands._replace(xs=xs), states, chunks=8, window=32)
    for bad, good in zip((*got[0], *got[1]), (*clean[0], *clean[1]), strict=True):
        bad, good = np.atleast_3d(bad), np.atleast_3d(good)
        others = np.arange(16) != 5
        if bad.shape[0] == 64:
            np.testing.assert_allclose(bad[:, 0, others], good[:, 0, others], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(np.isnan(bad[:, 0, 5]), np.arange(64) <= 40)
        else:
            np.testing.assert_array_equal(np.isnan(bad[0, :, 0]), ~others)
    np.testing.assert_array_equal(got[3], 64)  # both windows


def lower(case, shape, dtype=jnp.float32):
    """The text of the kernel's lowering for a GPU, on this machine without one."""
    cell, sizes = case.cell, tuple(shape)

    def some(count, shape):
        return [jax.ShapeDtypeStruct(shape, dtype)] * count

    init, xs, params = (
        some(cell.states, sizes[1:]),
        some(cell.inputs, sizes),
        some(cell.params, (1, sizes[2])),
    )
    states = some(cell.states, sizes)
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        call = jax.jit(lambda *a: gpu_backward.backward(cell, *a))
        traced = call.trace(init, xs, params, states, states)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_mosaic
@pytest.mark.parametrize(
    "case",
    [cells.GRU, *(pytest.param(c, marks=pytest.mark.slow) for c in cells.CASES[1:])],
    ids=lambda case: case.name,
)
def test_the_kernel_lowers_for_a_gpu(case):
    assert "mosaic_gpu_v2" in lower(case, shapes.COMPILED[0])


@needs_mosaic
@pytest.mark.slow
def test_padded_bfloat16_and_wide_blocks_lower_for_a_gpu():
    assert "mosaic_gpu_v2" in lower(cells.LSTM, (1000, 64, 130), jnp.bfloat16)


@pytest.mark.skipif(compat.version() >= (0, 11), reason="JAX >= 0.11 has the kernel")
def test_an_old_jax_is_refused_by_name():
    operands = cells.draw(cells.GRU, 4, 1, 2)
    with pytest.raises(NotImplementedError, match="needs JAX >= 0.11"):
        gpu_backward.backward(
            cells.GRU.cell,
            operands.init,
            operands.xs,
            operands.params,
            operands.cotangents,
            operands.cotangents,
        )


@needs_mosaic
def test_a_dtype_that_it_does_not_store_is_refused():
    operands = cells.draw(cells.AFFINE, 4, 1, 2)
    wrong = [x.astype(jnp.int32) for x in operands.xs]
    given = operands.cotangents
    with pytest.raises(NotImplementedError, match="not int32"):
        gpu_backward.backward(cells.AFFINE.cell, operands.init, wrong, [], given, given)


@needs_mosaic
def test_more_sequences_than_a_launch_takes_are_refused():
    row, long = jnp.zeros((65536, 1)), jnp.zeros((1, 65536, 1))
    with pytest.raises(NotImplementedError, match="65536 sequences; a launch takes 65535"):
        gpu_backward.backward(cells.AFFINE.cell, [row], [long, long], [], [long], [long])


@pytest.mark.parametrize("shape", [*shapes.ON_DEVICE, *shapes.GRID], ids=str)
def test_windows_cover_all_steps_and_fit_the_hardware(shape):
    for states, inputs in ((1, 2), (1, 3), (2, 4), (4, 4), (4, 20)):
        for size in (2, 4):
            arrays = inputs + 2 * states
            plan = gpu_backward.choose(tuple(shape), arrays * size, states * size, states)
            assert plan.windows * plan.window >= shape.steps > (plan.windows - 1) * plan.window
            assert plan.chunks % (plan.warpgroups * mosaic.rows_of(plan.block)) == 0
            assert 2 * plan.length % 8 == 0  # chunks of two-byte entries begin at 128 bytes
            near = 2 * plan.length * (plan.chunks * arrays + states) * size
            summaries = 4 * plan.chunks * (states**2 + 3 * states)
            assert plan.block * (near + summaries) < mosaic.SHARED_MEMORY
            assert shape.steps % plan.length == 0 or shape.steps % 4  # no padded copies


def test_kernels_beyond_shared_memory_are_refused_with_their_size():
    with pytest.raises(NotImplementedError, match="two windows of 8 chunks of 128 steps"):
        gpu_backward.choose((4096, 1, 16), 20, 4, 1, chunks=8, window=1024)
    with pytest.raises(NotImplementedError, match="bytes of shared memory"):
        gpu_backward.choose((4096, 1, 16), 4000, 4, 1)


@pytest.mark.parametrize("setting", ["chunks", "window"])
def test_settings_below_one_are_refused(setting):
    with pytest.raises(ValueError, match=f"{setting}=0; expected at least 1"):
        gpu_backward.choose((64, 1, 16), 20, 4, 1, **{setting: 0})


def on_device(case, steps, batch, width, *, reverse=False, dtype=jnp.float32, states=None):
    """Float64 gradients from the CPU, and what a call takes, on the GPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        operands = cells.draw(case, steps, batch, width, dtype=dtype)
        given = None if states is None else states(operands)
        truth = cells.oracle(case, operands, reverse=reverse, linearise_at=given)
        given = given or stored(truth, operands.init)
    init, xs, params, cotangents = jax.device_put(operands, jax.devices("gpu")[0])
    given = jax.device_put(given, jax.devices("gpu")[0])
    # What the results will lie in is full of NaN: an entry that nobody writes shows.
    jax.block_until_ready([jnp.full(a.shape, jnp.nan, a.dtype) for a in (*xs, *xs, *cotangents)])
    return truth, (init, xs, params, given, cotangents)


def program(case, **settings):
    return jax.jit(lambda *a: gpu_backward.backward(case.cell, *a, **settings))


def call(case, arguments, **settings):
    return jax.block_until_ready(program(case, **settings)(*arguments))


FULL = [cells.LSTM, cells.AFFINE]  # at large shapes the float64 oracle takes most of the time


# Most telling first, as in test_kernels_gpu.py.
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "reverse", "case"),
    [(s, r, c) for r in (False, True) for s in shapes.ON_DEVICE[:3] for c in cells.CASES]
    + [(s, False, c) for s in shapes.ON_DEVICE[3:] for c in FULL]
    + [(shapes.ON_DEVICE[3], True, c) for c in FULL],
    ids=lambda v: (
        getattr(v, "name", None) or "x".join(map(str, v)) if isinstance(v, tuple) else str(v)
    ),
)
def test_gradients_on_a_gpu_are_float64_bptt(case, shape, reverse):
    truth, arguments = on_device(case, *shape, reverse=reverse)
    got = call(case, arguments, reverse=reverse)
    # The device's exp2 and reciprocal are good to about two ulp each; the parameters' gradients
    # are float32 sums over all steps.
    assert max(errors(got, truth)) < 1e-5, errors(got, truth)
    np.testing.assert_array_equal(got[3], 0)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [cells.GRU, cells.LSTM], ids=lambda case: case.name)
def test_on_a_gpu_two_calls_give_the_same_bits(case):
    _, arguments = on_device(case, 2048, 8, 256)
    again = program(case)
    first = again(*arguments)
    for _ in range(20):  # a race between warps would show here sooner or later
        jax.tree.map(np.testing.assert_array_equal, first, again(*arguments))


@pytest.mark.gpu
def test_on_a_gpu_bfloat16_storage_rounds_results_and_nothing_else():
    states = lambda operands: cells.scanned(cells.rounded(cells.GRU.cell), operands)  # noqa: E731
    truth, arguments = on_device(cells.GRU, 1000, 64, 256, dtype=jnp.bfloat16, states=states)
    d_init, d_xs, d_params = errors(call(cells.GRU, arguments), truth)
    assert max(d_init, d_xs) < 2**-8
    assert d_params < 1e-5


@pytest.mark.gpu
def test_on_a_gpu_an_overflow_walks_its_window_and_no_other():
    with jax.default_device(jax.devices("cpu")[0]):
        operands = spiked(46)
        truth = cells.oracle(cells.AFFINE, operands)
        states = stored(truth, operands.init)
    arguments = (operands.init, operands.xs, operands.params, states, operands.cotangents)
    arguments = jax.device_put(arguments, jax.devices("gpu")[0])
    got = call(cells.AFFINE, arguments, chunks=8, window=32)
    assert max(errors(got, truth)) < 2e-6
    np.testing.assert_array_equal(got[3], [32, 0])
