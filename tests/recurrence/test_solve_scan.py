"""What `solve_scan` reports, warm starts, restarts, hard rows beside mild ones, NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from tests.recurrence.kit import PARALLEL, QUICK, SOLVERS, assert_close, gru, in_float64, normal

TIME, WIDTH = 40, 3
SHOOTING = jp.shooting(chunks=5)


def draw(seed=0, time=TIME):
    rng = np.random.default_rng(seed)
    params = {"scale": np.float32(0.7), "weights": normal(rng, 3, WIDTH)}
    return params, normal(rng, WIDTH), normal(rng, time, 3, WIDTH)


@functools.cache
def compiled(solver, guessed=False):
    def run(params, init, xs, guess=None):
        return jp.solve_scan(gru(params), init, xs, solver=SOLVERS[solver], guess=guess)

    return jax.jit(run, compiler_options=QUICK)


# Warm starts --------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["shooting", "newton"])
def test_a_warm_start_saves_iterations_and_a_wrong_one_changes_no_value(solver):
    params, init, xs = draw()
    wanted = in_float64(lambda p, i, x: lax.scan(gru(p), i, x), params, init, xs)
    run = compiled(solver)
    out, cold = run(params, init, xs)
    assert_close(out, wanted)
    out, warm = run(params, init, xs, cold.starts)
    assert_close(out, wanted)
    # A guess counts by bitwise agreement alone, or is corrected and confirmed.
    assert warm.iterations <= 2 < cold.iterations
    for wrong in (jnp.full_like(cold.starts, jnp.nan), 1e30 * jnp.ones_like(cold.starts),
                  -cold.starts):  # fmt: skip
        out, info = run(params, init, xs, wrong)
        assert_close(out, wanted)
        assert info.iterations > 1


@pytest.mark.parametrize("solver", ["shooting", "newton"])
def test_a_guess_of_the_wrong_shape_is_refused(solver):
    params, init, xs = draw()
    with pytest.raises(ValueError, match=r"guess has a leaf of shape \(2, 3\).*SolveInfo.starts"):
        compiled(solver)(params, init, xs, jnp.zeros((2, WIDTH)))


# Sequences in pieces ------------------------------------------------------------------


def test_a_sequence_in_pieces_is_the_sequence():
    params, init, xs = draw()
    run = compiled("shooting")
    (end, ys), _ = run(params, init, xs)
    (middle, first), _ = run(params, init, xs[:20])
    (last, second), _ = run(params, middle, xs[20:])
    assert_close(last, np.asarray(end))
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), first, second)
    assert_close(joined, jax.tree.map(np.asarray, ys))


# Rows of a batch ----------------------------------------------------------------------


def test_what_rounding_keeps_open_is_not_walked_and_costs_no_accuracy():
    cell = jp.cells.para_lstm(16, 16, scale=1.0, time_constants=(1.0, 64.0))
    params = cell.init(jax.random.key(0))
    xs = 2 * normal(np.random.default_rng(1), 512, 2, 16)

    @functools.partial(jax.jit, static_argnames=("tol", "max_iters"), compiler_options=QUICK)
    def solved(params, xs, tol=None, max_iters=8):
        solver = jp.shooting(tol=tol, max_iters=max_iters)
        gates, start = cell.project(params, xs), cell.start(params, (2,))
        step = functools.partial(cell.step, params)
        return jp.solve_scan(step, start, gates, solver=solver), lax.scan(step, start, gates)[1]

    ((_, found), info), stepwise = solved(params, xs)
    assert info.converged and info.fallback_steps == 0
    # Whoever asks for less than rounding leaves gets it, step by step.
    ((_, strict), exact), _ = solved(params, xs, tol=4e-7)
    assert not exact.converged and exact.fallback_steps > 0
    (_, early), _ = solved(params, xs, max_iters=int(info.iterations) - 1)
    assert not early.converged
    with jax.enable_x64(True):
        double = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, xs))
        wanted = np.asarray(solved(*double)[1])
    errors = [np.abs(np.asarray(a) - wanted).max() for a in (stepwise, found, strict)]
    # Rounding itself costs lax.scan as much, in one order of its sums or another.
    assert max(errors) < 3 * errors[0] and max(errors) < 1e-6, errors


def by_row(scan):
    return jax.jit(jax.vmap(scan), compiler_options=QUICK)


def test_each_row_of_a_vmap_iterates_and_falls_back_by_itself():
    """Mild, very hard, and with a NaN: the rows do not disturb one another."""

    def step(h, inputs):
        gain, x = inputs
        h = gain * h * (1 - h) + x
        return h, 2 * h

    gain = np.array([0.8, 3.9, 0.8], np.float32)[:, None] * np.ones(TIME, np.float32)
    x = np.zeros((3, TIME), np.float32)
    x[2, 17] = np.nan
    init = np.array([0.4, 0.3, 0.2], np.float32)
    wanted = by_row(lambda i, g, x: lax.scan(step, i, (g, x)))(init, gain, x)
    for solver in (SHOOTING, jp.newton(max_iters=8), jp.jacobi(max_iters=TIME)):
        run = lambda i, g, x, s=solver: jp.solve_scan(step, i, (g, x), solver=s)  # noqa: E731
        out, info = by_row(run)(init, gain, x)
        np.testing.assert_array_equal(np.isnan(out[1]), np.isnan(wanted[1]))
        np.testing.assert_array_equal(np.isnan(out[1][2]), np.arange(TIME) >= 17)
        # These rows decay from 1 to 1e-5: 1e-6 of where they began.
        np.testing.assert_allclose(out[1][0], wanted[1][0], rtol=0, atol=1e-6)
        np.testing.assert_allclose(out[1][2], wanted[1][2], rtol=0, atol=1e-6)
        assert info.converged[0] and info.fallback_steps[0] == 0
        assert not info.converged[2] and 0 < info.fallback_steps[2] < TIME
        if not info.converged[1]:
            assert 0 < info.fallback_steps[1] < TIME
        # Jacobi's own iterations may be followed by one of Newton's, which certifies.
        assert info.iterations[0] <= info.iterations[2] + 1
        # Chaos: the trajectory is right if every step of it is.
        hs = np.concatenate([init[1:2], out[1][1] / 2])
        np.testing.assert_allclose(hs[1:], 3.9 * hs[:-1] * (1 - hs[:-1]), rtol=2e-6, atol=1e-6)


@functools.cache
def stepwise():
    return jax.jit(lambda p, i, x: lax.scan(gru(p), i, x), compiler_options=QUICK)


@pytest.mark.parametrize("solver", PARALLEL)
def test_a_nan_spreads_as_in_lax_scan(solver):
    params, init, xs = draw()
    xs = xs.copy()
    xs[23, 0, 1] = np.nan
    wanted = stepwise()(params, init, xs)
    out, info = compiled(solver)(params, init, xs)
    assert not info.converged and 0 < info.fallback_steps < TIME
    for f, w in zip(jax.tree.leaves(out), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.isnan(f), np.isnan(w))
        np.testing.assert_allclose(f, w, rtol=2e-6, atol=1e-6)
    assert np.isnan(out[0]).sum() == 1


# Restarts -----------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_restarts_cut_documents_apart(reverse):
    """Against each document solved alone, gradients to the initial state summed over them."""
    params, init, xs = draw()
    cuts = [0, 7, 8, 25, TIME]
    starts = [b - 1 for b in cuts[1:-1]] if reverse else cuts[1:-1]
    reset = np.isin(np.arange(TIME), starts)
    weights = normal(np.random.default_rng(3), TIME, WIDTH)

    def apart(params, init, xs, weights):
        rows = [
            lax.scan(gru(params), init, xs[a:b], reverse=reverse)[1]["seen"]
            for a, b in zip(cuts[:-1], cuts[1:], strict=True)
        ]
        return jnp.sum(weights * jnp.concatenate(rows))

    wanted = in_float64(jax.value_and_grad(apart, (0, 1, 2)), params, init, xs, weights)
    for name in ("shooting", "newton", "sequential"):

        def packed(params, init, xs, solver=SOLVERS[name]):
            f = jp.with_reset(gru(params), init)
            ys = jp.newton_scan(f, init, (reset, xs), reverse=reverse, solver=solver)[1]
            return jnp.sum(weights * ys["seen"])

        found = jax.jit(jax.value_and_grad(packed, (0, 1, 2)), compiler_options=QUICK)
        assert_close(found(params, init, xs), wanted)


def test_restarts_a_row():
    params, init, xs = draw()
    init, rows = np.stack([init, -init]), np.stack([xs, 2 * xs], axis=2)
    reset = np.zeros((TIME, 2), bool)
    reset[9, 0] = reset[30, 1] = True

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(params, init, rows):
        f = jp.with_reset(gru(params), init)
        scans = functools.partial(jp.newton_scan, solver=SHOOTING), lax.scan
        return [scan(f, init, (reset, rows)) for scan in scans]

    assert_close(*jax.tree.map(np.asarray, both(params, init, rows)))


def test_resets_that_are_no_flags_are_refused():
    params, init, xs = draw()
    f = jp.with_reset(gru(params), init)
    with pytest.raises(TypeError, match="reset has dtype int32; expected bool"):
        jp.newton_scan(f, init, (np.zeros(TIME, np.int32), xs), solver=SHOOTING)
    with pytest.raises(ValueError, match=r"reset has shape \(2,\) at one step.*does not begin"):
        jp.newton_scan(f, init, (np.zeros((TIME, 2), bool), xs), solver=SHOOTING)


# The choice ---------------------------------------------------------------------------


def test_explain_choice_says_what_and_why():
    params, init, xs = draw()
    for solver, name in ((SHOOTING, "shooting"), (jp.newton(), "newton"), (jp.jacobi(), "jacobi")):
        text = str(jp.explain_choice(gru(params), init, xs, solver=solver))
        assert text.startswith(name) and "Diagonal" in text and "asked for" in text
    text = str(jp.explain_choice(gru(params), init, xs))
    assert ":" in text and len(text.split(":", 1)[1]) > 10


@pytest.mark.untyped
@pytest.mark.parametrize("call", [jp.newton_scan, jp.solve_scan, jp.explain_choice])
def test_a_step_behind_the_carry_is_put_first(call):
    step, carry = lambda h, x: (jnp.sin(h + x), h), jnp.zeros(3)
    order = r"the step is float32\[3\] and init a function; expected .*\(step, init"
    with pytest.raises(TypeError, match=order):
        call(carry, step, jnp.ones((9, 3)))
    with pytest.raises(TypeError, match=order):
        jp.with_reset(carry, step)


def test_a_wrong_structure_is_caught_by_debug():
    weights = 0.3 * np.ones((WIDTH, WIDTH), np.float32)
    f = lambda h, x: (jnp.tanh(h @ weights + x), h)  # noqa: E731
    solver = jp.shooting(structure=jp.unchecked(jp.structure.Diagonal()), debug=True)
    with pytest.raises(Exception, match="(?i)structure|diagonal"):
        out = jp.newton_scan(f, jnp.ones(WIDTH), np.ones((8, WIDTH), np.float32), solver=solver)
        jax.block_until_ready(out)
        jax.effects_barrier()


# Other libraries' cells ---------------------------------------------------------------


def check_cell(f, init, xs):
    both = lambda init, xs: (  # noqa: E731
        jp.solve_scan(f, init, xs, solver=SHOOTING),
        lax.scan(f, init, xs),
    )
    (found, info), wanted = jax.jit(both, compiler_options=QUICK)(init, xs)
    assert info.iterations > 0 and info.fallback_steps == 0
    assert_close(found, jax.tree.map(np.asarray, wanted))


@pytest.mark.parametrize("name", ["GRUCell", "OptimizedLSTMCell"])
def test_flax_cells_run_unchanged(name):
    nn = pytest.importorskip("flax.linen")
    cell = getattr(nn, name)(features=4)
    xs = normal(np.random.default_rng(0), TIME, 2, 3)
    carry = cell.initialize_carry(jax.random.key(0), xs[0].shape)
    params = cell.init(jax.random.key(1), carry, xs[0])
    check_cell(lambda c, x: cell.apply(params, c, x), carry, xs)


@pytest.mark.parametrize("name", ["GRUCell", "LSTMCell"])
def test_equinox_cells_run_unchanged(name):
    eqx = pytest.importorskip("equinox")
    cell = getattr(eqx.nn, name)(3, 4, key=jax.random.key(0))
    xs = normal(np.random.default_rng(0), TIME, 3)
    zero = jnp.zeros(4)
    carry = zero if name == "GRUCell" else (zero, zero)

    def f(carry, x):
        new = cell(x, carry)
        return new, new

    check_cell(f, carry, xs)
