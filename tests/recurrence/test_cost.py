"""What a solver takes is estimated first: too dear a one gives way to the sequential path."""

import logging
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from jaxpara import linen
from jaxpara.recurrence import choice
from jaxpara.recurrence.solve import cost
from jaxpara.recurrence.solve.linear_recurrences import MATERIALISED
from tests.recurrence.kit import QUICK, assert_close

PARALLEL = {
    "shooting": jp.shooting,
    "newton": jp.newton,
    "quasi_newton": jp.quasi_newton,
    "fused": jp.fused,
}


def dense(width, time, batch=1):
    keys = jax.random.split(jax.random.key(0), 3)
    weights = jax.random.normal(keys[0], (width, width)) / (2 * width**0.5)
    init = 0.1 * jax.random.normal(keys[1], (batch, width))
    return weights, init, jax.random.normal(keys[2], (time, batch, width))


def step(weights):
    def f(h, x):
        h = jnp.tanh(h @ weights + x)
        return h, h

    return f


def work(f, init, x):
    """Of `f(carry, x)`, the carry first."""
    closed = jax.make_jaxpr(f)(init, x)
    return cost.count(closed, [True] + [False] * (len(closed.jaxpr.invars) - 1))


def test_operations_are_counted_and_those_apart_from_the_carry_kept_apart():
    w, h, x = jnp.ones((6, 6)), jnp.ones((3, 6)), jnp.ones((3, 6))
    found = work(lambda h, x: jnp.tanh(h @ w + x), h, x)
    product, rest = 2 * 3 * 6 * 6, 2 * 3 * 6  # one sum, one tanh
    assert found == cost.Work(product + rest, product + rest, 18)
    apart = work(lambda h, x: jnp.tanh(h + x @ w), h, x)
    assert apart == cost.Work(product + rest, rest, 18)


def test_operations_inside_of_a_jit_a_scan_a_cond_and_a_convolution_are_counted():
    w, h = jnp.ones((6, 6)), jnp.ones((3, 6))
    once = work(lambda h, x: h @ w, h, h).whole
    assert work(lambda h, x: jax.jit(lambda h: h @ w)(h), h, h).whole == once
    five = work(lambda h, x: lax.scan(lambda h, _: (h @ w, None), h, None, 5)[0], h, h)
    assert five.whole == five.moved == 5 * once
    dearest = work(lambda h, x: lax.cond(x[0, 0] > 0, lambda: h @ w, lambda: h + 1), h, h)
    assert once <= dearest.whole <= once + 18
    image, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5))

    def convolution(h, x):
        return lax.conv_general_dilated(
            h, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert work(convolution, image, image).whole == 2 * (4 * 4 * 5) * (3 * 3 * 2)


@pytest.mark.parametrize("name", list(PARALLEL))
def test_a_dense_cell_of_256_units_is_the_very_program_of_lax_scan(name):
    weights, init, xs = dense(256, 1024)
    solver = PARALLEL[name]()
    chosen = jp.explain_choice(step(weights), init, xs, solver=solver)
    assert chosen.solver is None and chosen.refused
    assert f"{name} was asked for" in str(chosen) and "limit=math.inf" in str(chosen)

    def program(scan):
        closed = jax.make_jaxpr(lambda w, h, x: scan(step(w), h, x))(weights, init, xs)
        # But for `SolveInfo.starts`, which nobody reads.
        return [str(e) for e in closed.jaxpr.eqns if e.primitive.name != "broadcast_in_dim"]

    def ours(f, init, xs):
        return jp.newton_scan(f, init, xs, solver=solver, derivative="reverse")

    assert program(ours) == program(lax.scan)
    # The negative control: without a limit the solver is there.
    forced = PARALLEL[name](limit=math.inf)
    assert program(lambda *a: jp.newton_scan(*a, solver=forced)) != program(lax.scan)
    assert "limit" not in jp.explain_choice(step(weights), init, xs, solver=forced).reason


@pytest.mark.parametrize("solver", [jp.shooting(), jp.newton(), jp.quasi_newton()])
def test_a_small_block_runs_what_was_asked_for_at_any_length(solver):
    for width, time in ((8, 10**6), (4, 10**8), (64, 8), (16, 64)):
        weights = jnp.zeros((width, width))
        shape = jax.ShapeDtypeStruct((time, 1, width), jnp.float32)
        found = jp.explain_choice(step(weights), jnp.zeros((1, width)), shape, solver=solver)
        assert found.solver is not None and found.solver.solve is solver.solve
        assert not found.refused and found.reason == "asked for"


def test_values_gradients_and_diagnostics_of_a_refused_solver():
    weights, init, xs = dense(96, 300)
    gradient_of = jax.random.normal(jax.random.key(3), xs.shape)

    def loss(scan):
        def run(weights, init, xs):
            (_, ys), info = scan(step(weights), init, xs)
            return jnp.sum(gradient_of * ys), info

        both = jax.value_and_grad(run, (0, 1, 2), has_aux=True)
        return jax.jit(both, compiler_options=QUICK)

    def ours(f, init, xs):
        return jp.solve_scan(f, init, xs, solver=jp.shooting())

    (value, info), grads = loss(ours)(weights, init, xs)
    (wanted, _), exact = loss(lambda *a: (lax.scan(*a), ()))(weights, init, xs)
    assert info.converged and info.iterations == 0 and info.fallback_steps == 0
    # One number, a sum over 300 steps of both signs, taken in another order: what cancels in it
    # leaves the rounding of its terms, ten times the bound of its size.
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert_close(grads, exact, 2e-5)  # sums over 300 steps in another order


@pytest.mark.untyped
def test_a_limit_is_obeyed_either_way():
    weights, init, xs = dense(64, 1024)

    def chosen(limit):
        return jp.explain_choice(step(weights), init, xs, solver=jp.shooting(limit=limit))

    assert chosen(None).refused and chosen(4.0).refused and not chosen(1e6).refused
    assert not chosen(math.inf).refused
    with pytest.raises(ValueError, match="limit is -1; expected how many times"):
        jp.newton(limit=-1)
    with pytest.raises(ValueError, match="limit is '4'; expected how many times"):
        jp.shooting(limit="4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="tol is '1e-6'; expected a positive number"):
        jp.shooting(tol="1e-6")  # pyright: ignore[reportArgumentType]


def test_one_line_is_logged_once(caplog):
    weights, init, xs = dense(256, 512)
    choice.say.cache_clear()
    with caplog.at_level(logging.WARNING, "jaxpara"):
        for _ in range(2):
            jax.eval_shape(
                lambda w: jp.newton_scan(step(w), init, xs, solver=jp.shooting()), weights
            )
        jax.eval_shape(lambda w: jp.newton_scan(step(w), init, xs, solver=jp.sequential()), weights)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "shooting was asked for" in line and "times the time of lax.scan" in line


def test_a_sharded_sequence_and_symbolic_sizes_are_not_refused():
    weights, init, xs = dense(256, 1024)
    closed = jax.make_jaxpr(step(weights))(init, xs[0])
    call = {"platform": "cpu", "steps": 1024, "block": 256}
    assert cost.refusal(jp.shooting(), closed, (0,), **call)
    assert cost.refusal(jp.shooting(axis="time"), closed, (0,), **call) is None


def test_a_convolutional_cell_takes_little_memory_and_equals_flax():
    x = jax.random.normal(jax.random.key(0), (2, 12, 8, 8, 3))
    cell = nn.ConvLSTMCell(8, (3, 3))
    variables = nn.RNN(cell).init(jax.random.key(1), x)

    def compiled(layer):
        def loss(variables, x):
            out = layer.apply(variables, x)
            return jnp.sum(jnp.sin(out)), out

        run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), compiler_options=QUICK)
        return run.lower(variables, x).compile()

    flax = compiled(nn.RNN(cell))
    wanted = flax(variables, x)
    ours = compiled(linen.RNN(cell, solver=jp.shooting()))
    memory = [run.memory_analysis().temp_size_in_bytes for run in (ours, flax)]
    assert memory[0] < 2 * memory[1] + 2**20
    assert_close(ours(variables, x), wanted, 2e-5)


@pytest.mark.parametrize(
    "linear, derivative",
    [
        ("sequential", None),
        ("chunked", "reverse"),
        pytest.param("associative", None, marks=pytest.mark.slow),
    ],
)
def test_newton_with_a_block_too_large_to_hold_equals_lax_scan(linear, derivative):
    weights, init, xs = dense(20, 50, batch=2)
    assert MATERIALISED["sequential"] < 20 <= MATERIALISED["associative"]
    solver = jp.newton(linear=linear, limit=math.inf)

    def run(scan):
        def loss(weights, init, xs):
            (end, ys), info = scan(step(weights), init, xs)
            return jnp.sum(jnp.cos(ys) * xs) + jnp.sum(end), (ys, info)

        both = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
        return jax.jit(both, compiler_options=QUICK)(weights, init, xs)

    (_, (ys, info)), grads = run(lambda *a: jp.solve_scan(*a, solver=solver, derivative=derivative))
    (_, (wanted, _)), exact = run(lambda *a: (lax.scan(*a), ()))
    assert info.converged and 2 <= info.iterations <= 8 and info.fallback_steps == 0
    assert_close(ys, wanted, 2e-6)
    assert_close(grads, exact, 5e-6)


@pytest.mark.parametrize("solver", [jp.quasi_newton(limit=math.inf), jp.jacobi()])
def test_what_only_comes_near_is_finished_by_newton(solver):
    """Bitwise agreement of a dense block takes dozens of iterations, if it comes at all."""
    weights, init, xs = dense(12, 200)
    run = jax.jit(lambda *a: jp.solve_scan(*a, solver=solver), static_argnums=0)
    (end, ys), info = run(step(weights), init, xs)
    assert info.converged and info.iterations <= 12 and info.fallback_steps == 0
    assert_close((end, ys), lax.scan(step(weights), init, xs), 1e-6)


def test_newton_holds_no_block_that_is_too_large():
    """Only the associative scan needs the blocks, `T x K x K` of them."""
    weights, init, xs = dense(20, 64)

    def largest(linear):
        solver = jp.newton(linear=linear, limit=math.inf)
        run = jax.jit(
            lambda w, h, x: jp.newton_scan(step(w), h, x, solver=solver)[1], compiler_options=QUICK
        )
        return run.lower(weights, init, xs).compile().memory_analysis().temp_size_in_bytes

    block = 64 * 20 * 20 * 4
    assert largest("sequential") < block / 2 < block < largest("associative")


def test_linear_is_chosen_by_platform_and_block_and_explicit_ones_stay():
    assert {cost.linear_method("cpu", k) for k in (1, 8, 64, 4096)} == {"sequential"}
    assert [cost.linear_method("gpu", k) for k in (1, 4, 5, 64, 128, 129)] == [
        "kernel",
        "kernel",
        "associative",
        "associative",
        "associative",
        "sequential",
    ]
    weights, init, xs = dense(6, 40)
    for make in (jp.newton, jp.quasi_newton, jp.jacobi):
        chosen = jp.explain_choice(step(weights), init, xs, solver=make())
        wanted = cost.linear_method(jax.default_backend(), 6)
        assert chosen.solver.settings.linear == wanted
        for linear in ("sequential", "associative", "chunked", "kernel"):
            chosen = jp.explain_choice(step(weights), init, xs, solver=make(linear=linear))
            assert chosen.solver == make(linear=linear)
