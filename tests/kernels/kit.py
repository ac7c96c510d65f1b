"""Cells for the tests of the fused kernels, by hand, and what they must compute, in float64.

A `Case` holds the same recurrence twice: as an `ElementwiseCell` with its partial derivatives
written out (elementwise primitives that every kernel backend lowers, and no autodiff), and as a
plain step of `jax.numpy` that the oracle scans and differentiates in float64. As users' cells do,
it takes a backend's own logistic and tanh, the rough ones of first guesses too.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cell import ElementwiseCell


class Case(NamedTuple):
    """A cell, its meaning, and how to draw operands for it.

    Attributes:
      name: for test ids.
      cell: what a kernel is given.
      truth: `(states, inputs, params) -> states`, any float dtype: the oracle's step.
      draw: `(rng, name of the operand, index, shape, scale) -> values`; `scale` is that of the
        recurrent weights (1 is what training gives, 4 to 6 is hard for a parallel solve).
      affine: the step is affine in the state.
    """

    name: str
    cell: ElementwiseCell
    truth: Callable
    draw: Callable
    affine: bool = False


class Operands(NamedTuple):
    """Time-major operands: `init` K x [B, D], `xs` [T, B, D] each, `params` [1, D] each."""

    init: list[jax.Array]
    xs: list[jax.Array]
    params: list[jax.Array]
    cotangents: list[jax.Array]


class Truth(NamedTuple):
    """Float64 states, and the gradients of `sum(states * cotangents)`; params' are [B, D] each."""

    states: list[np.ndarray]
    d_init: list[np.ndarray]
    d_xs: list[np.ndarray]
    d_params: list[np.ndarray]


# What a backend may replace, see `ElementwiseCell.using`.
FUNCTIONS = {
    "logistic": lambda x: 1.0 / (1.0 + jnp.exp(-x)),
    "tanh": jnp.tanh,
    "one_minus_square": lambda x: (1.0 - x) * (1.0 + x),
}


def from_partials(
    states: int, inputs: int, params: int, written, functions=FUNCTIONS
) -> ElementwiseCell:
    """A cell from `written(f, states, inputs, params) -> (new, d_states, d_inputs, d_params)`.

    Each derivative is a matrix `[state leaf][operand]`; an entry that is always zero is None. `f`
    are the functions.
    """
    partials = functools.partial(written, functions)

    def using(others):
        return from_partials(states, inputs, params, written, functions | dict(others))

    def step(h, x, p):
        return partials(h, x, p)[0]

    def dot(pairs, like):
        terms = [a * b for a, b in pairs if a is not None]
        return sum(terms[1:], terms[0]) if terms else like * 0.0

    def push(h, x, p, columns):
        new, by_state, _, _ = partials(h, x, p)
        rows = range(states)
        pushed = [
            [dot([(by_state[i][j], column[j]) for j in rows], column[0]) for i in rows]
            for column in columns
        ]
        return new, pushed

    def transposed(matrix, width, g):
        return [dot([(matrix[i][j], g[i]) for i in range(states)], g[0]) for j in range(width)]

    def pull(h, x, p, g):
        _, by_state, by_input, by_param = partials(h, x, p)
        return (
            transposed(by_state, states, g),
            transposed(by_input, inputs, g),
            transposed(by_param, params, g),
        )

    def pull_state(h, x, p, g):
        return transposed(partials(h, x, p)[1], states, g)

    return ElementwiseCell(states, inputs, params, step, push, pull, pull_state, using)


def rounded(cell: ElementwiseCell, dtype=jnp.bfloat16) -> ElementwiseCell:
    """The cell with a carry of a narrow dtype: every new state is rounded as lax.scan would."""

    def narrow(values):
        return [v.astype(dtype).astype(jnp.float32) for v in values]

    def push(h, x, p, columns):
        new, pushed = cell.push(h, x, p, columns)
        return narrow(new), pushed

    step = lambda h, x, p: narrow(cell.step(h, x, p))  # noqa: E731
    using = lambda functions: rounded(cell.using(functions), dtype)  # noqa: E731
    return cell._replace(step=step, push=push, using=using, rounds=True)


# GRU with diagonal recurrences: inputs are the projected gates, parameters the three diagonals.


def _gru_partials(f, h, x, p):
    (h,), (xz, xr, xc), (wz, wr, wc) = h, x, p
    z, r = f["logistic"](xz + wz * h), f["logistic"](xr + wr * h)
    c = f["tanh"](xc + wc * (r * h))
    new = (1.0 - z) * h + z * c
    dz, dr, dc = z * (1.0 - z) * (c - h), r * (1.0 - r) * h, z * f["one_minus_square"](c)
    dcr = dc * wc * dr
    by_state = 1.0 - z + dz * wz + dc * wc * r + dcr * wr
    return [new], [[by_state]], [[dz, dcr, dc]], [[dz * h, dcr * h, dc * r * h]]


def _gru_truth(h, x, p):
    z, r = jax.nn.sigmoid(x[0] + p[0] * h[0]), jax.nn.sigmoid(x[1] + p[1] * h[0])
    return [(1 - z) * h[0] + z * jnp.tanh(x[2] + p[2] * r * h[0])]


# LSTM with diagonal recurrences; the states are (c, h), the gates f, i, o, g.


def _lstm_partials(functions, s, x, p):
    c, h = s
    tanh, one_minus_square = functions["tanh"], functions["one_minus_square"]
    f, i, o = (functions["logistic"](x[k] + p[k] * h) for k in range(3))
    g = tanh(x[3] + p[3] * h)
    new = f * c + i * g
    t = tanh(new)
    gates = [f * (1.0 - f) * c, i * (1.0 - i) * g, None, i * one_minus_square(g)]
    c_by_h = gates[0] * p[0] + gates[1] * p[1] + gates[3] * p[3]
    through = o * one_minus_square(t)
    out = o * (1.0 - o) * t
    h_gates = [through * gates[0], through * gates[1], out, through * gates[3]]
    return (
        [new, o * t],
        [[f, c_by_h], [through * f, through * c_by_h + out * p[2]]],
        [gates, h_gates],
        [[None if d is None else d * h for d in row] for row in (gates, h_gates)],
    )


def _lstm_truth(s, x, p):
    f, i, o = (jax.nn.sigmoid(x[k] + p[k] * s[1]) for k in range(3))
    c = f * s[0] + i * jnp.tanh(x[3] + p[3] * s[1])
    return [c, o * jnp.tanh(c)]


# Affine recurrences: inputs a (row-major) and b.


def _affine_partials(size):
    def partials(f, h, x, p):
        del f, p
        a, b = x[: size * size], x[size * size :]
        rows = [a[size * i : size * (i + 1)] for i in range(size)]
        new = [
            sum((r * s for r, s in zip(row, h, strict=True)), b[i]) for i, row in enumerate(rows)
        ]
        one = h[0] * 0.0 + 1.0
        by_a = [[h[j] if i == k else None for k in range(size) for j in range(size)]
                for i in range(size)]  # fmt: skip
        by_b = [[one if i == k else None for k in range(size)] for i in range(size)]
        return new, rows, [a + b for a, b in zip(by_a, by_b, strict=True)], [[]] * size

    return partials


def _affine_truth(size):
    def truth(h, x, p):
        del p
        a = jnp.stack(x[: size * size]).reshape(size, size, *h[0].shape)
        return list(jnp.einsum("ij...,j...->i...", a, jnp.stack(h)) + jnp.stack(x[size * size :]))

    return truth


# Three states, with where, clip and max: continuous, piecewise smooth, and like nothing else.


def _strange_partials(f, s, x, p):
    u, v, w = s
    t = f["tanh"](p[0] * v + x[0])
    shifted = u + x[1]
    n = f["tanh"](w)
    new = [
        0.6 * u + 0.3 * t,
        jnp.where(w > 0.0, 0.5, 0.2) * w + 0.4 * jnp.minimum(jnp.maximum(shifted, -1.0), 1.0),
        p[1] * jnp.maximum(0.5 * v, -0.5) - 0.3 * u * n,
    ]
    zero = u * 0.0
    dt = 0.3 * f["one_minus_square"](t)
    slope = jnp.where(w > 0.0, 0.5 + zero, 0.2 + zero)
    inside = jnp.where(jnp.abs(shifted) < 1.0, 0.4 + zero, zero)
    leak = jnp.where(v > -1.0, 0.5 + zero, zero)
    return (
        new,
        [
            [zero + 0.6, dt * p[0], None],
            [inside, None, slope],
            [-0.3 * n, p[1] * leak, -0.3 * u * f["one_minus_square"](n)],
        ],
        [[dt, None], [None, inside], [None, None]],
        [[dt * v, None], [None, None], [None, jnp.maximum(0.5 * v, -0.5)]],
    )


def _strange_truth(s, x, p):
    u, v, w = s
    return [
        0.6 * u + 0.3 * jnp.tanh(p[0] * v + x[0]),
        jnp.where(w > 0, 0.5 * w, 0.2 * w) + 0.4 * jnp.clip(u + x[1], -1, 1),
        p[1] * jnp.maximum(0.5 * v, -0.5) - 0.3 * u * jnp.tanh(w),
    ]


def _normal(rng, operand, index, shape, scale):
    del index
    return rng.uniform(-scale, scale, shape) if operand == "params" else rng.normal(size=shape)


def _affine_draw(size):
    def draw(rng, operand, index, shape, scale):
        if operand == "xs" and index < size * size:  # spectral radius below about `scale`
            return rng.uniform(-0.98, 0.98, shape) * scale / size
        return rng.normal(size=shape)

    return draw


def _case(name, sizes, partials, truth, draw=_normal, affine=False) -> Case:
    cell = from_partials(*sizes, partials)
    return Case(name, cell, truth, draw, affine)


GRU = _case("gru", (1, 3, 3), _gru_partials, _gru_truth)
LSTM = _case("lstm", (2, 4, 4), _lstm_partials, _lstm_truth)
AFFINE = _case("affine", (1, 2, 0), _affine_partials(1), _affine_truth(1), _affine_draw(1), True)
AFFINE2 = _case("affine2", (2, 6, 0), _affine_partials(2), _affine_truth(2), _affine_draw(2), True)
STRANGE = _case("strange", (3, 2, 2), _strange_partials, _strange_truth)
CASES = [GRU, LSTM, AFFINE, AFFINE2, STRANGE]


def draw(case: Case, steps, batch, width, *, scale=1.0, seed=0, dtype=jnp.float32, carry=None):
    """Operands with inputs and parameters stored in `dtype`, states in `carry` (or `dtype`)."""
    rng = np.random.default_rng(seed)
    cell = case.cell

    def some(operand, count, shape, kind):
        values = [case.draw(rng, operand, i, shape, scale) for i in range(count)]
        return [jnp.asarray(v.astype(np.float32)).astype(kind) for v in values]

    carry = carry or dtype
    return Operands(
        some("init", cell.states, (batch, width), carry),
        some("xs", cell.inputs, (steps, batch, width), dtype),
        some("params", cell.params, (1, width), dtype),
        some("cotangents", cell.states, (steps, batch, width), carry),
    )


def oracle(case: Case, operands: Operands, *, reverse=False, linearise_at=None) -> Truth:
    """Float64 `lax.scan` of `case.truth` and its vjp at the operands' stored values.

    With `linearise_at`, the states (stored, one array a leaf) at which the gradient is taken
    step by step: what backpropagation must give where the states themselves are chaotic.
    """
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), operands)
        params = [jnp.broadcast_to(p, wide.init[0].shape) for p in wide.params]

        def solve(init, xs, params):
            def step(h, x):
                new = case.truth(h, x, params)
                return new, new

            return jax.lax.scan(step, init, xs, reverse=reverse)[1]

        def grafted(init, xs, params):
            # Values from `linearise_at`, derivatives from the step there.
            def step(h, inputs):
                x, given = inputs
                new = case.truth(h, x, params)
                new = [g + (n - jax.lax.stop_gradient(n)) for g, n in zip(given, new, strict=True)]
                return new, new

            given = [jnp.asarray(np.asarray(s, np.float64)) for s in linearise_at]
            return jax.lax.scan(step, init, (xs, given), reverse=reverse)[1]

        @jax.jit
        def both(init, xs, params, cotangents):
            states, vjp = jax.vjp(solve if linearise_at is None else grafted, init, xs, params)
            return states, vjp(cotangents)

        states, gradients = both(wide.init, wide.xs, params, wide.cotangents)
        return jax.tree.map(np.asarray, Truth(states, *gradients))


def relative_error(got, expected) -> float:
    """Largest difference over largest magnitude, per array; 0 for no arrays."""
    worst = 0.0
    for g, e in zip(got, expected, strict=True):
        g, e = np.asarray(g, np.float64), np.asarray(e, np.float64)
        assert g.shape == e.shape, (g.shape, e.shape)
        difference = np.abs(g - e).max() / max(np.abs(e).max(), 1e-30)
        worst = max(worst, difference if np.isfinite(difference) else np.inf)
    return worst


def scanned(cell: ElementwiseCell, operands: Operands, *, reverse=False) -> list[jax.Array]:
    """Float32 `lax.scan` of the cell's own step: what a sequential completion must equal."""
    params = [p.astype(jnp.float32) for p in operands.params]

    def step(h, x):
        new = cell.step(h, [v.astype(jnp.float32) for v in x], params)
        return new, new

    init = [h.astype(jnp.float32) for h in operands.init]
    states = jax.jit(lambda init, xs: jax.lax.scan(step, init, xs, reverse=reverse)[1])(
        init, operands.xs
    )
    return [s.astype(i.dtype) for s, i in zip(states, operands.init, strict=True)]


def step_error(case: Case, operands: Operands, states, *, reverse=False) -> float:
    """How far any step is from the true one, in float64, at the kernel's own state before it.

    It grows nowhere, so that it judges chaotic cells as well as tame ones.
    """
    with jax.enable_x64(True):
        wide = lambda arrays: [jnp.asarray(np.asarray(a, np.float64)) for a in arrays]  # noqa: E731
        init, xs, params, states = map(wide, (operands.init, operands.xs, operands.params, states))
        join = (lambda i, s: [s[1:], i[None]]) if reverse else (lambda i, s: [i[None], s[:-1]])
        before = [jnp.concatenate(join(i, s)) for i, s in zip(init, states, strict=True)]
        return relative_error(states, case.truth(before, xs, params))
