"""Errors that boundaries of chunks do not show: behind the last one, and below the normal floats.

`critical_points.npz` holds six lanes, found by a search through a million, of 32 steps
`a h + b f(k (h - c)) + e` that are flat where a pass arrives in the last chunk and steep beside it.
Four more (`moved`), of 200,000, have such a step in the sixth of eight chunks, where the pass
before the last one begins.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from jaxpara.recurrence.kernel.elementwise import prepare
from pallas_kernels import nonlinear_recurrence
from pallas_kernels.linear_recurrence import affine_cell
from tests.kernels.test_kernels_drift import BLOCK, GPU, by_kernel
from tests.recurrence.kit import QUICK, faded, falling_sign, sharp

LANES = pathlib.Path(__file__).with_name("critical_points.npz")
PATHS = ["mosaic_tpu_interpret", GPU]
FLAT = {"sin": jnp.sin, "bump": lambda u: 1 / (1 + u * u)}


def solved(step, implementation, init, xs, chunks=8, certain=True, **how):
    how |= {"implementation": implementation, "chunks": chunks, "certain": certain}
    return by_kernel(step, init, xs, **how)(init, xs)


def scanned(step, init, xs):
    return np.asarray(lax.scan(lambda h, x: (step(h, x),) * 2, init, xs)[1], np.float64)


@pytest.mark.parametrize("kind", FLAT)
@pytest.mark.parametrize("implementation", PATHS)
def test_the_last_chunk_ends_where_the_pass_before_predicted(implementation, kind):
    lanes = np.repeat(np.load(LANES)[kind], BLOCK, axis=0)  # [lanes, 1 + 5 * 32]
    init = jnp.asarray(lanes[None, :, 0])
    rest = lanes[:, 1:].reshape(len(lanes), 5, 32).transpose(1, 2, 0)[:, :, None]
    # Two more windows, which keep what they are given.
    neutral = np.broadcast_to(np.reshape([1.0, 0.0, 1.0, 0.0, 0.0], (5, 1, 1, 1)), (5, 64, 1, 1))
    pad = np.broadcast_to(neutral, (5, 64, 1, len(lanes)))
    xs = list(jnp.asarray(np.concatenate([rest, pad], axis=1), jnp.float32))

    def step(h, x):
        a, c, k, b, e = x
        return a * h + b * FLAT[kind](k * (h - c)) + e

    found = solved(step, implementation, init, xs, window=32)
    wanted = scanned(step, init, xs)
    # The steep step makes 5e-4 of the rounding of its argument; 0.2 to 2 was seen without the test.
    np.testing.assert_allclose(found.states[0][-1], wanted[-1], rtol=1e-3)
    assert np.all(np.asarray(found.fallback_steps) == 0)


@pytest.mark.parametrize("implementation", PATHS)
def test_a_pass_is_judged_by_products_of_its_own_path(implementation):
    lanes, sharp, at = np.repeat(np.load(LANES)["moved"], BLOCK, axis=0), 1000.0, 20
    xs = np.zeros((5, 32, 1, len(lanes)), np.float32)  # a, w, b, c, e
    xs[:2, :at, 0] = np.moveaxis(lanes[:, 2:].reshape(-1, 2, at), 0, -1)
    # The steep step, one that forgets it, and neutral ones.
    xs[2, at], xs[3, at], xs[4, at + 1], xs[0, at + 2 :] = 1.0, lanes[:, 1], 1.0, 1.0

    def step(h, x, f=jnp):
        a, w, b, c, e = x
        return a * h * (1 + 0.4 * f.sin(w * h)) + b * f.cos(sharp * (h - c)) + e

    found = solved(step, implementation, jnp.asarray(lanes[None, :, 0]), list(xs), window=32)
    states = np.asarray(found.states[0], np.float64)
    defect = np.abs(states[at] - step(states[at - 1], np.float64(xs[:, at]), np))
    # 80 units of the scale count as solved; by the products of the pass before 13 to 84 times that.
    scale = np.max(np.abs(states[at - 5 : at]), axis=0)
    assert np.all(defect <= 2e-5 * scale) and np.all(found.fallback_steps == 0)


@pytest.mark.parametrize("certain", [True, False])
@pytest.mark.parametrize("implementation", PATHS)
def test_a_gap_below_the_least_float_does_not_count_as_none(implementation, certain):
    # The state falls to 1e-37 where a chunk ends, and comes back in the next. There the gap between
    # the end and the next start is smaller than any normal number.
    rng = np.random.default_rng(0)
    width, steps = 8 * BLOCK, 64
    logs = 0.3 * rng.normal(size=(steps, 1, width))
    ends = 8 * rng.integers(2, 7, width)
    logs[ends - 1, 0, np.arange(width)] -= rng.uniform(8, 16, width)
    logs[ends + rng.integers(0, 8, width), 0, np.arange(width)] += rng.uniform(8, 16, width)
    init = np.exp(rng.uniform(-75, -66, (1, width)))
    bend = np.broadcast_to(rng.uniform(0.2, 2, (1, width)) / init, (steps, 1, width))

    def step(h, x):
        return x[0] * h / jnp.sqrt(1 + (x[1] * h) ** 2)

    init, xs = jnp.float32(init), [jnp.float32(np.exp(logs)), jnp.float32(bend)]
    found = solved(step, implementation, init, xs, window=64, certain=certain)
    states = np.asarray(found.states[0], np.float64)
    wanted = scanned(step, init, xs)
    normal = np.all(np.abs(wanted) > 2e-38, axis=(0, 1))
    recent = np.stack([np.max(np.abs(wanted[max(0, t - 31) : t + 1]), 0) for t in range(steps)])
    error = np.max(np.abs(states - wanted) / recent, axis=(0, 1))
    # 1e-5 is what counts as solved; without the test 0.06 was seen.
    assert np.sum(normal) > 60 and np.all(error[normal] <= 1e-5)


def test_an_affine_state_that_grows_inside_its_chunk_is_not_walked_for_it():
    rng = np.random.default_rng(1)
    width, steps = 8 * BLOCK, 512
    a = 1.5 * rng.normal(size=(steps, 1, width))
    a, b = jnp.float32(a), jnp.float32(rng.normal(size=a.shape))
    init = jnp.float32(rng.normal(size=(1, width)))
    run = functools.partial(
        nonlinear_recurrence.forward, affine_cell(1), affine=True, implementation=PATHS[0]
    )
    found = jax.jit(run, compiler_options=QUICK)([init], [a, b], [])
    h, exact = np.asarray(init, np.float64), np.zeros((steps, 1, width))
    for t in range(steps):
        h = exact[t] = np.float64(a[t]) * h + np.float64(b[t])
    lost = np.abs(scanned(lambda h, x: x[0] * h + x[1], init, (a, b)) - exact)
    error = np.abs(np.asarray(found.states[0], np.float64) - exact)

    def recent(values):
        return np.stack([np.max(values[max(0, t - 64) : t + 17], 0) for t in range(steps)])

    assert np.all(error <= 1e-5 * recent(np.abs(exact)) + 2 * recent(lost))
    # A fifth was walked while corrections were held to the ends of chunks.
    assert np.all(np.asarray(found.fallback_steps) == 0)


@pytest.mark.parametrize("implementation", PATHS)
def test_a_state_that_fades_out_is_not_walked(implementation):
    # Below 1e-31 the rounding of a state is below the least float, and every gap is flushed.
    steps, width = 1024, 2 * BLOCK
    xs = jax.random.normal(jax.random.key(0), (steps, 1, width)).at[200:].set(0.0)

    def step(h, x):
        return 0.8 * h / jnp.sqrt(1 + h * h) + 0.1 * x

    init = jnp.ones((1, width))
    found = solved(lambda h, x: step(h, x[0]), implementation, init, [xs], chunks=16)
    wanted = scanned(step, init, xs)
    faded = np.max(np.abs(wanted), axis=(1, 2))
    assert np.any((faded < 1e-31) & (faded > 0)) and np.all(found.fallback_steps == 0)
    # Beside the first states, of size 1: what has faded counts by the recent magnitude.
    np.testing.assert_allclose(found.states[0], wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("implementation", PATHS)
def test_where_nothing_is_proved_tiny_states_count_bit_for_bit(implementation):
    # The floor below which corrections count as nothing is none for a derivative that is not true.
    factors = jnp.full((64, 1, 2 * BLOCK), 1.02, jnp.float32)
    init = jnp.full((1, 2 * BLOCK), 1.5e-38, jnp.float32)

    def step(h, x):
        return lax.stop_gradient(h) * x[0]

    found = solved(step, implementation, init, [factors], window=64, certain=False)
    np.testing.assert_array_equal(found.states[0], scanned(step, init, [factors]))


@pytest.mark.parametrize("window", [64, 32])
@pytest.mark.parametrize("implementation", PATHS)
def test_what_is_flushed_on_the_way_is_doubted_until_it_counts(implementation, window):
    # A sharp step takes the state to 1e-36, the next chunk halves it, so that the correction there
    # is flushed to 0 and the state is not. Then the state grows by up to 1e33: in the same window,
    # or in the next one, which starts from an end that must be right by itself.
    start, a, w, _ = faded(1024, seed=0, low_chunk=None if window == 64 else 6)
    if implementation != PATHS[0]:  # a few, a block each
        start, a, w = (np.repeat(v[..., [737, 485, 180]], BLOCK, -1) for v in (start, a, w))
    init, xs = jnp.asarray(start[None]), [jnp.asarray(v[:, None]) for v in (a, w)]
    found = solved(sharp, implementation, init, xs, chunks=window // 4, window=window)
    # The sharp step amplifies rounding. 0.04 to 0.35 was seen where doubts ended with their window.
    np.testing.assert_allclose(found.states[0][-1], scanned(sharp, init, xs)[-1], rtol=2e-4)


@pytest.mark.parametrize("states", [1, 2])
@pytest.mark.parametrize("falls", [1, 2, 3])
@pytest.mark.parametrize("implementation", PATHS)
def test_a_gap_counts_by_what_is_left_of_the_states_before(implementation, falls, states):
    step, init, xs = falling_sign(falls)
    first = jnp.full((1, BLOCK), init)
    rows = [jnp.broadcast_to(x[:, None, None], (64, 1, BLOCK)) for x in xs]

    def beside_another(_, h, x):
        return [step(h[0], x), *(0.5 * other + 0.1 for other in h[1:])], []

    prepared = prepare(beside_another, [], [first] * states, rows)
    how = {"implementation": implementation, "chunks": 16, "window": 64, "certain": True}

    def run(first, rows):
        inputs, params = prepared.operands([], rows)
        return nonlinear_recurrence.forward(prepared.cell, [first] * states, inputs, params, **how)

    found = jax.jit(run, compiler_options=QUICK)(first, rows)
    # 80 units in the last place count as solved.
    np.testing.assert_allclose(found.states[0], scanned(step, first, rows), rtol=1e-5)
    assert np.allclose(found.states[0][-1], -4000) and np.all(found.fallback_steps == 0)


@pytest.mark.parametrize("seed", [0.0, 1e-20])
@pytest.mark.parametrize("implementation", PATHS)
def test_a_state_that_is_zero_near_a_windows_end_grows_from_what_comes_next(implementation, seed):
    # `b` is 0 from a step of the last chunk on, or 1e-20 at its last step, and grows from it alone.
    steps, reset, lanes = 64, 28, 256 if implementation == PATHS[0] else 4 * BLOCK
    rng = np.random.default_rng(0)
    gain, mix = np.full((steps, 1, lanes), 0.5), np.ones((steps, 1, lanes))
    drive = np.broadcast_to(10 ** rng.uniform(-1, 0, lanes), gain.shape)
    gain[reset], gain[reset + 1 : 44], gain[44:], mix[reset:] = 0, 1e10, 1, 0
    noise, comes = rng.normal(size=gain.shape), np.zeros(gain.shape)
    comes[31] = seed
    gain[33:] = np.where(seed, 1, gain[33:])
    xs = [jnp.asarray(v, jnp.float32) for v in (gain, drive, noise, mix, comes)]

    def step(h, x):
        (a, b), (gain, drive, add, mix, comes) = h, x
        a = drive * (a + 0.3 * jnp.sin(a)) + add
        new = a, gain * b + mix * a + comes
        return new, new

    init = (jnp.full((1, lanes), 0.5), jnp.zeros((1, lanes)))
    solver = jp.fused(implementation=implementation, window=32, chunks=8)
    (_, states), info = jax.jit(
        lambda init, xs: jp.solve_scan(step, init, xs, solver=solver), compiler_options=QUICK
    )(init, xs)
    assert info.converged and info.fallback_steps == 0
    found = np.asarray(states[1])[reset:]
    # 80 units in the last place count as solved; 2e4 times too much was seen.
    np.testing.assert_allclose(found, lax.scan(step, init, xs)[1][1][reset:], rtol=1e-5)
    assert np.all(found[-1] == 0) if seed == 0 else np.all(found[-1] > 1e-11)


@pytest.mark.parametrize("seed", [0.0, 1e-15])
@pytest.mark.parametrize("implementation", PATHS)
def test_what_dies_out_below_the_floats_does_not_grow_again(implementation, seed):
    # In the last chunk the state falls by 1e90, to 0, and what was left of it would grow by 1e30.
    # From the seed at the window's end it grows by 1e12: 0.008 for 0.001 was seen.
    steps, lanes = 128, 1024 if implementation == PATHS[0] else 4 * BLOCK
    rng = np.random.default_rng(0)
    gain, on = np.full((steps, 1, lanes), 0.9), np.ones((steps, 1, lanes))
    gain[57:60], gain[60:62], gain[62:], gain[64:68] = 1e-30, 1e15, 1, 1e3
    on[57:] = 0
    add = rng.normal(size=on.shape) * on
    add[63] = seed
    xs = [jnp.asarray(v, jnp.float32) for v in (gain, add, on)]

    def step(h, x):
        gain, add, on = x
        return gain * (h + 0.3 * jnp.sin(h) * on) + add

    init = jnp.full((1, lanes), 0.5)
    found = solved(step, implementation, init, xs, chunks=8, window=64)
    wanted = scanned(step, init, xs)
    assert np.all(wanted[60:63] == 0) and np.allclose(wanted[-1], seed * 1e12)
    # 80 units in the last place count as solved; before the fall states may cross 0.
    np.testing.assert_allclose(found.states[0][60:], wanted[60:], rtol=1e-5)
    assert np.all(found.fallback_steps == 0)


# In three steps the product becomes 0 and what it lacks falls below the floats as well; in one the
# Jacobian itself is 0, as that of a reset.
FALLS = {"three steps": (2.0**-100, 2.0**-29, 2.0**-7), "one step": (2.0**-68, 1.0, 1.0)}


@pytest.mark.parametrize("falls", FALLS)
@pytest.mark.parametrize("implementation", PATHS)
def test_what_a_product_lacks_is_not_lost_in_its_turn(implementation, falls):
    # `u` jumps, and takes `h` up by 2^-21 one pass later. In the last chunk `h` falls by 2^136. It
    # returns, and loses all but 2^-14 of itself: a correction left out is 0.8 % of the last state.
    steps, ends, size = 128, 112, 2.0**14
    fall = np.ones(steps)
    fall[ends : ends + 5] = *FALLS[falls], 2.0**68, 2.0**68
    again = np.where((fall < 1) & (falls == "one step"), fall, 1)
    jump, lift, less, more = np.zeros((4, steps))
    more += 1
    jump[3], lift[67], less[ends + 6], more[ends + 6] = 1, 2.0**-21, size * (1 - 2.0**-14), 2.0**14
    width = BLOCK
    xs = [
        jnp.asarray(np.broadcast_to(x[:, None, None], (steps, 1, width)), jnp.float32)
        for x in (fall, again, jump, lift, less, more, np.zeros(steps))
    ]

    def step(h, x):
        (u, v, h), (fall, again, jump, lift, less, more, nothing) = h, x
        h = again * (fall * h) * (1 + lift * v * v)
        new = u + jump, u, (h - less) * more + nothing * jnp.sin(h)
        return new, new

    init = (jnp.zeros((1, width)), jnp.zeros((1, width)), jnp.full((1, width), size))
    solver = jp.fused(implementation=implementation, window=steps, chunks=8)
    (_, states), info = jax.jit(
        lambda init, xs: jp.solve_scan(step, init, xs, solver=solver), compiler_options=QUICK
    )(init, xs)
    assert info.converged and info.fallback_steps == 0
    np.testing.assert_array_equal(states[2], lax.scan(step, init, xs)[1][2])


@pytest.mark.parametrize("size", [1.0, 1e6])
def test_a_leaf_that_is_zero_is_not_walked_for_a_large_one_beside_it(size):
    # The large one never leads to it: what its row lacks is nothing beside another's correction.
    steps, width = 256, 2 * BLOCK
    noise = jax.random.normal(jax.random.key(0), (steps, 1, width))

    def step(h, x):
        a, b = h
        a = 0.999 * a + 0.02 * size * jnp.tanh(x + 0.3 * a / size)
        new = a, 0.9 * b * (1 - 0.1 * jnp.tanh(b) ** 2)
        return new, new

    init = (jnp.full((1, width), size), jnp.zeros((1, width)))
    solver = jp.fused(implementation=PATHS[0], window=256, chunks=16)
    (_, (states, zeros)), info = jax.jit(
        lambda init, xs: jp.solve_scan(step, init, xs, solver=solver), compiler_options=QUICK
    )(init, noise)
    assert info.converged and info.fallback_steps == 0 and np.all(zeros == 0)
    # 80 units in the last place count as solved.
    np.testing.assert_allclose(states, lax.scan(step, init, noise)[1][0], rtol=1e-5)
