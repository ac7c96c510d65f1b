"""Recurrences of every structure, their float64 oracle, and the solvers: the axes of the table.

Parameters, inputs and the recurrent scale are arguments, never constants, so that one
compilation serves every setting of a test.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp

TIME, BATCH, WIDTH = 22, 2, 4


class Case(NamedTuple):
    """`step(params)` is what a scan takes; `draw(rng, time)` gives `(params, init, xs)`."""

    step: Callable[..., Any]
    draw: Callable[..., Any]
    structure: type


def normal(rng, *shape):
    return (0.5 * rng.standard_normal(shape)).astype(np.float32)


def gru(params):
    """A diagonal GRU whose recurrent weights are `scale * weights`."""
    weights = params["scale"] * params["weights"]

    def f(h, x):
        z = jax.nn.sigmoid(weights[0] * h + x[0])
        r = jax.nn.sigmoid(weights[1] * h + x[1])
        n = jnp.tanh(weights[2] * r * h + x[2])
        h = (1 - z) * h + z * n
        return h, {"state": h, "seen": h * x[0] + params["weights"][0]}

    return f


def lstm(params):
    """A diagonal peephole LSTM: two leaves, 2x2 blocks."""
    weights = params["scale"] * params["weights"]

    def f(carry, x):
        c, h = carry["c"], carry["h"]
        forget = jax.nn.sigmoid(weights[0] * h + weights[3] * c + x[0])
        c = forget * c + (1 - forget) * jnp.tanh(weights[1] * h + x[1])
        h = jax.nn.sigmoid(weights[2] * h + x[2]) * jnp.tanh(c)
        return {"c": c, "h": h}, (h, c * x[0])

    return f


def heads(params):
    """An Elman cell with two heads of two units."""
    weights = params["scale"] * params["weights"]

    def f(h, x):
        h = jnp.tanh(jnp.einsum("bhi,hij->bhj", h, weights) + x)
        return h, h**2

    return f


def dense(params):
    """An Elman cell with a full recurrent matrix."""
    weights = params["scale"] * params["weights"]

    def f(h, x):
        h = jnp.tanh(h @ weights + x)
        return h, jnp.sum(h * x, axis=-1)

    return f


def _drawer(weights, init, xs):
    def draw(rng, time=TIME, scale=0.7):
        params = {"scale": np.float32(scale), "weights": normal(rng, *weights)}
        start = jax.tree.map(lambda shape: normal(rng, *shape), init, is_leaf=_is_shape)
        return params, start, normal(rng, time, *xs)

    return draw


def _is_shape(leaf):
    return isinstance(leaf, tuple)


STATE, SPLIT = (BATCH, WIDTH), (BATCH, 2, 2)
CASES = {
    "diagonal": Case(gru, _drawer((3, WIDTH), STATE, (3, *STATE)), jp.structure.Diagonal),
    "two_leaves": Case(
        lstm, _drawer((4, WIDTH), {"c": STATE, "h": STATE}, (3, *STATE)), jp.structure.Block
    ),
    "per_head": Case(heads, _drawer((2, 2, 2), SPLIT, SPLIT), jp.structure.Block),
    "dense": Case(dense, _drawer((WIDTH, WIDTH), STATE, STATE), jp.structure.Dense),
}

PARALLEL = {
    "shooting": jp.shooting(chunks=5),
    "newton": jp.newton(),
    "newton_associative": jp.newton(linear="associative"),
    "quasi_newton": jp.quasi_newton(),
    "jacobi": jp.jacobi(),
}
SOLVERS = {**PARALLEL, "sequential": jp.sequential(), "auto": jp.auto()}
# `make check` runs these rows of a table; the others are marked slow.
EVERYDAY = {"shooting", "newton", "sequential", "auto"}


def solver_rows(names):
    """Names of solvers as rows of a table."""
    return [
        pytest.param(name, marks=() if name in EVERYDAY else pytest.mark.slow) for name in names
    ]


# Compiling is nearly all of the time of these tests: what runs for milliseconds need not
# be optimised.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def cotangents(case, args):
    """Fixed weights for every number that a scan returns: they make a loss of it."""
    params, init, xs = args
    shapes = jax.eval_shape(lambda: lax.scan(case.step(params), init, xs))
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda s: normal(rng, *s.shape), shapes)


def weighted(out, weights):
    """`sum(weights * out)` over all leaves."""
    products = jax.tree.map(lambda o, w: jnp.sum(o * w), out, weights)
    return sum(jax.tree.leaves(products))


def in_float64(function, *args):
    """`function(*args)` in float64 throughout, as NumPy."""
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda a: jnp.asarray(a, jnp.float64) if np.asarray(a).dtype.kind == "f" else a, args
        )
        return jax.tree.map(np.asarray, jax.jit(function, compiler_options=QUICK)(*wide))


def assert_close(found, wanted, tolerance=2e-6):
    """Every leaf within `tolerance` of the largest magnitude in it.

    2e-6 is 16 ulp of float32: what summing T = 22 rounded terms may cost. A scalar is
    measured against the largest magnitude of all leaves, because the terms of the sum
    that it is may cancel.
    """
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    largest = max(np.max(np.abs(w), initial=0.0) for w in jax.tree.leaves(wanted))
    pairs = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True)
    for (path, f), w in pairs:
        f, w = np.asarray(f, np.float64), np.asarray(w, np.float64)
        assert f.shape == w.shape
        size = largest if w.ndim == 0 else np.max(np.abs(w), initial=0.0)
        worst = np.max(np.abs(f - w), initial=0.0)
        where = jax.tree_util.keystr(path)
        assert worst <= tolerance * size, f"{where}: {worst:.3g} off, size {size:.3g}"


def _fall(h, x):
    u = x[2] * h
    return x[0] * h + x[1] * u / jnp.sqrt(1 + u * u) + x[3]


def falling_sign(falls, steps=64, length=4):
    """`(step, init, inputs)`: a state of 1e10 falls chunk by chunk, and only its sign is left.

    The steps are flat on both sides of 0, so that a chunk with the wrong sign closes its gap to the
    next one. The last state is -4000. The step is the same object each time.
    """
    a, w, k, b = np.ones(steps), np.zeros(steps), np.ones(steps), np.zeros(steps)
    b[length + 1] = -1e10
    at = 2 * length + 1
    for size, gain in [*[(1e10, 1)] * (falls - 1), (1e5, 1), (1, 1), (4e3, 1e4)]:
        a[at], w[at], k[at] = 0, size, gain
        at += length

    return _fall, jnp.float32(20), [jnp.asarray(v, jnp.float32) for v in (a, w, k, b)]


def sharp(h, x, sin=jnp.sin):
    """A step that scales the state by `x[0]` and is as sharp as `x[1]`."""
    return x[0] * (h * (1 + 0.4 * sin(x[1] * h)))


def faded(width, seed, hold=1, low_chunk=None):
    """A sharp step takes a state to 1e-36. `hold` chunks of 4 steps later it grows by up to 1e33.

    Returns `(init, factors, sharpness, last)` for `sharp`: `[width]`, twice `[64, width]`, and the
    last states in float64. It is drawn which chunk the state falls in, unless `low_chunk` says it.
    """
    rng = np.random.default_rng(seed)
    steps, length = 64, 4
    low_chunk = rng.integers(3, 7, width) if low_chunk is None else low_chunk
    t, down = np.arange(steps)[:, None], np.full(width, length * low_chunk)
    chunk = down // length
    down, up = down + rng.integers(0, length, width), length * (chunk + 1 + hold)
    low, growth = rng.uniform(-36.7, -35, width), 2.0 ** rng.integers(60, 110, width)
    mild = 10 ** rng.uniform(-1, 1, (steps, width)) * (rng.random((steps, width)) < 0.3)
    w = np.float32(np.where(t < down - 1, mild, 0) + (t == down) * 10 ** rng.uniform(1, 6, width))
    a = np.zeros((steps, width), np.float32)
    h = start = np.float32(rng.normal(size=width))
    for i in range(steps):
        size = np.abs(sharp(np.float64(h), (1.0, w[i]), np.sin))
        to = np.where(i < down, 1.0, np.where(i == down, 10**low, size))
        a[i] = 2.0 ** np.round(np.log2(to / size))
        a[i] = np.where((i // length == chunk + 1) & (i % length == 0), 0.125, a[i])
        a[i] = np.where(i == up, growth, a[i])
        h = sharp(np.float64(h), (a[i], w[i]), np.sin)
    return start, a, w, h
