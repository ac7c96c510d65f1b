"""The scale that a correction is measured by, and what counts as solved, row by row."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxpara as jp
from jaxpara.recurrence.solve import certified
from pallas_kernels import certificate


@pytest.mark.parametrize("count", [1, 7, 8, 9, 50, 300])
@pytest.mark.parametrize("window", [1, 4, 15, 16, 40, 181])
def test_the_scale_looks_back_over_the_window_and_never_ahead(count, window):
    # Magnitudes within SLACK of one another, so that only the window decides.
    rows = np.random.default_rng(count).uniform(1, 100, (count, 2, 3)).astype(np.float32)
    first = np.full((2, 3), 0.5, np.float32)
    (found,) = certified.scales([rows], [rows], [first], window)
    for t in range(count):
        least = rows[max(0, t - window + 1) : t + 1].max(0)
        most = rows[max(0, t - 2 * window - certified._BLOCK) : t + 1].max(0)
        assert np.all(least <= found[t]) and np.all(found[t] <= most)
    # A peak in the last row reaches no other.
    rows[-1] = 120
    (other,) = certified.scales([rows], [rows], [first], window)
    np.testing.assert_array_equal(other[:-1], found[:-1])
    assert np.all(np.asarray(other[-1]) == 120)


def test_a_peak_is_forgotten_behind_the_window_and_beyond_the_slack():
    rows = np.ones((200, 1), np.float32)
    rows[10] = 100
    (found,) = certified.scales([rows], [rows], [rows[0]], 16)
    assert found[25, 0] == 100 and found[60, 0] == 1
    rows[10] = 1e6
    (found,) = certified.scales([rows], [rows], [rows[0]], 16)
    assert found[12, 0] == certificate.SLACK


LIMIT = certified.limit(jnp.float32, None)
ONE = jnp.float32(1)
# end, start, correction, scale -> within, exact
CASES = {
    "equal": ((1.0, 1.0, 0.0, 1.0), (True, True)),
    "equal, corrected": ((1.0, 1.0, LIMIT / 2, 1.0), (True, True)),
    "near": ((1.0, 1.0 + 1e-6, LIMIT / 2, 1.0), (True, False)),
    "at the limit": ((1.0, 1.0 + 1e-6, LIMIT, 1.0), (True, False)),
    "beyond": ((1.0, 1.0 + 1e-6, 1.01 * LIMIT, 1.0), (False, False)),
    "nothing beside nothing": ((0.0, 0.0, 0.0, 0.0), (True, True)),
    "something beside nothing": ((0.0, 0.0, 1e-30, 0.0), (False, False)),
    "the other zero": ((0.0, -0.0, 0.0, 1.0), (False, False)),
    "NaN twice": ((np.nan, np.nan, np.nan, np.nan), (False, False)),
    "NaN with a correction of zero": ((np.nan, np.nan, 0.0, np.nan), (False, False)),
    "infinity twice": ((np.inf, np.inf, 0.0, np.inf), (False, False)),
    "dropped": ((1.0, 1.0, np.inf, 1.0), (False, False)),
    "dropped beside the largest": ((1.0, 1.0, np.inf, 3e38), (False, False)),
}


@pytest.mark.parametrize("name", CASES)
def test_what_counts_as_solved(name):
    numbers, wanted = CASES[name]
    good = (1.0, 1.0, 0.0, 1.0)
    # Rows of two entries, one of which is good: the worse one decides, whichever comes first.
    for pair in ((numbers, good), (good, numbers)):
        leaves = [[jnp.asarray([part], jnp.float32)] for part in zip(*pair, strict=True)]
        within, agreeing = certified.tested(*leaves, None, ONE)
        assert (bool(within[0]), bool(agreeing[0])) == wanted
    # A tolerance so large that its limit overflows lets nothing dropped pass.
    leaves = [[jnp.asarray([v])] for v in (1.0, 1.0, np.inf, 3e38)]
    assert not certified.tested(*leaves, 1e30, ONE)[0][0]


def test_corrections_are_carried_where_they_would_be_flushed():
    carried = certified.carrying([jnp.float32(3)], abs)
    end, start = jnp.asarray([2.4e-38, 1.0]), jnp.asarray([1.5e-38, 1.0])
    (gap,) = certified.gaps([end], [start], carried)
    np.testing.assert_allclose(gap, [0.9e-38 * certificate.RAISE, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(certified.moved_by(start, gap, carried), end)
    # One that counts beside a state of its own size counts for nothing beside the least number.
    assert certified.below(gap, 0.5, end, carried).tolist() == [True, True]
    assert certified.below(1e8 * gap, 0.5, 1e6 * end, carried).tolist() == [False, True]
    # Large states are carried as they are, and so are those of which no correction tells.
    assert certified.carrying([jnp.float32(1e30)], abs) == 1
    assert certified.carrying([jnp.bfloat16(1)], abs) == 1


def test_a_correction_that_moves_nothing_leaves_the_sign_of_a_zero():
    value = jnp.asarray([0.0, -0.0, -0.0, 1.0])
    delta = jnp.asarray([-1e-37, 1e-37, 0.0, 1e-10])
    moved = certified.moved_by(value, delta, jnp.float32(certificate.RAISE))
    np.testing.assert_array_equal(np.signbit(moved), [False, True, True, False])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_exact_is_bit_for_bit_in_every_dtype(dtype):
    one = jnp.asarray(1, dtype)
    ends = jnp.asarray([[1, 2], [1, 2], [0, 0], [jnp.nan, 0]], dtype)
    starts = ends.at[1, 0].add(jnp.finfo(dtype).eps * one).at[2, 1].multiply(-1)
    assert certified.exact([ends], [starts]).tolist() == [True, False, False, False]


@pytest.mark.parametrize("solver", [jp.newton(), jp.jacobi(), jp.shooting()])
def test_exact_states_count_whatever_an_infinite_jacobian_makes_of_their_corrections(solver):
    def step(h, x):
        h = jnp.sqrt(h) * x
        return h, h

    (_, ys), info = jp.solve_scan(step, jnp.zeros(3), jnp.ones((40, 3)), solver=solver)
    np.testing.assert_array_equal(ys, np.zeros((40, 3)))
    assert info.converged and info.fallback_steps == 0
