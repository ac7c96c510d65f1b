"""`newton_scan` keeps `lax.scan`'s contract, whatever the step and the carry are."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from jaxpara.recurrence import choice
from tests.recurrence.scan_checks import (
    H0,
    SHOOTING,
    SOLVERS,
    XS,
    assert_is_lax_scan,
    assert_runs_agree,
    assert_same,
    by_both,
    ours,
    quick,
    step,
    values_and_gradients,
)

# Structure ----------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("length", [0, 1, 5])
def test_no_inputs_at_any_length(solver, length):
    assert_is_lax_scan(
        lambda h, _: (jnp.cos(h), h), jnp.ones(2), None, length, solver=SOLVERS[solver]
    )


@pytest.mark.parametrize("length", [0, 1])
def test_no_steps_and_one_step(length):
    for reverse in (False, True):
        assert_is_lax_scan(step, H0, XS[:length], reverse=reverse)


def outputs_none(h, x):
    return step(h, x)[0], None


def outputs_duplicated(h, x):
    h, y = step(h, x)
    return h, {"a": (h, h), "b": [y, y, None], "c": x, "d": 3}


def outputs_not_floating(h, x):
    h, _ = step(h, x)
    return h, (h > 0, jnp.argmax(h), jnp.uint8(7), h.astype(jnp.int8), jnp.any(x > 0))


def outputs_of_the_state_before(h, x):
    return step(h, x)[0], h


@pytest.mark.parametrize(
    "f", [outputs_none, outputs_duplicated, outputs_not_floating, outputs_of_the_state_before]
)
def test_outputs_may_be_anything(f):
    assert_is_lax_scan(f, H0, XS)
    assert_is_lax_scan(f, H0, XS, reverse=True, solver=jp.newton())
    assert jp.explain_choice(f, H0, XS, solver=SHOOTING).solver is not None


def carry_unused(carry, x):
    a, b = carry
    return (jnp.tanh(a + x), jnp.ones_like(b)), a


def carry_passed_through(carry, x):
    a, b = carry
    return (jnp.tanh(b * a + x), b), b


def carry_swapped(carry, x):
    a, b = carry
    return (jnp.tanh(b + x), 0.5 * a), a


def carry_ignored(carry, x):
    return (x, 2 * x), None


def inputs_ignored(carry, x):
    a, b = carry
    return (jnp.cos(a), jnp.sin(b * a)), a


def becomes_the_input(carry, x):
    a, b = carry
    return (x, a), b


@pytest.mark.parametrize(
    "f",
    [carry_unused, carry_passed_through, carry_swapped, carry_ignored, inputs_ignored,
     becomes_the_input],
)  # fmt: skip
def test_carries_may_do_anything(f):
    init = (H0, 2 * H0)
    for solver in (SHOOTING, jp.newton()):
        assert jp.explain_choice(f, init, XS, solver=solver).solver is not None
    assert_runs_agree(functools.partial(values_and_gradients, f), init, XS)
    assert_is_lax_scan(f, init, XS, solver=jp.newton())


@pytest.mark.parametrize(
    "part",
    [
        lambda h: lax.betainc(jnp.abs(h) + 1, jnp.ones_like(h), jnp.full_like(h, 0.3)),
        lambda h: lax.polygamma(jnp.abs(h) + 1, jnp.full_like(h, 0.7)),
    ],
    ids=["betainc", "polygamma"],
)
def test_a_step_without_a_derivative_runs_as_in_lax_scan(part):
    step = lambda h, x: (0.5 * part(h) + x, h)  # noqa: E731
    h, xs = jnp.linspace(0.1, 1, 3), jnp.ones((5, 3))
    with pytest.raises(ValueError, match="respect to|not supported"):
        jax.jvp(part, (h,), (h,))
    for solver in (None, SHOOTING, jp.sequential()):
        assert_is_lax_scan(step, h, xs, solver=solver)
        choice = jp.explain_choice(step, h, xs, solver=solver)
        assert choice.solver is None and "the step has no derivative: " in choice.reason


def test_what_a_step_hands_through_may_be_of_any_type():
    def f(carry, x):
        gain, count, h, key = carry
        return (gain, count, jnp.tanh(gain * h + x[0]), key), (x[1], h, x[0], x[2])

    init = (jnp.asarray(0.5), np.int32(3), H0, jax.random.key(0))
    xs = (XS, np.arange(7), jax.random.split(jax.random.key(1), 7))
    assert_is_lax_scan(f, init, xs, reverse=True)
    found, info = jp.solve_scan(f, init, xs, solver=SHOOTING)
    assert info.iterations > 0 and info.fallback_steps == 0
    wanted = lax.scan(f, init, xs)
    assert_same(found, wanted)
    for g, w in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert isinstance(g, jax.Array) and jax.typeof(g) == jax.typeof(w)
    _, again = jp.solve_scan(f, init, xs, solver=SHOOTING, guess=info.starts)
    assert again.iterations < info.iterations


def test_a_scan_that_is_not_recognised_is_reported(monkeypatch, caplog):
    scan = lax.scan
    monkeypatch.setattr(lax, "scan", lambda *args: jax.tree.map(lambda v: 1 * v, scan(*args)))
    choice.say.cache_clear()
    assert_same(ours(step, H0, XS), scan(step, H0, XS))
    assert "scan equations whose outputs are not its results" in caplog.text


# Carries that are not just floats -----------------------------------------------------


def test_integer_and_key_carries_run_ahead_and_stay_exact():
    def f(carry, x):
        h, count, key = carry
        key, now = jax.random.split(key)
        h = jnp.tanh(0.5 * h + x + 0.1 * jax.random.normal(now, h.shape) + 0.01 * count)
        return (h, count + 1, key), (h, count, now, jax.random.uniform(now))

    init = (H0, jnp.int32(3), jax.random.key(0))
    assert_is_lax_scan(f, init, XS, reverse=True)

    def run(scan):
        def loss(h, xs):
            out = scan(f, (h, *init[1:]), xs)
            # Beside its results `solve_scan` returns what it did.
            (carry, ys), info = out if scan is solve else (out, None)
            return jnp.sum(ys[0] ** 2), ((carry, ys), info)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)

    solve = functools.partial(jp.solve_scan, solver=SHOOTING)
    ((_, (found, info)), slopes), ((_, (wanted, _)), exact) = by_both(run, solve)(H0, XS)
    assert info.iterations > 0 and info.fallback_steps == 0
    assert_same((found, slopes), (wanted, exact))


def test_integers_that_depend_on_floats_run_sequentially():
    def f(carry, x):
        h, crossings = carry
        new = jnp.tanh(0.9 * h + x)
        return (new, crossings + jnp.sum(new * h < 0)), crossings

    assert_is_lax_scan(f, (H0, 0), XS)
    assert "depends on the floating part" in str(jp.explain_choice(f, (H0, 0), XS, solver=SHOOTING))


def test_complex_carries_run_sequentially():
    assert_is_lax_scan(lambda h, x: (h * (0.3 + 0.4j) + x, h), H0 * (1 + 2j), XS)
    choice = jp.explain_choice(lambda h, x: (h * 1j, h), H0 * (1 + 2j), XS, solver=SHOOTING)
    assert "complex" in str(choice)


def test_only_integers_in_the_carry():
    assert_is_lax_scan(lambda n, x: (n + 1, n * x), 0, XS)


def test_scalars_and_weak_types():
    assert_is_lax_scan(lambda h, x: (0.5 * h + x, h), 0.0, XS[:, 0])
    assert_is_lax_scan(lambda h, x: (jnp.tanh(h + x), 1.0), jnp.float32(1.0), XS[:, 0])
    assert_is_lax_scan(lambda h, x: (h * x, (2.0, 1, h)), 1, XS[:, 0])
    half = lambda scan: lambda h: scan(lambda h, x: (0.5 * h, h), h, None, 4)  # noqa: E731
    for solver in (jp.shooting(), jp.newton(), jp.sequential()):
        found, wanted = by_both(half, functools.partial(ours, solver=solver))(1.0)
        assert_same(found, wanted)
        weak = [leaf.weak_type for leaf in jax.tree.leaves(found)]
        assert weak == [leaf.weak_type for leaf in jax.tree.leaves(wanted)] == [True, True]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_small_floats_keep_their_dtype(dtype):
    # One ulp of the carry is the resolution at which two programs can agree.
    assert_is_lax_scan(
        step, jnp.asarray(H0, dtype), jnp.asarray(XS, dtype), tol=2 * float(jnp.finfo(dtype).eps)
    )
    assert_is_lax_scan(
        lambda h, x: (jnp.tanh(h + x).astype(dtype), (h * x).astype(jnp.float32)),
        jnp.asarray(H0, dtype),
        XS,
        tol=2 * float(jnp.finfo(dtype).eps),
    )


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2fnuz])
@pytest.mark.parametrize("solver", [SHOOTING, jp.newton()])
def test_eight_bits_are_enough_for_a_carry(dtype, solver):
    # JAX promotes no such type by itself, and rounds each step: the bits are `lax.scan`'s.
    f = lambda h, x: ((0.5 * h.astype(jnp.float32) + x).astype(dtype), h)  # noqa: E731
    init = jnp.asarray(H0, dtype)
    found, wanted = ours(f, init, XS, solver=solver), lax.scan(f, init, XS)
    for g, w in zip(found, wanted, strict=True):
        assert g.dtype == w.dtype == dtype
        np.testing.assert_array_equal(g.astype(jnp.float32), w.astype(jnp.float32))


def test_float64():
    with jax.enable_x64(True):
        solve = functools.partial(jp.solve_scan, solver=SHOOTING)
        both = by_both(lambda scan: functools.partial(scan, step), solve)
        (found, info), wanted = both(H0.astype(np.float64), XS.astype(np.float64))
        assert wanted[0].dtype == np.float64
        assert_same(found, wanted, 1e-14)
        assert info.iterations > 0 and info.fallback_steps == 0


@quick
def scaled(scale):
    f = lambda h, x: (scale * jnp.tanh(0.8 * h / scale + x), h / scale)  # noqa: E731
    return jp.solve_scan(f, scale * H0, XS, solver=SHOOTING), lax.scan(f, scale * H0, XS)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_states_of_any_size(scale):
    (found, info), wanted = scaled(np.float32(scale))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        # What may be left of a correction: 80 units, which are 1e-5.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.max(np.abs(b)))
    assert info.iterations > 0 and info.fallback_steps == 0


def test_empty_batches():
    assert_is_lax_scan(step, jnp.zeros((0, 2)), jnp.zeros((5, 0, 2)))
    out = jax.grad(lambda h: jnp.sum(ours(step, h, jnp.zeros((5, 0, 2)))[0]))(jnp.zeros((0, 2)))
    assert out.shape == (0, 2)
    # The structure of an empty carry is that of a full one, through reshapes too.
    for batch in (0, 3):
        f = lambda h, x: (jnp.tanh(h.reshape(-1) + x).reshape(h.shape), h)  # noqa: E731
        found = jp.jacobian_structure(f, jnp.zeros((batch, 2)), jnp.zeros(2 * batch))
        assert isinstance(found, jp.structure.Diagonal), found
    merged = lambda h, x: (jnp.tanh(h + x), h.reshape(-1, 4))  # noqa: E731
    assert_is_lax_scan(merged, jnp.zeros((0, 2)), jnp.zeros((5, 0, 2)))


@pytest.mark.parametrize("chunks", [1, 2, 5, 7, 50])
def test_any_number_of_chunks(chunks):
    assert_is_lax_scan(step, H0, XS, solver=jp.shooting(chunks=chunks))


def test_linear_counters_and_exploding_linear_cells():
    assert_is_lax_scan(lambda h, x: (h + 1.0, h), jnp.zeros(2), XS)
    xs = np.tile(XS, (4, 1))

    def run(scan):
        def loss(gain, h):
            carry, ys = scan(lambda h, x: (gain * h + x, h), h, xs)
            return jnp.sum(carry), ys

        return jax.value_and_grad(loss, (0, 1), has_aux=True)

    both = by_both(run)
    for gain in (3.0, -5.0):
        found, wanted = both(gain, H0)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def spiked(h, inputs):
    spike, x = inputs
    h = jnp.tanh(0.9 * h + x) + spike
    return h, h


@functools.cache
def spiked_by_both(solver):
    run = lambda scan: functools.partial(scan, spiked)  # noqa: E731
    return by_both(run, functools.partial(ours, solver=SOLVERS[solver]))


@pytest.mark.parametrize("solver", ["shooting", "newton"])
@pytest.mark.parametrize("size", [1e4, 1e8])
def test_a_large_state_does_not_excuse_errors_in_the_small_ones_after_it(solver, size):
    rng = np.random.default_rng(0)
    spikes = np.zeros((64, 1), np.float32)
    spikes[29] = size
    xs = (spikes, rng.standard_normal((64, 2)).astype(np.float32))
    assert_same(*spiked_by_both(solver)(np.float32([size, -size]), xs))


# Errors -------------------------------------------------------------------------------


@pytest.mark.untyped
@pytest.mark.parametrize(
    "call",
    [
        lambda scan: scan(lambda h, x: (h[:1], x), H0, XS),
        lambda scan: scan(lambda h, x: ((h, h), x), H0, XS),
        lambda scan: scan(lambda h, x: (h.astype(jnp.float16), x), H0, XS),
        lambda scan: scan(lambda h, x: h, H0, XS),
        lambda scan: scan(step, H0),
        lambda scan: scan(step, H0, (XS, XS[:3])),
        lambda scan: scan(step, H0, XS, length=3),
        lambda scan: scan(step, H0, 1.0),
        lambda scan: scan(step, H0, (XS, 1)),
        lambda scan: scan("no function", H0, XS),
    ],
)
def test_errors_are_those_of_lax_scan(call):
    with pytest.raises((TypeError, ValueError)) as theirs:
        call(lax.scan)
    with pytest.raises(theirs.type, match=re.escape(str(theirs.value).splitlines()[0])):
        call(ours)


@pytest.mark.untyped
def test_solvers_and_derivatives_that_do_not_exist():
    with pytest.raises(TypeError, match=r"expected jp.shooting\(\).*mind the call"):
        jp.newton_scan(step, H0, XS, solver=jp.shooting)
    with pytest.raises(ValueError, match="derivative is 'revers'; expected None"):
        jp.newton_scan(step, H0, XS, derivative="revers")
    with pytest.raises(ValueError, match="chunks=0: give a whole number, at least 1"):
        jp.shooting(chunks=0)
    with pytest.raises(ValueError, match="tol is -1.0; expected a positive number"):
        jp.newton(tol=-1.0)
    with pytest.raises(ValueError, match="linear is 'fast'; expected None or one of sequential"):
        jp.newton(linear="fast")
    with pytest.raises(ValueError, match="linear is 0; expected None or one of sequential"):
        jp.newton(linear=0)  # type: ignore
    with pytest.raises(ValueError, match="max_iters=None: give a whole number"):
        jp.shooting(max_iters=None)  # type: ignore
    with pytest.raises(ValueError, match="platform is 'gpuu'; expected one of 'cpu', 'gpu', 'tpu'"):
        jp.auto(platform="gpuu")


@pytest.mark.untyped
def test_an_axis_that_no_shard_map_binds_is_named():
    for solver in (jp.shooting(axis="time"), jp.newton(axis="time"), jp.jacobi(axis="time")):
        with pytest.raises(ValueError, match="axis is 'time', and this call is not inside"):
            jp.newton_scan(step, H0, XS, solver=solver)
    with pytest.raises(ValueError, match="axis is 'time', and this call is not inside"):
        jp.linear_recurrence(jnp.ones(4), jnp.ones(4), axis="time")
    with pytest.raises(TypeError, match="axis is 0; expected the name of a mesh axis"):
        jp.shooting(axis=0)  # type: ignore


@pytest.mark.untyped
def test_a_solver_in_the_place_of_another_argument_is_named():
    step = lambda h, x: (jnp.tanh(h + x), h)  # noqa: E731
    call = functools.partial(jp.newton_scan, step, jnp.ones(3), jnp.ones((4, 3)))
    for given in (jp.shooting(chunks=2), jp.auto()):
        with pytest.raises(TypeError, match="length got .*: write solver= before"):
            call(given)
    with pytest.raises(
        TypeError, match="unroll got Solver.newton: tol=0.1, max_iters=16.*write solver="
    ):
        call(unroll=jp.newton(tol=0.1))
    with pytest.raises(TypeError, match="reverse got shooting .function.: write solver="):
        call(None, jp.shooting)
    with pytest.raises(TypeError, match="unchecked got .*Diagonal'>; expected a structure"):
        jp.unchecked(jp.structure.Diagonal)
