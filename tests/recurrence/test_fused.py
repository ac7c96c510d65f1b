"""`jp.fused`: one kernel generated from the step, or another path and the reason why.

Oracle: `lax.scan` in float64 and backpropagation through it. On a CPU the kernels run
interpreted, or as their reference in plain JAX; that they lower for the accelerators is asserted
on the program's text.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxpara as jp
from jaxpara.recurrence import rule
from jaxpara.recurrence.solve import linear_kernel
from pallas_kernels import compat, linear_recurrence, nonlinear_recurrence
from pallas_kernels.linear_recurrence import affine_cell
from pallas_kernels.linear_recurrence import reference as linear_reference
from pallas_kernels.shapes import INTERPRETED
from tests.recurrence.kit import QUICK, assert_close, in_float64

RNG = np.random.default_rng(3)


@pytest.fixture(autouse=True)
def the_same_numbers_in_whatever_order_tests_run():
    RNG.bit_generator.state = np.random.default_rng(3).bit_generator.state


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@functools.cache
def sequence(name, time=40, batch=2, hidden=3):
    """A cell, its parameters, and inputs of mixed sizes."""
    cell = getattr(jp.cells, name)(4, hidden)
    params = jax.tree.map(np.asarray, cell.init(jax.random.key(0)))
    draw = np.random.default_rng(4).standard_normal
    return cell, params, draw((time, batch, 4)).astype(np.float32)


def loss_of(cell, scan):
    def loss(params, x):
        carry, ys = jp.cells.run(cell, params, cell.start(params, x.shape[1:-1]), x, scan=scan)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves((carry, ys)))

    return jax.value_and_grad(loss, argnums=(0, 1))


def assert_trains_like_scan(name, solver, derivative, **sizes):
    cell, params, x = sequence(name, **sizes)
    scan = functools.partial(jp.newton_scan, solver=solver, derivative=derivative)
    found = jax.jit(loss_of(cell, scan), compiler_options=QUICK)(params, x)
    assert_close(found, in_float64(loss_of(cell, lax.scan), params, x), 3e-6)


# All cells, through the kernels' own bodies: test_cells_by_kernel.py.
@pytest.mark.parametrize("derivative", [None, "reverse"])
def test_a_cell_trains_as_with_lax_scan(derivative):
    assert_trains_like_scan("para_gru", jp.fused(implementation="xla"), derivative)


def strange(w):
    """Three states, and what cells seldom hold."""

    def f(carry, x):
        p, q, r = carry
        p = jnp.where(q > 0.1, jnp.tanh(w * r + x), 0.5 * p)
        q = jnp.clip(w * q + p, -0.8, 0.6)
        r = jax.nn.softplus(r - x) ** 1.5 / (2 + jnp.cos(q)) - jnp.abs(w)
        return (p, q, r), {"sum": p + q * r}

    return f


@pytest.mark.slow
def test_a_strange_cell_of_three_states_trains_as_with_lax_scan():
    def loss(scan):
        def run(w, init, x):
            (p, q, r), ys = scan(strange(w), init, x)
            return jnp.sum(jnp.sin(ys["sum"])) + jnp.sum(p * q - jnp.cos(r))

        return jax.value_and_grad(run, (0, 1, 2))

    solver = jp.fused(implementation="mosaic_tpu_interpret", chunks=4)
    scan = functools.partial(jp.newton_scan, solver=solver, derivative="reverse")
    run, exact = jax.jit(loss(scan), compiler_options=QUICK), loss(lax.scan)
    steps, batch, width = INTERPRETED[1]
    init, x = tuple(normal(3, batch, width)), normal(steps, batch, width)
    for scale in (0.3, 4.0):  # on hard weights gradients grow along the sequence, errors too
        args = scale * normal(width), init, x
        assert_close(run(*args), in_float64(exact, *args), 2e-5 if scale > 1 else 5e-6)


@pytest.mark.slow
def test_the_simulated_gpu_kernel_is_what_the_solver_runs():
    if not _simulates():
        pytest.skip("the Mosaic GPU simulator needs JAX 0.12")
    solver = jp.fused(implementation="mosaic_gpu_interpret")
    assert_trains_like_scan("para_gru", solver, "reverse", time=12, batch=1)


def _simulates():
    try:
        nonlinear_recurrence._simulator()
    except NotImplementedError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("derivative", [None, "reverse"])
def test_a_batch_may_be_sharded_over_devices(derivative):
    cell, params, x = sequence("para_gru")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))

    def mean(scan):
        def local(params, x):
            start = lax.pcast(cell.start(params, x.shape[1:-1]), "data", to="varying")
            ys = jp.cells.run(cell, params, start, x, scan=scan)[1]
            return lax.psum(jnp.sum(jnp.sin(ys)), "data")

        specs = {"in_specs": (P(), P(None, "data")), "out_specs": P()}
        return jax.jit(jax.value_and_grad(jax.shard_map(local, mesh=mesh, **specs)))

    solver = jp.fused(implementation="xla")
    scan = functools.partial(jp.newton_scan, solver=solver, derivative=derivative)
    wanted = jax.tree.map(np.asarray, mean(lax.scan)(params, x))
    assert_close(mean(scan)(params, x), wanted, 3e-6)


@pytest.mark.slow
def test_a_narrow_carry_and_narrow_gates_train_within_their_rounding():
    gates = [jnp.asarray(normal(30, 2, 3), jnp.bfloat16) for _ in range(2)]

    def loss(scan, dtype):
        def run(w, gates):
            def step(h, x):
                z = jax.nn.sigmoid(x[0].astype(h.dtype) + w * h)
                h = h + z * (jnp.tanh(x[1].astype(h.dtype) - w * h) - h)
                return h, h

            h, ys = scan(step, jnp.zeros((2, 3), dtype), gates)
            return jnp.sum(jnp.sin(ys.astype(jnp.float32))) + jnp.sum(h.astype(jnp.float32))

        return jax.jit(jax.value_and_grad(run, (0, 1)), compiler_options=QUICK)

    solver = jp.fused(implementation="xla")
    scan = functools.partial(jp.newton_scan, solver=solver, derivative="reverse")
    weights = jnp.asarray([0.5, -0.3, 0.2])
    wanted = loss(lax.scan, jnp.float32)(weights, [g.astype(jnp.float32) for g in gates])
    # Storage in bfloat16, a float32 carry: only the gates' gradients are rounded on their way out.
    found = loss(scan, jnp.float32)(weights, gates)
    assert_close((found[0], found[1][0]), (np.asarray(wanted[0]), np.asarray(wanted[1][0])), 3e-6)
    assert all(g.dtype == jnp.bfloat16 for g in found[1][1])
    assert_close(found[1][1], jax.tree.map(np.asarray, wanted[1][1]), 2**-8)
    # A bfloat16 carry is rounded 30 times, to 2**-9 each.
    found = loss(scan, jnp.bfloat16)(weights.astype(jnp.bfloat16), gates)
    assert_close(found, jax.tree.map(np.asarray, wanted), 0.1)


@pytest.mark.slow
def test_a_reversed_scan_copies_nothing_to_turn_it_around():
    cell, params, x = sequence("para_gru")

    def program(solver):
        scan = functools.partial(jp.newton_scan, reverse=True, solver=solver)
        run = functools.partial(jp.cells.run, cell, scan=scan)
        args = params, cell.start(params, (2,)), x
        return jax.jit(run).lower(*args).compile().as_text()

    assert "reverse(" in program(jp.shooting())
    assert "reverse(" not in program(jp.fused(implementation="xla"))


def test_the_diagnostics_are_those_of_the_kernel():
    cell, params, x = sequence("para_gru")

    def run(params, x):
        f = functools.partial(cell.step, params)
        solver = jp.fused(implementation="mosaic_tpu_interpret", chunks=4)
        start = cell.start(params, (2,))
        return jp.solve_scan(f, start, cell.project(params, x), solver=solver)[1]

    info = jax.jit(run)(params, x)
    assert info.converged and info.fallback_steps == 0
    assert info.iterations >= 1 and info.residual < 1e-5
    assert info.starts.shape == (1, 2, 3)


def test_steps_without_a_kernel_use_shooting_and_log_once(caplog):
    linear_kernel.say.cache_clear()
    matrix = normal(3, 3) / 3

    def f(h, x):
        h = jnp.tanh(h @ matrix + x)
        return h, h

    init, xs = normal(2, 3), normal(64, 2, 3)
    with caplog.at_level(logging.WARNING, "jaxpara"):
        for _ in range(2):
            solver = jp.fused(implementation="xla")
            out, info = jp.solve_scan(lambda h, x: f(h, x), init, xs, solver=solver)
    assert_close(out, jax.tree.map(np.asarray, lax.scan(f, init, xs)))
    assert info.iterations > 0 and info.starts.shape[0] > 1
    (record,) = [r for r in caplog.records if linear_kernel.OFF in r.message]
    assert "dot_general" in record.message and "test_fused.py" in record.message


def test_old_jax_on_a_gpu_takes_the_xla_path(caplog, monkeypatch):
    linear_kernel.say.cache_clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(compat, "version", lambda: (0, 10))
    f, init, xs = lambda h, x: (jnp.sin(h + x), h), np.float32(0), normal(9)
    wanted = jax.tree.map(np.asarray, lax.scan(f, init, xs))
    with caplog.at_level(logging.WARNING, "jaxpara"):
        assert_close(jp.newton_scan(f, init, xs, solver=jp.fused()), wanted)
    assert any("needs JAX >= 0.11" in r.message for r in caplog.records)
    for solver in (jp.auto(), jp.fused()):  # not a kernel that would be refused
        choice = jp.explain_choice(f, init, xs, solver=solver)
        assert choice.solver != rule.PATHS["fused"] and "needs JAX >= 0.11" in str(choice)


@pytest.mark.slow
def test_a_platform_without_kernels_says_so(caplog):
    linear_kernel.say.cache_clear()
    with caplog.at_level(logging.WARNING, "jaxpara"):
        jp.newton_scan(lambda h, x: (jnp.sin(h + x), h), 0.0, normal(9), solver=jp.fused())
    assert any(r.message.endswith("none for the platform 'cpu'") for r in caplog.records)


def test_auto_takes_a_kernel_on_an_accelerator_and_explains_when_it_cannot():
    cell, params, x = sequence("para_lstm")
    step, gates = functools.partial(cell.step, params), cell.project(params, x)
    choice = jp.explain_choice(
        step, cell.start(params, (2,)), gates, solver=jp.auto(platform="gpu")
    )
    assert choice.solver == rule.PATHS["fused"] and "kernel" in str(choice)
    decoding = rule.pick("gpu", steps=1, elements=64, block=1, kernel=True)[0]
    assert decoding == rule.PATHS["implicit"]
    dense = lambda h, x: (jnp.tanh(h @ jnp.ones((4, 4)) + x), h)  # noqa: E731
    choice = jp.explain_choice(dense, jnp.ones(4), jnp.ones((9, 4)), solver=jp.auto(platform="tpu"))
    assert choice.solver != rule.PATHS["fused"]
    assert "no kernel" in str(choice) and "dot_general" in str(choice)


def test_a_measured_map_decides_between_kernel_and_other_paths(monkeypatch):
    speedup = {"shooting": 2.0, "fused": 9.0}
    point = {"block": 1, "steps": 64, "elements": 8, "inputs": 1, "speedup": speedup}
    measured = {"device": "a test", "jax": "0.0", "points": [point]}
    monkeypatch.setattr(rule, "_map", lambda platform: measured)
    sizes = {"steps": 64, "elements": 8, "block": 1}
    assert rule.pick("gpu", kernel=True, **sizes)[0] == rule.PATHS["fused"]
    assert rule.pick("gpu", kernel=False, **sizes)[0] == rule.PATHS["shooting"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "wide"),
    [
        ("tpu", False),
        pytest.param("cuda", False, marks=pytest.mark.slow),
        pytest.param("tpu", True, marks=pytest.mark.slow),
    ],
)
def test_training_without_being_asked_lowers_to_the_kernels_of_the_platform(
    platform, wide, monkeypatch
):
    if platform == "cuda" and jax.__version_info__ < (0, 11):
        pytest.skip("Mosaic GPU kernels need JAX 0.11")
    backend = {"tpu": "tpu", "cuda": "gpu"}[platform]
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    cell, params, x = sequence("para_gru", 512, 2, 40)
    scan = functools.partial(jp.newton_scan, derivative="reverse")
    jax.clear_caches()
    with jax.enable_x64(wide):  # kernels count in 32 bits all the same
        traced = jax.jit(loss_of(cell, scan)).trace(params, x)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    jax.clear_caches()  # nothing that was traced for another platform stays
    call = {"tpu": "@tpu_custom_call", "cuda": "@mosaic_gpu"}[platform]
    assert text.count(call) >= 2, "a forward and a backward kernel"


# Linear recurrences.


def systems(size, time=30, batch=2, width=3):
    a = [0.6 * normal(time, batch, width) for _ in range(size * size)]
    b = [normal(time, batch, width) for _ in range(size)]
    return a, b, [normal(batch, width) for _ in range(size)]


@pytest.mark.parametrize(
    ("size", "reverse"),
    [(1, False), (2, True), pytest.param(4, False, marks=pytest.mark.slow)],
)
def test_the_linear_op_and_its_gradients_are_those_of_a_scan_over_matrix_products(size, reverse):
    a, b, init = systems(size)
    cotangents = [normal(*leaf.shape) for leaf in b]

    def run(a, b, init):
        return linear_recurrence.forward(a, b, init, reverse=reverse, implementation="xla")

    def plain(a, b, init, cotangents):
        call = functools.partial(linear_reference.forward, reverse=reverse)
        states, pull = jax.vjp(call, a, b, init)
        return states, pull(cotangents)

    wanted = in_float64(plain, a, b, init, cotangents)
    states = run(a, b, init)
    found = linear_recurrence.backward(
        a, b, init, states, cotangents, reverse=reverse, implementation="xla"
    )
    assert_close((states, tuple(found)), (wanted[0], tuple(wanted[1])), 2e-6)


@pytest.mark.slow
def test_a_linear_recurrence_by_kernel_is_differentiable_and_is_the_same(monkeypatch):
    monkeypatch.setattr(linear_kernel, "KERNELS", ("xla",))
    a, b, init = 0.5 * normal(25, 3, 2, 2), normal(25, 3, 2), normal(3, 2)

    def loss(implementation):
        def run(a, b, init):
            call = functools.partial(jp.linear_recurrence, implementation=implementation)
            diagonal = call(a[..., 0], b, init, reverse=True)
            return jnp.sum(jnp.sin(call(a, b, init))) + jnp.sum(jnp.cos(diagonal))

        return jax.value_and_grad(run, (0, 1, 2))

    found = jax.jit(loss("kernel"), compiler_options=QUICK)(a, b, init)
    assert_close(found, in_float64(loss("sequential"), a, b, init), 3e-6)


@pytest.mark.slow
def test_blocks_that_kernels_do_not_take_are_chunked_and_the_reason_is_logged(caplog):
    linear_kernel.say.cache_clear()
    a, b = 0.1 * normal(12, 5, 5), normal(12, 5)
    with caplog.at_level(logging.WARNING, "jaxpara"):
        found = jp.linear_recurrence(a, b, implementation="kernel")
    assert_close(found, np.asarray(jp.linear_recurrence(a, b, implementation="sequential")))
    assert any("blocks of 5" in r.message for r in caplog.records)


@pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("mosaic_tpu_interpret", marks=pytest.mark.slow)]
)
def test_vmap_of_the_op_makes_one_call_with_more_rows(implementation):
    a, b, init = systems(1)
    options = {"tol": 1e-6, "affine": True, "implementation": implementation}

    def run(init, a, b):
        return nonlinear_recurrence.forward(affine_cell(1), [init], [a, b], [], **options)

    mapped = jax.vmap(jax.vmap(run, (0, None, None)), (None, 0, 0))
    inits, scales = np.stack([init[0], -init[0], 2 * init[0]]), np.asarray([1.0, 0.5], np.float32)
    found = mapped(inits, scales[:, None, None, None] * a[0], scales[:, None, None, None] * b[0])
    assert found.states[0].shape == (2, 3, *b[0].shape) and found.iterations.shape == (2, 3, 2)
    for i, scale in enumerate(scales):
        for j in range(3):
            alone = run(inits[j], scale * a[0], scale * b[0])
            np.testing.assert_allclose(found.states[0][i, j], alone.states[0], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", ["mosaic_tpu_interpret", "mosaic_gpu_interpret", "xla"])
def test_an_empty_batch_is_solved_and_has_empty_gradients(implementation):
    solver = jp.fused(implementation=implementation)

    def loss(scan, p, x):
        def step(h, x):
            h = jnp.tanh(p * h + x)
            return h, h

        return jnp.sum(scan(step, jnp.zeros(x.shape[1:]), x)[1])

    ours = functools.partial(jp.newton_scan, solver=solver, derivative="reverse")
    x = jnp.zeros((20, 0, 3))
    found = jax.grad(functools.partial(loss, ours), argnums=(0, 1))(jnp.ones(3), x)
    expected = jax.grad(functools.partial(loss, lax.scan), argnums=(0, 1))(jnp.ones(3), x)
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1].shape == x.shape
    no_lanes = jax.vmap(jax.grad(functools.partial(loss, ours), argnums=1), (None, 0))
    assert no_lanes(jnp.ones(3), jnp.zeros((0, 20, 3))).shape == (0, 20, 3)


@pytest.mark.untyped
def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="window=0"):
        jp.fused(window=0)
    with pytest.raises(ValueError, match="implementation is 'triton'; expected one of mosaic_gpu"):
        jp.fused(implementation="triton")
    with pytest.raises(ValueError, match="a has 3 arrays, b 2 and init 2"):
        linear_recurrence.forward([1] * 3, [1] * 2, [1] * 2)
    with pytest.raises(ValueError, match="expected 1 to 4"):
        affine_cell(5)
