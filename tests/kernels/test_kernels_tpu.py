"""The Mosaic TPU kernels, interpreted on a CPU against float64, and lowered for a TPU.

Nothing here needs a TPU, and nothing here has run on one. What `make compile` compiles for v5e and
v6e are these kernels at larger shapes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec

from pallas_kernels import linear_recurrence, shapes
from pallas_kernels.nonlinear_recurrence import tpu
from tests.kernels.kit import (
    AFFINE,
    AFFINE2,
    CASES,
    GRU,
    LSTM,
    STRANGE,
    Operands,
    draw,
    oracle,
    relative_error,
    rounded,
    scanned,
    step_error,
)

TOL = 1e-6
ONE, PRIME, POWER, PADDED = shapes.INTERPRETED


def forward(case, operands, *, cell=None, tol=TOL, max_iters=8, interpret=True, **how):
    cell, affine = cell or case.cell, case.affine
    more = {"tol": tol, "max_iters": max_iters, "affine": affine, "interpret": interpret}
    more |= {"certain": True, **how}
    return tpu.forward(cell, operands.init, operands.xs, operands.params, **more)


def backward(case, operands, states, *, interpret=True, **how):
    init, xs, params, cotangents = operands
    return tpu.backward(case.cell, init, xs, params, states, cotangents, interpret=interpret, **how)


# Interpreted kernels are large programs that run for a moment: compile them quickly.
QUICK = {"xla_backend_optimization_level": "0"}


@functools.lru_cache
def program(case, which, how):
    """A compiled `forward`, or that and `backward` at its states."""
    options = dict(how)
    only = {k: v for k, v in options.items() if k in ("reverse", "chunks", "window", "interpret")}

    def both(o):
        solved = forward(case, o, **options)
        return (solved, backward(case, o, solved[0], **only)) if which == "both" else solved

    return jax.jit(both, compiler_options=QUICK)


def solve_forward(case, operands, **how):
    return program(case, "forward", tuple(how.items()))(operands)


def solve(case, operands, **how):
    return program(case, "both", tuple(how.items()))(operands)


def assert_equals_float64(case, operands, solved, pulled, *, reverse=False):
    truth = oracle(case, operands, reverse=reverse)
    assert relative_error(solved[0], truth.states) < 2e-6  # what a residual of 1e-6 leaves
    d_init, d_xs, d_params, completed = pulled
    assert relative_error(d_init, truth.d_init) < 2e-6
    assert relative_error(d_xs, truth.d_xs) < 2e-6
    assert relative_error(d_params, truth.d_params) < 2e-6
    assert np.all(completed == 0)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_hand_written_derivatives_are_those_of_the_oracles_step(case):
    cell, rng = case.cell, np.random.default_rng(0)
    with jax.enable_x64(True):
        sizes = (cell.states, cell.inputs, cell.params, cell.states)
        h, x, p, g = ([jnp.asarray(rng.normal(size=(6, 7))) for _ in range(n)] for n in sizes)
        new, vjp = jax.vjp(case.truth, h, x, p)
        assert relative_error(cell.step(h, x, p), new) < 1e-14
        for got, expected in zip(cell.pull(h, x, p, g), vjp(g), strict=True):
            assert relative_error(got, expected) < 1e-13
        assert relative_error(cell.pull_state(h, x, p, g), vjp(g)[0]) < 1e-13
        same, (pushed,) = cell.push(h, x, p, [g])
        expected = jax.jvp(lambda h: case.truth(h, x, p), (h,), (g,))[1]
        assert relative_error(same, new) < 1e-14 and relative_error(pushed, expected) < 1e-13


@pytest.mark.parametrize(
    ("case", "shape", "how"),
    [
        # Blocks of 8 x 128 that B and D do not fill, windows that T does not fill.
        (GRU, PRIME, {"chunks": 3, "window": 16}),
        (AFFINE, ONE, {}),
        pytest.param(AFFINE, PADDED, {"chunks": 5}, marks=pytest.mark.slow),
        pytest.param(
            AFFINE2, PRIME, {"chunks": 3, "window": 16, "reverse": True}, marks=pytest.mark.slow
        ),
        pytest.param(
            STRANGE, PADDED, {"chunks": 3, "window": 300, "reverse": True}, marks=pytest.mark.slow
        ),
        # A sequential kernel takes more lanes.
        pytest.param(LSTM, (40, 2, 600), {"chunks": 1, "window": 16}, marks=pytest.mark.slow),
    ],
    ids=lambda v: getattr(v, "name", None),
)  # fmt: skip
def test_values_and_gradients_equal_float64_in_one_correction_or_a_few(case, shape, how):
    operands = draw(case, *shape)
    if case is STRANGE:  # parameters of every sequence's own
        rng = np.random.default_rng(7)
        params = [jnp.asarray(rng.uniform(-1, 1, shape[1:]), jnp.float32) for _ in range(2)]
        operands = operands._replace(params=params)
    solved, pulled = solve(case, operands, **how)
    assert_equals_float64(case, operands, solved, pulled, reverse=how.get("reverse", False))
    _, iterations, residual, completed = solved
    assert iterations.shape == residual.shape == completed.shape == shape[1:2]
    assert np.all(completed == 0)
    if case.affine or how.get("chunks") == 1:
        assert np.all(iterations == 1) and np.all(residual < 1e-5)
    else:
        assert np.all((2 <= iterations) & (iterations <= 6)) and np.all(residual < 1e-5)


@pytest.mark.slow
def test_hard_cells_are_right_and_easy_sequences_do_not_wait():
    case, operands = GRU, draw(GRU, *POWER, scale=4.0, seed=1)
    # The second sequence has its own, weak, weights.
    easy = [jnp.concatenate([p, 0.01 * p]) for p in operands.params]
    operands = operands._replace(params=easy)
    (states, iterations, residual, _), pulled = solve(case, operands, chunks=8)
    assert step_error(case, operands, states) < 2e-6
    assert 2 <= iterations[1] < iterations[0] <= 8 and residual[1] < 1e-5
    truth = oracle(case, operands, linearise_at=states)
    for got, wanted in zip(pulled[:3], truth[1:], strict=True):
        assert relative_error(got, wanted) < 1e-5  # gradients that grow from step to step


@pytest.mark.slow
def test_bfloat16_inputs_under_a_float32_carry_are_exact_and_gradients_come_back_in_bfloat16():
    operands = draw(GRU, 64, 3, 6, dtype=jnp.bfloat16, carry=jnp.float32)
    (states, *_), (d_init, d_xs, d_params, _) = solve(GRU, operands, chunks=2, window=32)
    truth = oracle(GRU, operands)
    assert relative_error(states, truth.states) < 2e-6
    assert {a.dtype for a in d_xs} == {jnp.dtype(jnp.bfloat16)}
    assert {a.dtype for a in [*states, *d_init, *d_params]} == {jnp.dtype(jnp.float32)}
    assert relative_error(d_init, truth.d_init) < 2e-6
    assert relative_error(d_params, truth.d_params) < 2e-6
    rounding = [np.asarray(jnp.asarray(d, jnp.float32).astype(jnp.bfloat16)) for d in truth.d_xs]
    # Stored results differ from the rounded truth by at most one rounding of a near tie.
    assert relative_error(d_xs, rounding) < 2.0**-8


@pytest.mark.slow
def test_a_bfloat16_carry_rounds_every_step_as_lax_scan_does():
    cell = rounded(GRU.cell)
    operands = draw(GRU, 64, 3, 6, dtype=jnp.bfloat16)
    # Where states are rounded only starts that equal the ends count: the true rollout, unbroken.
    states, iterations, residual, _ = solve_forward(
        GRU, operands, cell=cell, max_iters=16, chunks=4, window=32
    )
    assert states[0].dtype == jnp.bfloat16
    assert np.all(iterations <= 5) and np.all(residual == 0)
    expected = scanned(cell, operands)[0].astype(jnp.float32)
    difference = np.abs(states[0].astype(jnp.float32) - expected)
    # Two programs fuse float32 differently, and what falls near a tie is then rounded apart.
    assert np.all(difference <= 2.0**-7 * np.abs(expected)) and np.mean(difference > 0) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "reverse"), [(1, True), (2, False)])
def test_what_the_budget_leaves_open_is_lax_scans_step_for_step(budget, reverse):
    # One channel, so that the counts of a sequence are those of a lane.
    operands = draw(GRU, 200, 16, 1, scale=6.0, seed=3)
    expected = scanned(GRU.cell, operands, reverse=reverse)[0]
    states, iterations, residual, completed = jax.jit(
        lambda o: forward(GRU, o, max_iters=budget, chunks=4, window=64, reverse=reverse)
    )(operands)
    assert np.all(iterations <= budget)
    if budget == 1:  # nothing passes, and everything is completed
        assert np.all(residual > TOL) and np.all(completed == 200)
        np.testing.assert_array_equal(states[0], expected)
    else:
        assert np.any(completed == 0) and np.any(completed > 0)
        # Some windows passed; scale 6 amplifies what a residual of 1e-6 leaves.
        assert relative_error(states, [expected]) < 1e-4


@pytest.mark.slow
def test_a_nan_stays_in_its_lane_from_its_step_on():
    operands = draw(GRU, 40, 2, 5)
    poisoned = operands._replace(xs=[operands.xs[0].at[17, 1, 2].set(jnp.nan), *operands.xs[1:]])
    clean, clean_pulled = solve(GRU, operands, chunks=4, window=16)
    states, pulled = solve(GRU, poisoned, chunks=4, window=16)
    lane = np.zeros((2, 5), bool)
    lane[1, 2] = True
    got, plain = np.asarray(states[0][0]), np.asarray(clean[0][0])
    np.testing.assert_array_equal(np.isnan(got), lane & (np.arange(40) >= 17)[:, None, None])
    np.testing.assert_array_equal(got[:, ~lane], plain[:, ~lane])
    # Windows of 16 steps: the second, with the NaN, and the rest of 8 are completed.
    assert list(states[3]) == [0, 24]
    # Its cotangents are not numbers wherever the chain passes step 17: at every step before it.
    for one, other in zip(pulled[1], clean_pulled[1], strict=True):
        np.testing.assert_array_equal(one[:, ~lane], other[:, ~lane])
        assert np.all(np.isnan(one[:17][:, lane]))
    for one, other in zip(
        [*pulled[0], *pulled[2]], [*clean_pulled[0], *clean_pulled[2]], strict=True
    ):
        np.testing.assert_array_equal(np.isnan(one), lane)
        np.testing.assert_array_equal(one[~lane], other[~lane])


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_products_that_overflow_where_the_recurrence_does_not_are_done_step_by_step(reverse):
    operands = draw(AFFINE, 64, 2, 3)
    # 1e6^16 overflows. Nothing reaches it: the states before it and the cotangents behind are zero.
    huge = slice(16, 32)
    a, b = (np.array(x) for x in operands.xs)
    a[huge, 1, 2] = 1e6
    b[: huge.stop, 1, 2] = b[huge.start :, 1, 2] = 0.0
    init, g = np.array(operands.init[0]), np.array(operands.cotangents[0])
    init[1, 2] = 0.0
    g[huge.start if reverse else 0 : 64 if reverse else huge.stop, 1, 2] = 0.0
    if reverse:
        g[: huge.start, 1, 2] = 0.0
    else:
        g[huge.stop :, 1, 2] = 0.0
    g[0 if not reverse else 63, 1, 2] = 1.0
    operands = operands._replace(
        init=[jnp.asarray(init)], xs=[jnp.asarray(a), jnp.asarray(b)], cotangents=[jnp.asarray(g)]
    )
    (states, _, _, completed), pulled = solve(
        AFFINE, operands, chunks=4, window=64, reverse=reverse
    )
    truth = oracle(AFFINE, operands, reverse=reverse)
    assert np.all(np.isfinite(states[0])) and np.all(np.isfinite(pulled[1][0]))
    assert relative_error(states, truth.states) < 2e-6
    assert relative_error(pulled[0], truth.d_init) < 2e-6
    assert relative_error(pulled[1], truth.d_xs) < 2e-6
    assert list(pulled[3]) == [0, 64]


@pytest.mark.parametrize("shift", range(8))
def test_an_adjoint_that_overflows_inside_a_chunk_overflows_as_in_lax_scan(shift):
    # Against time by 1e25 twice, then back: a chunk's product may hold both and overflow nowhere.
    factors = np.ones((32, 1, 1), np.float32)
    factors[[9 + shift, 8 + shift]], factors[[7 + shift, 6 + shift]] = 1e25, 1e-25
    a, zeros = jnp.asarray(factors), jnp.zeros((32, 1, 1))
    last = zeros.at[-1].set(1.0)

    def run(implementation):
        settings = {"chunks": 4, "window": 32} if implementation != "xla" else {}
        return linear_recurrence.backward(
            [a], [zeros], [zeros[0]], [zeros], [last], implementation=implementation, **settings
        )

    found, wanted = (run(name) for name in ("mosaic_tpu_interpret", "xla"))
    np.testing.assert_array_equal(found.b[0], wanted.b[0])
    np.testing.assert_array_equal(found.init[0], wanted.init[0])
    assert np.isinf(wanted.init[0])  # which is 1 in exact arithmetic


def test_two_cores_that_write_one_block_are_found_racing(capfd):
    # What the next test relies on; newer versions of JAX raise, older ones print.
    def copy(x, out):
        out[...] = x[...]

    call = pl.pallas_call(
        copy,
        grid=(2,),
        in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2),
    )
    said = ""
    try:
        jax.block_until_ready(call(jnp.ones((16, 128))))
    except Exception as error:
        said = str(error)
    assert "RACE DETECTED" in said + capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("case", [GRU, AFFINE], ids=lambda c: c.name)  # iterates; need not
def test_no_read_races_with_a_write_on_two_simulated_cores(case, capfd):
    # Two blocks of channels, one a core; two windows each.
    operands = draw(case, 4, 1, 130)
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    solved, pulled = solve(case, operands, chunks=2, window=2, interpret=interpret)
    assert_equals_float64(case, operands, solved, pulled)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.slow
def test_a_mapped_call_is_the_calls_one_by_one():
    many = [draw(AFFINE, 24, 2, 3, seed=seed) for seed in range(2)]
    one = program(AFFINE, "both", (("chunks", 2), ("window", 8)))
    mapped = jax.tree.leaves(jax.vmap(one)(jax.tree.map(lambda *a: jnp.stack(a), *many)))
    for index, operands in enumerate(many):
        for got, expected in zip(mapped, jax.tree.leaves(one(operands)), strict=True):
            # Another program: other fusions, so roundings may differ.
            np.testing.assert_allclose(got[index], expected, rtol=1e-5, atol=1e-6)


def lowered(function, *operands):
    """What a TPU's compiler would be given."""
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(function).trace(*operands).lower(lowering_platforms=("tpu",)).as_text()


def abstract(case, shape, dtype=jnp.float32):
    """Operands without values, inputs stored in `dtype` under a float32 carry."""
    states, inputs, params = case.cell[:3]
    return Operands(
        [jax.ShapeDtypeStruct(shape[1:], jnp.float32)] * states,
        [jax.ShapeDtypeStruct(shape, dtype)] * inputs,
        [jax.ShapeDtypeStruct((1, shape[2]), dtype)] * params,
        [jax.ShapeDtypeStruct(shape, jnp.float32)] * states,
    )


@pytest.mark.parametrize(
    ("case", "shape", "dtype", "how"),
    [
        (GRU, (2048, 8, 256), jnp.float32, {"chunks": 16}),
        pytest.param(LSTM, (2048, 8, 256), jnp.bfloat16, {}, marks=pytest.mark.slow),
        pytest.param(
            STRANGE, (1000, 12, 200), jnp.float32, {"chunks": 8, "reverse": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(AFFINE2, (31, 1, 5), jnp.bfloat16, {"chunks": 4}, marks=pytest.mark.slow),
    ],
    ids=lambda v: getattr(v, "name", None),
)  # fmt: skip
def test_both_kernels_lower_for_a_tpu(case, shape, dtype, how):
    how = {"interpret": False, **how}
    operands = abstract(case, shape, dtype)
    for text in (
        lowered(lambda o: forward(case, o, **how), operands),
        lowered(lambda o: backward(case, o, o.cotangents, **how), operands),
    ):
        assert text.count("stablehlo.custom_call @tpu_custom_call") == 1
        # Blocks are taken from the operands as they lie: nothing is moved around the kernel.
        assert "stablehlo.transpose" not in text and "stablehlo.pad" not in text


@pytest.mark.slow
def test_the_forward_kernel_lowers_mapped_and_inside_shard_map():
    operands = abstract(GRU, (64, 2, 128))
    more = jax.tree.map(lambda a: jax.ShapeDtypeStruct((3, *a.shape), a.dtype), operands)
    call = lambda o: forward(GRU, o, chunks=4, interpret=False)  # noqa: E731
    assert "@tpu_custom_call" in lowered(jax.vmap(call), more)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    batch, time = PartitionSpec("data"), PartitionSpec(None, "data")
    sharded = jax.shard_map(
        call,
        mesh=mesh,
        in_specs=(Operands(batch, time, PartitionSpec(), time),),
        out_specs=(time, batch, batch, batch),
    )
    text = jax.jit(sharded).trace(operands).lower(lowering_platforms=("tpu",)).as_text()
    assert "@tpu_custom_call" in text


def test_what_the_kernels_cannot_take_is_refused_while_tracing():
    operands = draw(AFFINE, 4, 1, 2)
    narrow = operands._replace(xs=[x.astype(jnp.float16) for x in operands.xs])
    with pytest.raises(NotImplementedError, match="float32 or bfloat16; got .* float16"):
        forward(AFFINE, narrow)
    with pytest.raises(NotImplementedError, match="float32 or bfloat16; got .* float16"):
        backward(AFFINE, narrow, operands.cotangents)
    with pytest.raises(ValueError, match="chunks=0; expected at least 1"):
        forward(AFFINE, operands, chunks=0)
    long = abstract(AFFINE, (20000, 8, 128))
    with pytest.raises(NotImplementedError, match="window of 20000 steps takes 469 MiB of VMEM"):
        lowered(lambda o: forward(AFFINE, o, window=20000), long)
