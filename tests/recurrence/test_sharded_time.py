"""Time sharded over eight devices: values and gradients are those of the whole sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxpara as jp
from jaxpara.recurrence.solve import chunk_links, sharded_time
from jaxpara.recurrence.structure.jacobian_blocks import Group
from tests.recurrence.kit import (
    CASES,
    QUICK,
    assert_close,
    cotangents,
    in_float64,
    weighted,
)

TIME = 24


@functools.cache
def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()[:8]), ("time",))


@functools.cache
def data(structure, scale):
    case = CASES[structure]
    args = case.draw(np.random.default_rng(5), TIME, scale)
    return case, args, cotangents(case, args)


def solved(case, weights, solver, derivative, reverse):
    def run(params, init, xs):
        def local(params, init, xs):
            return jp.solve_scan(
                case.step(params), init, xs, reverse=reverse, solver=solver, derivative=derivative
            )

        specs = ((P(), P("time")), jp.SolveInfo(P(), P(), P(), P(), P("time")))
        out, info = jax.shard_map(
            local, mesh=mesh(), in_specs=(P(), P(), P("time")), out_specs=specs
        )(params, init, xs)
        return weighted(out, weights), (out, info._replace(starts=None))

    run = jax.value_and_grad(run, (0, 1, 2), has_aux=True)
    return jax.jit(run, compiler_options=QUICK)


@functools.cache
def oracle(structure, scale, reverse):
    case, args, weights = data(structure, scale)

    def run(params, init, xs):
        out = lax.scan(case.step(params), init, xs, reverse=reverse)
        return weighted(out, weights), out

    return in_float64(jax.value_and_grad(run, (0, 1, 2), has_aux=True), *args)


# Shooting and Newton with every structure; both rules and both directions in turn. The others,
# which differ from Newton in the matrices of their iterations only, meet two structures each.
ROWS = [
    (solver, structure, (None, "reverse")[(i + j) % 2], bool((i + j // 2) % 2))
    for i, solver in enumerate(("shooting", "newton"))
    for j, structure in enumerate(CASES)
]
OTHERS = [
    ("quasi_newton", "two_leaves", None, True),
    ("quasi_newton", "dense", "reverse", False),
    ("jacobi", "diagonal", "reverse", True),
    ("jacobi", "per_head", None, False),
]
EVERYDAY = {("shooting", "dense"), ("shooting", "per_head"), ("newton", "diagonal")}
ROWS = [
    pytest.param(*row, marks=() if row[:2] in EVERYDAY else pytest.mark.slow)
    for row in [*ROWS, *OTHERS]
]


@pytest.mark.parametrize(("solver", "structure", "derivative", "reverse"), ROWS)
def test_sharded_time_gives_what_lax_scan_gives(solver, structure, derivative, reverse):
    case, args, weights = data(structure, 0.7)
    run = solved(case, weights, getattr(jp, solver)(axis="time"), derivative, reverse)
    (value, (out, info)), grads = run(*args)
    # A residual of r leaves an error of r / (1 - rate) where convergence is only linear:
    # the carry is still 1e-5 of its own size or better, the bound for float32 states.
    tolerance = 2e-6 if solver in ("shooting", "newton") else 1e-5
    assert_close(((value, out), grads), oracle(structure, 0.7, reverse), tolerance)
    assert info.converged and info.iterations > 0 and info.fallback_steps == 0


@pytest.mark.parametrize("solver", ["shooting", pytest.param("newton", marks=pytest.mark.slow)])
def test_hard_cells_finish_device_after_device(solver):
    case, args, weights = data("diagonal", 0.7)
    make = getattr(jp, solver)
    # One iteration is never enough to confirm anything: all of it must be completed.
    run = solved(case, weights, make(axis="time", max_iters=1), None, False)
    (value, (out, info)), grads = run(*args)
    assert_close(((value, out), grads), oracle("diagonal", 0.7, False))
    assert not info.converged and info.fallback_steps == TIME


def test_sequential_solves_of_sharded_time_are_refused():
    def local(xs):
        f = lambda h, x: (h.astype(jnp.int32), x)  # noqa: E731
        return jp.newton_scan(f, jnp.int32(0), xs, solver=jp.shooting(axis="time"))[1]

    run = jax.shard_map(local, mesh=mesh(), in_specs=P("time"), out_specs=P("time"))
    with pytest.raises(ValueError, match="time is sharded over 'time'.*gather the sequence first"):
        run(np.ones(TIME, np.float32))


@pytest.mark.parametrize("last, lost", [(1.0, False), (jnp.inf, True)])
def test_a_correction_dropped_on_its_way_to_the_next_device_bounds_nothing(last, lost):
    # Device 0 is off by 1e-7 inside; what that does to its end is lost where the product is
    # infinite, and the start of device 1 seems to be exact.
    groups, one = (Group((0,), ((0,),)),), jnp.ones((2, 1))
    matrices = jnp.asarray([1.0, last]).reshape(2, 1, 1, 1)

    def device(ends):
        axis = sharded_time.along("time", False)
        cap, chain = [4.0], functools.partial(chunk_links.chain, carried=jnp.float32(1))
        left = chunk_links.leaving(groups, [ends], [matrices], [one], cap, jnp.float32(1))
        return sharded_time.first(axis, groups, [one[0]], cap, chain, *left, [one])[1]

    ends = jnp.stack([one.at[0].add(1e-7), one])
    found = jax.vmap(device, axis_name="time")(ends)
    np.testing.assert_array_equal(found, [lost, lost])


@pytest.mark.slow
def test_what_a_step_hands_through_is_no_obstacle():
    def run(scan):
        step = lambda c, x: ((jnp.tanh(c[0] * c[1] + x), c[1]), (c[0], x))  # noqa: E731
        return lambda init, xs: scan(step, init, xs)

    def sharded(init, xs):
        solve = run(functools.partial(jp.newton_scan, solver=jp.shooting(axis="time")))
        specs = P(), P("time")
        return jax.shard_map(solve, mesh=mesh(), in_specs=specs, out_specs=specs)(init, xs)

    init = (jnp.zeros(2), jnp.array([0.5, 0.9]))
    xs = jnp.sin(jnp.arange(2.0 * TIME)).reshape(TIME, 2)
    found, wanted = (
        jax.tree.leaves(
            (scan(init, xs), jax.grad(functools.partial(squares, scan), (0, 1))(init, xs))
        )
        for scan in (sharded, run(lax.scan))
    )
    for ours, right in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, right, rtol=2e-5, atol=1e-6)


def squares(scan, *args):
    return sum(jnp.sum(v**2) for v in jax.tree.leaves(scan(*args)))
