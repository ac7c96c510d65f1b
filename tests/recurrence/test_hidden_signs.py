"""States that fall by orders of magnitude into steps that are flat on both sides of a gap.

Only the sign of a state is left then, and a gap in which it turns is small beside the magnitudes
before. What follows grows again.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxpara as jp
from tests.recurrence.kit import QUICK

LANES, STEPS, LENGTH = 512, 64, 4
F32 = jnp.float32


def falling(h, x):
    scale, size, gain, shift = x
    new = scale * h + size * gain * h / jnp.sqrt(1 + (gain * h) ** 2) + shift
    return new, new


def beside_others(count):
    """The same, as the first of `count` elements of which all may depend on all."""

    def step(h, x):
        rest = F32(0.5) * h[1:] + F32(0.1)
        new = jnp.concatenate([falling(h[0], x)[0][None], rest]) + jnp.sum(h) * F32(0)
        return new, new

    return step


@functools.cache
def lanes(apart):
    """Inputs `[LANES, STEPS]`; falls lie a chunk apart, or follow one another."""
    rng = np.random.default_rng(5)

    def one():
        scale, size, gain, shift = np.ones(STEPS), np.zeros(STEPS), np.ones(STEPS), np.zeros(STEPS)
        left = 10 ** rng.uniform(6, 12)
        falls = rng.integers(1, 4)
        shift[rng.integers(1, 2 * LENGTH)] = -left
        at = 2 * LENGTH + rng.integers(LENGTH)
        for _ in range(falls):
            left /= 10 ** rng.uniform(3, 6.5)
            scale[at], size[at], gain[at] = 0, left, 10 ** rng.uniform(-1, 3)
            at += LENGTH if apart else rng.integers(1, 3)
        scale[at], size[at] = 0, left * 10 ** rng.uniform(0, 4)
        gain[at] = 10 ** rng.uniform(0, 4) / left
        return scale, size, gain, shift

    drawn = np.array([one() for _ in range(LANES)], np.float32)
    first = rng.uniform(1, 100, LANES) * rng.choice([-1, 1], LANES)
    return first.astype(np.float32), list(drawn.swapaxes(0, 1))


@functools.cache
def allowed(apart):
    """States in float64, and how far off each may be: 1e-4, and twice what `lax.scan` loses."""
    init, xs = lanes(apart)

    def run(dtype):
        rows = [x.astype(dtype) for x in xs]
        return np.asarray(
            jax.vmap(lambda h, x: lax.scan(falling, h, x)[1])(init.astype(dtype), rows)
        )

    plain = run(np.float32)
    with jax.enable_x64(True):
        exact = run(np.float64)
    lost = np.maximum.accumulate(np.abs(plain - exact), axis=1)
    return exact, 1e-4 * np.abs(exact) + 2 * lost


def assert_signs_hold(apart, states):
    exact, most = allowed(apart)
    wrong = np.any(np.abs(states - exact) > most, axis=1)
    assert not wrong.any(), f"{wrong.sum()} of {LANES}"


SOLVERS = {"shooting": jp.shooting(chunks=STEPS // LENGTH), "newton": jp.newton(max_iters=16)}


@functools.cache
def solved(solver, elements):
    """How the falls lie is in the inputs: one program for both."""
    step = falling if elements == 1 else beside_others(elements)
    solve = functools.partial(jp.solve_scan, step, solver=SOLVERS[solver])
    return jax.jit(jax.vmap(solve), compiler_options=QUICK)


@pytest.mark.parametrize("elements", [1, 2, 6])
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("solver", SOLVERS)
def test_no_gap_hides_beside_a_state_that_is_gone(solver, apart, elements):
    init, xs = lanes(apart)
    if elements > 1:
        init = np.pad(init[:, None], [(0, 0), (0, elements - 1)])
    (_, states), info = solved(solver, elements)(init, xs)
    assert_signs_hold(apart, np.asarray(states).reshape(LANES, STEPS, -1)[..., 0])
    # Nor is everything walked.
    assert np.mean(info.converged) > 0.9


@functools.cache
def solved_over_sharded_time(solver):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("time",))

    def local(init, xs):
        return jax.vmap(lambda h, x: jp.newton_scan(falling, h, x, solver=solver)[1])(init, xs)

    run = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P(None, "time")), out_specs=P(None, "time")
    )
    return jax.jit(run, compiler_options=QUICK)


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize(
    "solver",
    [
        jp.shooting(chunks=4, axis="time"),
        pytest.param(jp.newton(max_iters=16, axis="time"), marks=pytest.mark.slow),
    ],
)
def test_nor_over_sharded_time(solver, apart):
    init, xs = lanes(apart)
    assert_signs_hold(apart, np.asarray(solved_over_sharded_time(solver)(init, xs)))
