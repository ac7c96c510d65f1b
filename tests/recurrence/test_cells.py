"""Cells against slow float64 loops written from their equations, one unit of time at a time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxpara.recurrence import cells

TIME, BATCH, FEATURES, HIDDEN, HEADS = 12, 3, 5, 6, 2


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def split(params, x, gates):
    """`x W + b` for one sequence and step, in gates."""
    return np.split(x @ params["kernel"] + params["bias"], gates)


def blocks(h, matrices):
    """`h R` head by head, written as the sums it stands for."""
    heads, size, _ = matrices.shape
    out = np.zeros(heads * size)
    for k in range(heads):
        for j in range(size):
            out[k * size + j] = sum(h[k * size + i] * matrices[k, i, j] for i in range(size))
    return out


def gru_oracle(p, x, h):
    a = p["recurrent"]
    xz, xr, xn = split(p, x, 3)
    z, r = sigmoid(xz + a["update"] * h), sigmoid(xr + a["reset"] * h)
    n = np.tanh(xn + a["candidate"] * r * h)
    h = (1 - z) * h + z * n
    return (h,), h


def lstm_oracle(p, x, c, h):
    a = p["recurrent"]
    xf, xg, xo = split(p, x, 3)
    f = sigmoid(xf + a["forget"] * h + a["peephole_forget"] * c)
    g = np.tanh(xg + a["candidate"] * h)
    new = f * c + (1 - f) * g
    o = sigmoid(xo + a["output"] * h + a["peephole_output"] * new)
    h = o * np.tanh(new)
    return (new, h), h


def elman_oracle(p, x, h):
    h = np.tanh(split(p, x, 1)[0] + p["recurrent"]["hidden"] * h)
    return (h,), h


def slstm_oracle(p, x, c, n, m, h):
    """Unstabilised: `c` and `n` are the true sums, `m` is not used."""
    a = p["recurrent"]
    xg, xi, xf, xo = split(p, x, 4)
    i, f = np.exp(xi + a["input"] * h), sigmoid(xf + a["forget"] * h)
    o = sigmoid(xo + a["output"] * h)
    c = f * c + i * np.tanh(xg + a["candidate"] * h)
    n = f * n + i
    h = o * c / n
    return (c, n, m, h), h


def mingru_oracle(p, x, h):
    xz, xn = split(p, x, 2)
    h = (1 - sigmoid(xz)) * h + sigmoid(xz) * xn
    return (h,), h


def linear_oracle(p, x, h, low=0.0, high=1.0):
    xa, xu = split(p, x, 2)
    a = low + (high - low) * sigmoid(xa)
    h = a * h + np.sqrt(1 - a**2) * xu
    return (h,), h


def gru_heads_oracle(p, x, h):
    r_ = p["recurrent"]
    xz, xr, xn = split(p, x, 3)
    z, r = sigmoid(xz + blocks(h, r_["update"])), sigmoid(xr + blocks(h, r_["reset"]))
    h = (1 - z) * h + z * np.tanh(xn + blocks(r * h, r_["candidate"]))
    return (h,), h


def lstm_heads_oracle(p, x, c, h):
    r_ = p["recurrent"]
    xi, xf, xg, xo = split(p, x, 4)
    i, f = sigmoid(xi + blocks(h, r_["input"])), sigmoid(xf + blocks(h, r_["forget"]))
    o = sigmoid(xo + blocks(h, r_["output"]))
    c = f * c + i * np.tanh(xg + blocks(h, r_["candidate"]))
    h = o * np.tanh(c)
    return (c, h), h


def elman_heads_oracle(p, x, h):
    h = np.tanh(split(p, x, 1)[0] + blocks(h, p["recurrent"]["hidden"]))
    return (h,), h


# name -> factory, oracle, number of carry leaves
TABLE = {
    "para_gru": (cells.para_gru, gru_oracle, 1),
    "para_lstm": (cells.para_lstm, lstm_oracle, 2),
    "elman": (cells.elman, elman_oracle, 1),
    "slstm": (cells.slstm, slstm_oracle, 4),
    "min_gru": (cells.min_gru, mingru_oracle, 1),
    "linear": (cells.linear, linear_oracle, 1),
    "signed_linear": (
        partial(cells.linear, decays=(-1.0, 1.0)),
        partial(linear_oracle, low=-1.0),
        1,
    ),
    "bounded_linear": (
        partial(cells.linear, decays=(-0.5, 0.9)),
        partial(linear_oracle, low=-0.5, high=0.9),
        1,
    ),
    "gru_heads": (cells.gru_heads, gru_heads_oracle, 1),
    "lstm_heads": (cells.lstm_heads, lstm_heads_oracle, 2),
    "elman_heads": (cells.elman_heads, elman_heads_oracle, 1),
}
RECURRENT = [name for name in TABLE if "linear" not in name and name != "min_gru"]


def make(name, **options):
    factory = TABLE[name][0]
    if name.endswith("_heads"):
        options = {"heads": HEADS, **options}
    return factory(FEATURES, HIDDEN, **options)


def slow(name, params, x, reset=None):
    """The oracle over `x[time, batch, features]` from a zero state, in float64."""
    _, oracle, leaves = TABLE[name]
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = np.asarray(x, np.float64)
    ys = np.zeros((*x.shape[:2], HIDDEN))
    for b in range(x.shape[1]):
        carry = (np.zeros(HIDDEN),) * leaves
        for t in range(x.shape[0]):
            if reset is not None and reset[t, b]:
                carry = (np.zeros(HIDDEN),) * leaves
            carry, ys[t, b] = oracle(params, x[t, b], *carry)
    return ys


def problem(name, seed=0, **options):
    cell = make(name, **options)
    k_params, k_x = jax.random.split(jax.random.key(seed))
    params = cell.init(k_params)
    return cell, params, jax.random.normal(k_x, (TIME, BATCH, FEATURES))


@pytest.mark.parametrize("name", TABLE)
def test_cell_equals_a_float64_loop_over_its_equations(name):
    cell, params, x = problem(name, **({"scale": 2.0} if name in RECURRENT else {}))
    start = cell.start(params, (BATCH,))
    carry, ys = jax.jit(lambda p, c, x: cells.run(cell, p, c, x))(params, start, x)
    assert ys.shape == (TIME, BATCH, HIDDEN)
    # float32 over 12 steps of O(1) states with slopes up to about 2
    np.testing.assert_allclose(ys, slow(name, params, x), rtol=1e-5, atol=3e-6)
    assert jax.tree.map(jnp.shape, carry) == jax.tree.map(jnp.shape, start)
    np.testing.assert_array_equal(jax.tree.leaves(carry)[-1].reshape(BATCH, HIDDEN), ys[-1])


@pytest.mark.parametrize("name", TABLE)
def test_gradient_equals_finite_differences_in_float64(name):
    with jax.enable_x64(True):
        cell, params, x = problem(name)
        params, x = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, x[:5]))
        weights = jnp.cos(jnp.arange(5 * BATCH * HIDDEN, dtype=jnp.float64)).reshape(5, BATCH, -1)

        @jax.jit
        def loss(args):
            params, x, start = args
            carry, ys = cells.run(cell, params, start, x, scan=lax.scan)
            return jnp.sum(weights * ys) + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(carry))

        start = jax.tree.map(lambda s: s + 0.3, cell.start(params, (BATCH,)))
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(start))
        args = (params, x, start)
        flat, treedef = jax.tree.flatten(args)
        keys = jax.random.split(jax.random.key(7), len(flat))
        direction = jax.tree.unflatten(
            treedef,
            [jax.random.normal(k, f.shape, f.dtype) for k, f in zip(keys, flat, strict=True)],
        )
        gradient = jax.grad(loss)(args)
        # leaf by leaf, so that a large gradient cannot hide a wrong small one
        for i, leaf in enumerate(jax.tree.leaves(direction)):
            eps = 1e-6

            def moved(sign, i=i, leaf=leaf, eps=eps):
                shifted = [f + sign * eps * leaf if j == i else f for j, f in enumerate(flat)]
                return loss(jax.tree.unflatten(treedef, shifted))

            numeric = (moved(1) - moved(-1)) / (2 * eps)
            analytic = jnp.vdot(jax.tree.leaves(gradient)[i], leaf)
            # central differences: eps^2 of truncation, 1e-16 / eps of rounding, through 5 steps
            np.testing.assert_allclose(analytic, numeric, rtol=2e-6, atol=2e-8)


@pytest.mark.parametrize("name", TABLE)
def test_carry_is_float32_under_bfloat16_inputs_and_parameters(name):
    cell, params, x = problem(name)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    start = cell.start(narrow, (BATCH,))
    carry, ys = jax.eval_shape(lambda: cells.run(cell, narrow, start, x.astype(jnp.bfloat16)))
    assert {leaf.dtype for leaf in jax.tree.leaves((start, carry, ys))} == {jnp.dtype("float32")}
    gates = jax.eval_shape(cell.project, params, x.astype(jnp.bfloat16))
    assert isinstance(gates, tuple)
    assert {g.dtype for g in gates} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("name", ["para_gru", "slstm", "lstm_heads"])
def test_reset_restarts_a_document_inside_a_row(name):
    cell, params, x = problem(name)
    reset = np.zeros((TIME, BATCH), bool)
    reset[4, 0] = reset[9, 0] = reset[0, 1] = True
    start = cell.start(params, (BATCH,))
    _, ys = cells.run(cell, params, start, x, reset=jnp.asarray(reset))
    # float32 over 12 steps, as without resets above
    np.testing.assert_allclose(ys, slow(name, params, x, reset), rtol=1e-5, atol=3e-6)
    _, without = cells.run(cell, params, start, x)
    assert np.max(np.abs(ys[4:, 0] - without[4:, 0])) > 1e-3


def test_a_sequence_in_pieces_equals_the_sequence_whole():
    cell, params, x = problem("para_lstm")
    start = cell.start(params, (BATCH,))
    whole_carry, whole = cells.run(cell, params, start, x)
    carry, parts = start, []
    for piece in (x[:5], x[5:6], x[6:]):
        carry, ys = cells.run(cell, params, carry, piece)
        parts.append(ys)
    # the projection matmul may sum in another order for another number of rows
    np.testing.assert_allclose(jnp.concatenate(parts), whole, rtol=1e-6, atol=1e-6)
    for a, b in zip(carry, whole_carry, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_slstm_is_finite_where_the_unstabilised_formula_overflows():
    cell, params, x = problem("slstm")
    bias = np.array(params["bias"])
    bias[HIDDEN : HIDDEN + HIDDEN // 2] += 1000.0  # input gates: exp(1000) overflows float64
    bias[HIDDEN + HIDDEN // 2 : 2 * HIDDEN] -= 1000.0  # and exp(-1000) underflows to 0 / 0
    params = {**params, "bias": jnp.asarray(bias)}
    with np.errstate(over="ignore", invalid="ignore"):
        assert not np.isfinite(slow("slstm", params, x)).any()

    def total(params):
        return jnp.sum(cells.run(cell, params, cell.start(params, (BATCH,)), x)[1] ** 2)

    _, ys = cells.run(cell, params, cell.start(params, (BATCH,)), x)
    assert jnp.isfinite(ys).all()
    assert jnp.max(jnp.abs(ys[..., : HIDDEN // 2])) > 1e-2
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(jax.grad(total)(params)))


def test_slstm_output_does_not_depend_on_a_common_shift_of_the_input_gate():
    cell, params, x = problem("slstm")
    shifted = {**params, "bias": params["bias"].at[HIDDEN : 2 * HIDDEN].add(300.0)}
    _, ys = cells.run(cell, params, cell.start(params, (BATCH,)), x)
    _, moved = cells.run(cell, shifted, cell.start(params, (BATCH,)), x)
    # x + 300 has 1.5e-5 less resolution in float32, and exp turns that into a relative error
    np.testing.assert_allclose(ys, moved, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", RECURRENT)
def test_clip_bounds_the_weights_in_use_and_lets_their_gradient_through(name):
    cell, params, x = problem(name, clip=0.25, scale=4.0)
    free = make(name)
    inside = cells.clip_recurrent(0.25)(params)
    start = cell.start(params, (BATCH,))
    clipped, projected = (
        jax.value_and_grad(
            lambda p, c=c: jnp.sum(cells.run(c, p, start, x, scan=lax.scan)[1] ** 2)
        )(p)
        for c, p in ((cell, params), (free, inside))
    )
    for a, b in zip(jax.tree.leaves(clipped), jax.tree.leaves(projected), strict=True):
        # float32 sums over 12 steps and all weights of O(1) terms, in two programs
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(clipped[1]["recurrent"]))


def test_clip_recurrent_touches_recurrent_leaves_only():
    params = {
        "blocks": ({"mixer": {"recurrent": {"update": jnp.array([[-2.0, 0.1]])}}},),
        "kernel": jnp.array([[9.0]]),
    }
    out = cells.clip_recurrent(0.5)(params)
    np.testing.assert_allclose(out["blocks"][0]["mixer"]["recurrent"]["update"], [[-0.5, 0.1]])
    np.testing.assert_array_equal(out["kernel"], params["kernel"])


@pytest.mark.parametrize("name", TABLE)
def test_initialisation_follows_scale_and_time_constants(name):
    hidden = 512
    options = {"heads": 8} if name.endswith("_heads") else {}
    cell = TABLE[name][0](16, hidden, **options)
    params = cell.init(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(jnp.std(params["kernel"]), 16**-0.5, rtol=0.05)
    for leaf in jax.tree.leaves(params.get("recurrent", {})):
        width = 0.5 if leaf.ndim == 1 else 0.5 * leaf.shape[-1] ** -0.5
        assert 0.98 * width < jnp.max(jnp.abs(leaf)) <= width
        assert abs(jnp.mean(leaf)) < 0.1 * width
    if "elman" not in name:
        # log tau is uniform in 0 .. log 64, whichever gate holds it and whatever its sign
        gates = jnp.abs(params["bias"].reshape(-1, hidden))
        gate = gates[jnp.argmax(jnp.mean(gates, axis=1))]
        np.testing.assert_allclose(jnp.mean(gate), np.log(64) / 2, rtol=0.1)  # 4 sigma
        assert jnp.max(gate) <= np.log(64) + 1e-5


@pytest.mark.untyped
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: cells.para_gru(0, 4), "features=0: give a whole number, at least 1"),
        (lambda: cells.para_lstm(3, -1), "hidden=-1: give a whole number, at least 1"),
        (lambda: cells.para_gru(3, 4, clip=0.0), "clip=0.0 must be positive, or None"),
        (lambda: cells.gru_heads(3, 6, heads=4), r"hidden=6 .* heads=4; use one of \[1, 2, 3, 6\]"),
        (lambda: cells.clip_recurrent(-1.0), "bound=-1.0 must be positive"),
        (
            lambda: cells.min_gru(3, 4, time_constants=(64.0, 1.0)).init(jax.random.key(0)),
            r"time_constants=\(64.0, 1.0\) must be \(shortest, longest\)",
        ),
        (
            lambda: make("para_gru").project(
                make("para_gru").init(jax.random.key(0)), jnp.zeros((2, 9))
            ),
            r"x has 9 features .* features=5",
        ),
        (
            lambda: cells.run(
                *problem("para_gru")[:2],
                jnp.zeros((BATCH, HIDDEN)),
                problem("para_gru")[2],
                reset=jnp.zeros((TIME,), bool),
            ),
            r"reset has shape \(12,\), x has leading axes \(12, 3\)",
        ),
    ],
)
def test_bad_input_says_what_was_given_and_what_is_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.untyped
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda cell, params: cell.start(params, 4), r"batch_shape=4; .*start\(params, \(4,\)\)"),
        (
            lambda cell, params: cells.run(params, cell, jnp.zeros((2, 4)), jnp.zeros((9, 2, 3))),
            r"got a dict in place of the cell; the cell comes first: expected run\(cell, params, ",
        ),
    ],
)
def test_arguments_of_cells_in_another_order_are_named(call, message):
    cell = cells.para_gru(3, 4)
    with pytest.raises(TypeError, match=message):
        call(cell, cell.init(jax.random.key(0)))


@pytest.mark.parametrize("decays", [(0.5, 0.5), (-1.5, 1.0), (0.0, 1.01)])
def test_decays_out_of_order_or_beyond_one_are_refused(decays):
    with pytest.raises(ValueError, match="-1 <= low < high <= 1"):
        cells.linear(FEATURES, HIDDEN, decays=decays)
