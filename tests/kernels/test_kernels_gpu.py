"""The Mosaic GPU forward kernel: simulated against float64, lowered, and on a real GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import tests.kernels.kit as cells
from pallas_kernels import compat, mosaic, shapes
from pallas_kernels.nonlinear_recurrence import gpu, windows

simulated = pytest.mark.skipif(
    compat.version() < (0, 12), reason="the simulator of JAX 0.12 runs these kernels"
)
lowered = pytest.mark.skipif(compat.version() < (0, 11), reason="needs JAX >= 0.11")


def program(case, *, cell=None, races=False, interpret=True, **settings):
    """The kernel, compiled once: `(init, xs, params) -> (states, iterations, residual, walked)`."""
    settings = {"tol": None, "max_iters": 8, "affine": case.affine, "certain": True} | settings
    module = compat.mosaic_gpu()
    how = module.InterpretGPUParams(detect_races=races) if interpret else None
    return jax.jit(lambda *a: gpu.forward(cell or case.cell, *a, interpret=how, **settings))


def run(case, operands, **how):
    """What the kernel gives, in the simulator or on the device."""
    return jax.block_until_ready(program(case, **how)(operands.init, operands.xs, operands.params))


def check(case, steps, batch, width, *, reverse=False, **settings):
    operands = cells.draw(case, steps, batch, width)
    states, iterations, residual, walked = run(case, operands, reverse=reverse, **settings)
    truth = cells.oracle(case, operands, reverse=reverse)
    assert cells.relative_error(states, truth.states) < 1e-6
    assert [s.dtype for s in states] == [jnp.float32] * case.cell.states
    np.testing.assert_array_equal(walked, np.zeros(batch))
    assert np.all(residual < 1e-5)
    assert np.all(iterations == 1 if case.affine else (iterations > 1) & (iterations <= 8))


@simulated
def test_states_of_a_gru_are_float64_ones_and_no_two_warpgroups_race():
    # Two windows, the last one not full; two warpgroups; a second block of channels, not full.
    check(cells.GRU, *shapes.SIMULATED[2], chunks=16, window=32, races=True)


@simulated
@pytest.mark.slow
@pytest.mark.parametrize("case", cells.CASES, ids=lambda case: case.name)
def test_states_of_a_reversed_recurrence_are_float64_ones(case):
    check(case, *shapes.SIMULATED[1], chunks=8, window=16, reverse=True, races=True)


@simulated
def test_two_warpgroups_that_write_one_row_are_found_racing():
    # What `races=True` relies on everywhere here and in the backward kernel's tests.
    module = compat.mosaic_gpu()

    def body(out, row):
        row[...] = jnp.full((128,), 1.0)
        out[...] = row[...]

    kernel = mosaic.launch(
        body,
        out_type=[jax.ShapeDtypeStruct((128,), jnp.float32)],
        scratch=[module.SMEM((128,), jnp.float32)],
        grid=(1,),
        grid_names=("b",),
        warpgroups=2,
        interpret=module.InterpretGPUParams(detect_races=True),
    )
    with pytest.raises(Exception, match="RACE DETECTED"):
        jax.block_until_ready(jax.jit(kernel)())


@simulated
@pytest.mark.slow
def test_three_windows_on_their_way_and_a_second_block_of_channels():
    operands = cells.draw(cells.AFFINE, 64, 2, 20)
    plan = windows.choose(windows.Problem(64, 2, 20, 1, (4, 4), True, True), chunks=8, window=16)
    assert (plan.windows, plan.slots) == (4, 3)
    states = run(cells.AFFINE, operands, chunks=8, window=16, races=True)[0]
    assert cells.relative_error(states, cells.oracle(cells.AFFINE, operands).states) < 1e-6


@simulated
@pytest.mark.slow
def test_one_step_is_the_step():
    check(cells.GRU, *shapes.SIMULATED[0])


@simulated
@pytest.mark.slow
def test_a_bfloat16_carry_is_rounded_at_every_step_as_lax_scan_rounds_it():
    operands = cells.draw(cells.GRU, 20, 1, 16, dtype=jnp.bfloat16)
    cell = cells.rounded(cells.GRU.cell)
    states, _, residual, walked = run(cells.GRU, operands, cell=cell, chunks=8, window=16)
    assert states[0].dtype == jnp.bfloat16 and residual[0] == 0
    # Two programs round apart what falls near a tie.
    assert cells.relative_error(states, cells.scanned(cell, operands)) < 2.0**-7
    np.testing.assert_array_equal(walked, 0)


@simulated
@pytest.mark.slow
def test_states_stored_in_bfloat16_are_rounded_on_their_way_out_alone():
    operands = cells.draw(cells.GRU, 40, 1, 16, dtype=jnp.bfloat16)
    states, _, residual, walked = run(cells.GRU, operands, chunks=8, window=16)
    # Starts that were rounded would never meet the float32 ends, and every window be walked.
    np.testing.assert_array_equal(walked, 0)
    assert states[0].dtype == jnp.bfloat16 and residual[0] < 1e-5
    assert cells.relative_error(states, cells.oracle(cells.GRU, operands).states) < 2.0**-8


@simulated
@pytest.mark.slow
def test_bfloat16_inputs_and_blocks_of_32_channels_lose_nothing(monkeypatch):
    monkeypatch.setattr(windows, "_BLOCKS_WANTED", 0)  # as with many sequences
    operands = cells.draw(cells.GRU, 20, 1, 20, dtype=jnp.bfloat16, carry=jnp.float32)
    problem = windows.Problem(20, 1, 20, 1, (2, 2, 2), False, True)
    assert windows.choose(problem, chunks=8, window=16)[:2] == (32, 2)
    states = run(cells.GRU, operands, chunks=8, window=16, races=True)[0]
    assert cells.relative_error(states, cells.oracle(cells.GRU, operands).states) < 1e-6


@simulated
@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_a_window_that_does_not_settle_is_walked_step_by_step(reverse):
    operands = cells.draw(cells.GRU, 30, 2, 16, scale=8.0)
    # The second sequence has its own, weak, weights: it settles.
    params = [jnp.concatenate([p, 0.01 * p]) for p in operands.params]
    operands = operands._replace(params=params)
    states, iterations, residual, walked = run(
        cells.GRU, operands, max_iters=4, chunks=8, window=16, reverse=reverse, races=True
    )
    np.testing.assert_array_equal(walked, [30, 0])  # both windows, without the padding
    assert iterations[0] == 4
    assert residual[0] > 1e-3 > residual[1]
    assert cells.step_error(cells.GRU, operands, states, reverse=reverse) < 1e-6


@simulated
@pytest.mark.slow
def test_an_overflowing_product_walks_its_window_and_no_other():
    operands = cells.draw(cells.AFFINE, 48, 2, 16)
    a, b = (np.array(x) for x in operands.xs)
    # A state of zero, two factors of 1e30, then one of zero: finite, but not their product.
    a[19:23, 0, 3], b[19:23, 0, 3] = [0.0, 1e30, 1e30, 0.0], 0.0
    operands = operands._replace(xs=[jnp.asarray(a), jnp.asarray(b)])
    states, _, _, walked = run(cells.AFFINE, operands, chunks=8, window=16, races=True)
    assert cells.relative_error(states, cells.oracle(cells.AFFINE, operands).states) < 1e-6
    np.testing.assert_array_equal(walked, [16, 0])


@simulated
@pytest.mark.slow
def test_nan_reaches_the_steps_after_it_in_its_own_channel_alone():
    operands = cells.draw(cells.GRU, 32, 1, 16)
    bad = operands._replace(xs=[operands.xs[0].at[20, 0, 5].set(jnp.nan), *operands.xs[1:]])
    states, _, residual, walked = run(cells.GRU, bad, chunks=8, window=16)
    expected = np.array(cells.oracle(cells.GRU, operands).states[0])
    expected[20:, 0, 5] = np.nan
    np.testing.assert_allclose(states[0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(residual, np.inf)
    np.testing.assert_array_equal(walked, 16)


def test_every_plan_covers_the_sequence_and_fits():
    for steps, batch, width in (*shapes.GRID, *shapes.INTERPRETED, *shapes.ON_DEVICE):
        for states, inputs, affine in ((1, 3, False), (2, 4, False), (1, 2, True), (4, 20, True)):
            for itemsize in (2, 4):
                sizes = (steps, batch, width, states, (itemsize,) * inputs, affine, True)
                problem = windows.Problem(*sizes)
                plan = windows.choose(problem)
                used = windows.shared_bytes(
                    problem, plan.block, plan.chunks, plan.length, plan.slots
                )
                assert used <= mosaic.SHARED_MEMORY
                assert plan.windows * plan.window >= steps > (plan.windows - 1) * plan.window
                # Every warpgroup holds whole tiles, and the copy engine takes boxes up to 256.
                assert plan.chunks % (plan.warpgroups * mosaic.rows_of(plan.block)) == 0
                assert max(plan.chunks, plan.length) <= 256


def test_two_blocks_share_a_multiprocessor_where_there_are_enough_of_them():
    for itemsize in (4, 2):
        plans = [
            windows.choose(windows.Problem(2048, batch, 1024, 1, (itemsize,) * 3, False, True))
            for batch in (1, 64)
        ]
        used = [plan.warpgroups * 128 for plan in plans]
        assert used == [512, 256] and plans[0].slots == plans[1].slots == 2
        assert plans[1].length >= 16
        problem = windows.Problem(2048, 64, 1024, 1, (itemsize,) * 3, False, True)
        block, _, chunks, length, _, slots = plans[1]
        # Each block also takes 1 KiB for itself, of 228.
        taken = windows.shared_bytes(problem, block, chunks, length, slots) + 1024 + 3072
        assert 2 * taken <= 228 * 1024


def test_grid_shapes_are_not_copied_to_fit_windows():
    for steps, batch, width in shapes.GRID:
        problem = windows.Problem(steps, batch, width, 1, (4, 4, 4), False, True)
        plan = windows.choose(problem)
        assert plan.windows * plan.window == steps


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"chunks": 12}, "chunks=12; blocks of 16 channels expect a positive multiple of 8"),
        ({"chunks": 0}, "chunks=0; blocks"),
        ({"window": 20}, "window=20; expected a positive multiple of 8"),
        ({"window": 24, "chunks": 16}, "window=24; expected a positive multiple of 16"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        windows.choose(windows.Problem(64, 1, 16, 1, (4, 4, 4), False, True), **given)


def test_a_window_larger_than_shared_memory_is_refused():
    with pytest.raises(NotImplementedError, match="window=8192 do not fit"):
        windows.choose(windows.Problem(8192, 1, 16, 1, (4, 4, 4), False, True), window=8192)


@lowered
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"xs": []}, NotImplementedError, "without inputs"),
        ({"init": [jnp.zeros((1, 2), jnp.int32)]}, NotImplementedError, "not int32"),
        ({"xs": [jnp.zeros((1, 70_000, 1))]}, NotImplementedError, "70000 sequences"),
        ({"max_iters": 0}, ValueError, "max_iters=0; expected at least one"),
    ],
)
def test_what_the_kernel_cannot_take_is_named(change, error, message):
    operands = cells.draw(cells.GRU, 4, 1, 2)._asdict()
    settings = {"tol": None, "max_iters": 8} | operands | change
    settings.pop("cotangents")
    arrays = [settings.pop(name) for name in ("init", "xs", "params")]
    with pytest.raises(error, match=message):
        gpu.forward(cells.GRU.cell, *arrays, **settings)


@pytest.mark.skipif(compat.version() >= (0, 11), reason="JAX >= 0.11 has the kernel")
def test_an_old_jax_is_refused_by_name():
    operands = cells.draw(cells.GRU, 4, 1, 2)
    with pytest.raises(NotImplementedError, match="needs JAX >= 0.11"):
        gpu.forward(
            cells.GRU.cell, operands.init, operands.xs, operands.params, tol=None, max_iters=8
        )


def lower(case, shape, dtype=jnp.float32, **settings):
    """The text of the kernel's lowering for a GPU, on this machine without one."""
    cell, sizes = case.cell, tuple(shape)

    def some(count, shape):
        return [jax.ShapeDtypeStruct(shape, dtype)] * count

    operands = (
        some(cell.states, sizes[1:]),
        some(cell.inputs, sizes),
        some(cell.params, (1, sizes[2])),
    )
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    settings |= {"tol": None, "max_iters": 8, "affine": case.affine, "certain": True}
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        call = jax.jit(lambda *a: gpu.forward(cell, *a, **settings))
        return call.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


@lowered
@pytest.mark.parametrize(
    "case",
    [cells.GRU, *(pytest.param(c, marks=pytest.mark.slow) for c in cells.CASES[1:])],
    ids=lambda case: case.name,
)
def test_the_kernel_lowers_for_a_gpu(case):
    assert "mosaic_gpu_v2" in lower(case, shapes.COMPILED[0])


@lowered
@pytest.mark.slow
def test_padded_reversed_bfloat16_and_wide_blocks_lower_for_a_gpu():
    assert "mosaic_gpu_v2" in lower(cells.LSTM, (1000, 64, 130), jnp.bfloat16, reverse=True)


def poison(like):
    """Leaves NaN in the memory that the results are about to be given."""
    jax.block_until_ready([jnp.full(a.shape, jnp.nan, a.dtype) for a in like])


# `make gpu` runs every test with its first parameters, then every one with its second, and so on:
# the most telling come first, and of the tables below the uppermost column changes fastest.
@pytest.mark.gpu
@pytest.mark.parametrize("case", cells.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("shape", shapes.ON_DEVICE[:3], ids=shapes.name)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reversed"])
def test_on_a_gpu_states_are_float64_ones(case, shape, reverse):
    with jax.default_device(jax.devices("cpu")[0]):
        operands = cells.draw(case, *shape)
        truth = cells.oracle(case, operands, reverse=reverse)
    operands = jax.device_put(operands, jax.devices("gpu")[0])
    poison([*operands.cotangents, *operands.cotangents])
    states, iterations, _, walked = run(case, operands, interpret=False, reverse=reverse)
    # The device's exp2 and reciprocal are good to about two ulp each, and states remember.
    assert cells.relative_error(states, truth.states) < 1e-5
    assert np.all(iterations <= 8)
    if case.affine:
        np.testing.assert_array_equal(walked, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [cells.LSTM, cells.AFFINE], ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("shape", "reverse"),
    [(s, False) for s in shapes.ON_DEVICE[3:]] + [(s, True) for s in shapes.ON_DEVICE[3:5]],
    ids=shapes.name,
)
def test_on_a_gpu_every_step_of_a_full_device_is_the_step(case, shape, reverse):
    with jax.default_device(jax.devices("cpu")[0]):
        operands = cells.draw(case, *shape)
    on_device = jax.device_put(operands, jax.devices("gpu")[0])
    poison([*on_device.cotangents, *on_device.cotangents])
    states, _, _, walked = run(case, on_device, interpret=False, reverse=reverse)
    # A million boundaries: a window or two may hold an element that rounding keeps open.
    assert np.mean(walked) <= (0 if case.affine else 0.1 * shape.steps)
    with jax.default_device(jax.devices("cpu")[0]):
        states = [jnp.asarray(np.asarray(s)) for s in states]
        assert cells.step_error(case, operands, states, reverse=reverse) < 2e-5  # tol, and rounding


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [6.0, 1.0])
@pytest.mark.parametrize("max_iters", [8, 1, 3])
def test_on_a_gpu_every_step_is_the_step_however_hard_the_cell(scale, max_iters):
    with jax.default_device(jax.devices("cpu")[0]):
        operands = cells.draw(cells.LSTM, 2048, 8, 256, scale=scale)
    on_device = jax.device_put(operands, jax.devices("gpu")[0])
    poison([*on_device.cotangents, *on_device.cotangents])
    states, _, _, walked = run(cells.LSTM, on_device, interpret=False, max_iters=max_iters)
    with jax.default_device(jax.devices("cpu")[0]):
        states = [jnp.asarray(np.asarray(s)) for s in states]
        # Up to 1e-5 where rounding alone keeps a boundary from closing.
        assert cells.step_error(cells.LSTM, operands, states) < 1.5e-5
    if max_iters == 1:  # the first pass never counts
        np.testing.assert_array_equal(walked, 2048)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [cells.GRU, cells.AFFINE], ids=lambda case: case.name)
def test_on_a_gpu_two_calls_give_the_same_bits(case):
    with jax.default_device(jax.devices("cpu")[0]):
        operands = cells.draw(case, 2048, 8, 256)
    init, xs, params, _ = jax.device_put(operands, jax.devices("gpu")[0])
    call = program(case, interpret=False)
    first = call(init, xs, params)
    for _ in range(20):  # a race between warps would show here sooner or later
        jax.tree.map(np.testing.assert_array_equal, first, call(init, xs, params))


@pytest.mark.gpu
def test_on_a_gpu_bfloat16_states_are_within_two_units_of_lax_scan():
    with jax.default_device(jax.devices("cpu")[0]):
        operands = cells.draw(cells.GRU, 1000, 64, 256, dtype=jnp.bfloat16)
        cell = cells.rounded(cells.GRU.cell)
        expected = cells.scanned(cell, operands)
    operands = jax.device_put(operands, jax.devices("gpu")[0])
    states = run(cells.GRU, operands, cell=cell, interpret=False)[0]
    assert cells.relative_error(states, expected) < 2.0**-6
