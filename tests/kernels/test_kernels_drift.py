"""States that hardly move, through every path of the fused kernel: none is returned as it began.

One step holds the kinds side by side, in blocks of 16 channels, for a GPU's block is solved as a
whole: a counter that seldom counts, a clock, a slow average, and a gate so nearly closed that rough
functions round it to 0. Judge: float64, and what `lax.scan` itself loses to rounding.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxpara.recurrence.kernel.elementwise import prepare
from pallas_kernels import compat, nonlinear_recurrence
from pallas_kernels.linear_recurrence import affine_cell
from tests.recurrence.kit import QUICK

T, BLOCK = 64, 16
KINDS = ("counter", "clock", "average", "gate")
GPU = pytest.param(
    "mosaic_gpu_interpret",
    marks=[
        pytest.mark.skipif(compat.version() < (0, 12), reason="the simulator needs JAX 0.12"),
        pytest.mark.slow,
    ],
)
PATHS = ["xla", "mosaic_tpu_interpret", GPU]


def step(h, x):
    push, gate, goal = x
    new = jnp.minimum(h + push + jax.nn.sigmoid(gate) * (jnp.tanh(goal) - h), 2e9)
    return new.astype(h.dtype)


def drifting(dtype):
    """Initial state `[1, D]` and inputs `[T, 1, D]`, in float32 or a narrower type."""
    narrow = dtype != jnp.float32
    begin = {"counter": 256 if narrow else 1e7, "clock": 256 if narrow else 1e4}
    begin |= {"average": 0.5, "gate": 0.5}
    push, gate = np.zeros((T, 4)), np.full((T, 4), -200.0)
    push[[3, 9, 40], 0] = 2.0 if narrow else 1.0
    push[:, 1] = 1.25 if narrow else 2e-3
    # 1e-6 a step; below float32 4e-3, which is stuck where its move is half a unit.
    gate[:, 2] = -5.5 if narrow else -13.8
    gate[:, 3] = -4.5 if narrow else -16.0

    def wide(kinds, shape):
        return jnp.asarray(np.repeat(kinds, BLOCK, axis=-1).reshape(shape), dtype)

    init = wide(np.array([[begin[kind] for kind in KINDS]]), (1, -1))
    goal = np.full((T, 4), 3.0)
    return init, [wide(a, (T, 1, 4 * BLOCK)) for a in (push, gate, goal)]


def by_kernel(function, init, xs, **how):
    """`(init, xs) -> Solved` of a step of one state, for operands like these."""
    prepared = prepare(lambda _, s, x: ([function(s[0], x)], []), [], [init], xs)

    def run(init, xs):
        inputs, params = prepared.operands([], xs)
        return nonlinear_recurrence.forward(prepared.cell, [init], inputs, params, **how)

    return jax.jit(run, compiler_options=QUICK)


@functools.lru_cache
def solver(implementation, certain, reverse, dtype, function=step):
    how = {"implementation": implementation, "certain": certain, "reverse": reverse}
    return by_kernel(function, *drifting(dtype), chunks=8, window=32, **how)


def scanned(init, xs, reverse):
    def one(h, x):
        h = step(h, x)
        return h, h

    return lax.scan(one, init, xs, reverse=reverse)[1]


def in_float64(init, xs, reverse):
    h, xs = np.asarray(init, np.float64), [np.asarray(x, np.float64) for x in xs]
    states = np.zeros_like(xs[0])
    for t in range(T)[::-1] if reverse else range(T):
        h = h + xs[0][t] + (np.tanh(xs[2][t]) - h) / (1 + np.exp(-xs[1][t]))
        states[t] = h
    return states


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("certain", [True, False])
@pytest.mark.parametrize("implementation", PATHS)
def test_a_float32_state_that_hardly_moves_moves(implementation, certain, reverse):
    init, xs = drifting(jnp.float32)
    found = solver(implementation, certain, reverse, jnp.float32)(init, xs)
    states, exact = np.asarray(found.states[0], np.float64), in_float64(init, xs, reverse)
    lost = np.max(np.abs(np.asarray(scanned(init, xs, reverse), np.float64) - exact), (0, 1))
    # A correction of eight units is left in each of two windows.
    allowed = 2e-6 * np.abs(np.asarray(init[0], np.float64)) + 2 * lost
    assert np.all(np.max(np.abs(states - exact), (0, 1)) <= allowed)
    # What this would notice: a state that stays what it was. (The counter is exact or wrong.)
    frozen = np.max(np.abs(np.asarray(init, np.float64) - exact), (0, 1))
    assert np.all(frozen[BLOCK:] > 1.5 * allowed[BLOCK:])
    np.testing.assert_array_equal(states[..., :BLOCK], exact[..., :BLOCK])
    assert np.all(np.asarray(found.fallback_steps) == 0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("implementation", PATHS)
def test_a_bfloat16_state_is_lax_scans(implementation, reverse):
    init, xs = drifting(jnp.bfloat16)
    # Whatever is claimed: a state below float32 rounds by as much as it moves.
    found = solver(implementation, True, reverse, jnp.bfloat16)(init, xs)
    states = np.asarray(found.states[0], np.float32)
    expected = np.asarray(scanned(init, xs, reverse), np.float32)
    # Two programs round apart what falls near a tie.
    assert np.max(np.abs(states - expected) / np.abs(expected)) <= 2.0**-7
    end = expected[0 if reverse else -1]
    assert np.all(np.abs(end - np.asarray(init, np.float32)) > 2.0**-6 * np.abs(end))


def scaled(h, x):
    """A product, and not affine for the proof."""
    return h * x[0] / (1.0 + 1e-30 * h * h)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("implementation", PATHS)
def test_a_correction_that_grows_in_its_chunk_is_judged_where_it_arrives(implementation, reverse):
    # Where a chunk begins the state is small beside what it was, and a start of 0 within the limit;
    # where it ends that is all of the state, and the next start may be right already.
    rng = np.random.default_rng(0)
    init = jnp.asarray(1.0 + rng.random((1, 4 * BLOCK)), jnp.float32)
    factors = 1.0 + 0.1 * rng.normal(size=(T, 1, 4 * BLOCK))
    factors[16:32:4] = np.exp([[[-25.0]], [[-25.0]], [[25.0]], [[25.0]]])
    factors = jnp.asarray(factors, jnp.float32)
    factors = factors[::-1] if reverse else factors
    xs = [factors, *drifting(jnp.float32)[1][1:]]
    found = solver(implementation, True, reverse, jnp.float32, scaled)(init, xs)

    def one(h, x):
        h = scaled(h, x)
        return h, h

    expected = lax.scan(one, init, xs, reverse=reverse)[1]
    # 1e-5 is what counts as solved (80 units); without the test of arrivals 2.6e4 was seen.
    np.testing.assert_allclose(found.states[0], expected, rtol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("implementation", PATHS)
def test_a_transient_correction_within_a_chunk_is_judged(implementation, reverse):
    # The state has almost vanished where the chunk begins, and a start of 0 would be within the
    # limit; so is its end. Between them the state returns. Every block of 16 has another chunk.
    rng = np.random.default_rng(0)
    init = jnp.asarray(1.0 + rng.random((1, 4 * BLOCK)), jnp.float32)
    logs = 0.05 * rng.normal(size=(T, 1, 4 * BLOCK))
    for kind, begin in enumerate((12, 20, 28, 60)):
        own = slice(kind * BLOCK, (kind + 1) * BLOCK)
        logs[begin - 8 : begin - 4, :, own] -= 9.0 / 4
        logs[begin, :, own] += rng.uniform(7.0, 9.0, BLOCK)
        logs[begin + 2, :, own] -= 8.0
    factors = jnp.asarray(np.exp(logs[::-1] if reverse else logs), jnp.float32)
    xs = [factors, *drifting(jnp.float32)[1][1:]]
    found = solver(implementation, True, reverse, jnp.float32, scaled)(init, xs)
    exact = np.cumprod(np.asarray(factors[::-1] if reverse else factors, np.float64), axis=0)
    exact *= np.asarray(init, np.float64)
    error = np.abs(np.asarray(found.states[0], np.float64)[:: -1 if reverse else 1] - exact)
    recent = np.stack([np.max(np.abs(exact[max(0, t - 16) : t + 1]), 0) for t in range(T)])
    # 1e-5 is what counts as solved (80 units); without the test on the way 0.05 was seen.
    assert np.all(error <= 1e-5 * np.maximum(recent, exact))


def nudged(h, x):
    """A product with drift, and not affine for the proof."""
    return x[0] * (h + x[1] * jnp.tanh(h))


@pytest.mark.parametrize("implementation", PATHS)
def test_drift_is_seen_through_a_product_that_vanishes_inside_its_chunk(implementation):
    # By 2^-130 and back in every chunk, at once, gently, and with signs: the state is a normal
    # float all the way, and the product of the derivatives is not.
    # The last ones fall to 2^-100, with a sign that may cancel what keeps them from vanishing.
    gently, less = [-33] * 4 + [33] * 4, [-25] * 4 + [25] * 4
    logs = np.repeat([[-66, -64, 66, 64] * 2, gently, gently, less], BLOCK, 0)
    sign = np.repeat([[1] * 8, [1] * 8, [-1] * 8, [1, 1, 1, -1, 1, 1, 1, 1]], BLOCK, 0)
    steps, factors = 512, (sign * 2.0**logs).T[:, None]
    a = np.tile(factors, (steps // 8, 1, 1))
    b = np.where(np.arange(steps)[:, None, None] % 4 == 0, 4e-4, 0.0) + 0 * a
    b[:, :, BLOCK:] *= np.arange(steps)[:, None, None] % 8 == 0
    init, xs = jnp.full((1, 4 * BLOCK), 1e3, jnp.float32), [jnp.float32(a), jnp.float32(b)]
    how = {"implementation": implementation, "certain": True, "chunks": 8, "window": 64}
    found = np.asarray(by_kernel(nudged, init, xs, **how)(init, xs).states[0], np.float64)
    by_scan = lax.scan(lambda h, x: (nudged(h, x),) * 2, init, xs)[0]
    h = np.full((1, 4 * BLOCK), 1e3)
    for push, drift in zip(np.float64(xs[0]), np.float64(xs[1]), strict=True):
        h = push * (h + drift * np.tanh(h))
    # The drift is 2.5e-2 and 5e-2; with products that vanish half of it and more was lost.
    np.testing.assert_allclose(found[-1], h, rtol=0, atol=2 * np.max(np.abs(by_scan - h)) + 2e-3)


def turned(h, x):
    """Odd, and not affine: a zero stays one, and changes its sign where the input is negative."""
    return h * x[0] / (1.0 + h * h)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("certain", [True, False])
@pytest.mark.parametrize("implementation", PATHS)
def test_a_zero_keeps_its_sign_from_chunk_to_chunk(implementation, certain, reverse):
    init = jnp.asarray(np.repeat([[0.0, -0.0, 1.0, 1e-30]], BLOCK, axis=-1), jnp.float32)
    sign = np.ones((T, 1, 4 * BLOCK), np.float32)
    sign[::4] = -1.0  # once a chunk: chunks that start from the other zero end in the other one
    xs = [jnp.asarray(sign), *drifting(jnp.float32)[1][1:]]
    states = solver(implementation, certain, reverse, jnp.float32, turned)(init, xs).states[0]
    expected = np.broadcast_to(init, sign.shape) * np.cumprod(sign[::-1] if reverse else sign, 0)
    expected = expected[::-1] if reverse else expected
    np.testing.assert_array_equal(np.signbit(states), np.signbit(expected))
    np.testing.assert_array_equal(states[..., : 2 * BLOCK], expected[..., : 2 * BLOCK])


def hidden(h, x):
    """The derivative is hidden: only agreement bit for bit says that chunks meet."""
    return lax.stop_gradient(h) + x[0]


@pytest.mark.parametrize("implementation", ["mosaic_tpu_interpret", GPU])
def test_a_hidden_derivative_counts_bit_for_bit_and_a_false_claim_is_wrong(implementation):
    init = jnp.ones((1, 4 * BLOCK))
    push = np.zeros((T, 1, 4 * BLOCK), np.float32)
    push[::4] = 1.2e-7
    xs = [jnp.asarray(push), *drifting(jnp.float32)[1][1:]]
    end = lambda certain: np.asarray(  # noqa: E731
        solver(implementation, certain, False, jnp.float32, hidden)(init, xs).states[0][-1]
    )
    expected = np.float32(1.0)
    for x in push[:, 0, 0]:
        expected = expected + x
    np.testing.assert_array_equal(end(False), np.full((1, 4 * BLOCK), expected))
    assert np.all(end(True) < expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("implementation", PATHS)
def test_an_affine_state_that_all_but_vanishes_comes_back(implementation, reverse):
    factors = np.ones((T, 4))
    # Within a chunk by 1e-50, which no product holds, and back; by 1e-20; the sign of a zero.
    factors[16:20, 0] = [1e-25, 1e-25, 1e25, 1e25]
    factors[20:22, 1] = [1e-20, 1e20]
    factors[::4, 2] = -1.0
    factors = factors[::-1] if reverse else factors
    a, init, b = (
        jnp.asarray(np.repeat(x, BLOCK, axis=-1), jnp.float32)
        for x in (factors[:, None], [[1e20, 1.0, -0.0, 2.0]], np.full((T, 1, 4), -0.0))
    )

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(a, b, init):
        settings = {"reverse": reverse, "affine": True, "chunks": 8, "window": 32}
        return nonlinear_recurrence.forward(
            affine_cell(1), [init], [a, b], [], implementation=implementation, **settings
        )

    def one(h, x):
        h = x[0] * h + x[1]
        return h, h

    found = run(a, b, init)
    expected = lax.scan(one, init, (a, b), reverse=reverse)[1]
    np.testing.assert_allclose(found.states[0], expected, rtol=1e-6)
    np.testing.assert_array_equal(np.signbit(found.states[0]), np.signbit(expected))
    # What this would notice: the product is 0, and so would be all that comes behind it.
    assert np.float32(1e-25) * np.float32(1e-25) == 0.0 < np.min(np.abs(expected[..., 0]))


@pytest.mark.parametrize("implementation", PATHS)
def test_rounding_of_a_large_state_does_not_persist(implementation):
    # From 1e6 to about 1 in the last chunk but one of a window: what its last boundary leaves is
    # rounding of 1e6, and in the next window, where the state is small, would be an error.
    b = 0.1 * np.random.default_rng(1).normal(size=(T, 1, BLOCK)).astype(np.float32)
    b[:25], b[25] = 0.0, -1e6
    a, init = jnp.ones_like(b), jnp.full((1, BLOCK), 1e6)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(a, b, init):
        settings = {"affine": True, "chunks": 8, "window": 32}
        return nonlinear_recurrence.forward(
            affine_cell(1), [init], [a, b], [], implementation=implementation, **settings
        )

    exact = 1e6 + np.cumsum(b.astype(np.float64), axis=0)
    found = np.asarray(run(a, jnp.asarray(b), init).states[0])
    # 1e-5 of a window's largest; a fourth of the rounding of 1e6 would be 1.5e-2.
    np.testing.assert_allclose(found[32:], exact[32:], atol=1e-5 * np.max(np.abs(exact[32:])))
