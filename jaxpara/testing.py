"""Conformance checks, also for your own solvers and models.

They raise an AssertionError that names the case; nothing is printed.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from jaxpara.arguments import need_model
from jaxpara.types import Model, Scan


class _Case(NamedTuple):
    name: str
    step: Callable[..., Any]
    params: Any
    init: Any
    xs: Any
    length: int | None = None
    reverse: bool = False


def check_scan(scan: Scan, *, tolerance: float = 1e-5) -> None:
    """Checks that a function of `lax.scan`'s type is `lax.scan`.

    Runs a small zoo of recurrences through `scan` and `lax.scan`, under jit, and
    compares structures, dtypes, values, and gradients with respect to what the step
    closes over, the initial carry and the inputs; then the same under vmap.

    Args:
      scan: `(f, init, xs, length, reverse, unroll) -> (carry, ys)`.
      tolerance: largest accepted difference, relative to the largest magnitude of a leaf.

    Returns:
      Nothing.

    Raises:
      AssertionError: a difference; the message names the case and the leaf.
    """
    for case in _zoo():
        found, wanted = (_solve(s, case)(*_floating(case)) for s in (scan, lax.scan))
        _compare(f"{case.name}: values", found[1], wanted[1], tolerance)
        _compare(f"{case.name}: gradients", found[0], wanted[0], tolerance)
    case = next(_zoo())
    rows = jax.tree.map(lambda a: jnp.stack([a, -a]), _floating(case))
    found, wanted = (jax.vmap(_solve(s, case))(*rows) for s in (scan, lax.scan))
    _compare(f"{case.name}: gradients and values under vmap", found, wanted, tolerance)


def check_model(model: Model, tokens: Int[Array, "batch time"], *, tolerance: float = 1e-5) -> None:
    """Checks the laws of a sequence model on `tokens`.

    `apply` equals `run` from `start`; `run` over the whole equals `run` over two
    pieces and `run` token by token.

    Args:
      model: a model with `start` and `run`.
      tokens: at least two steps.
      tolerance: largest accepted difference, relative to the largest magnitude of a leaf.

    Returns:
      Nothing.

    Raises:
      AssertionError: a law that does not hold, by name.
      TypeError: `model` is no `Model`.
      ValueError: a model without `start` or `run`, or fewer than two steps.
    """
    need_model(model, "check_model(model, tokens)")
    if model.start is None or model.run is None:
        raise ValueError("model has no start or no run; check_model checks sequence models")
    batch, time = tokens.shape
    if time < 2:
        raise ValueError(f"tokens has shape {tokens.shape}; expected at least two steps")
    params = model.init(jax.random.key(0))
    run = jax.jit(model.run)
    fresh = model.start(params, batch, time)
    _, whole = run(params, fresh, tokens)
    _compare("apply == run from start", model.apply(params, tokens), whole, tolerance)
    for name, size in (("run in pieces", (time + 1) // 2), ("run token by token", 1)):
        state, pieces = fresh, []
        for begin in range(0, time, size):
            state, out = run(params, state, tokens[:, begin : begin + size])
            pieces.append(out)
        joined = jax.tree.map(lambda *p: jnp.concatenate(p, axis=1), *pieces)
        _compare(f"{name} == run of the whole", joined, whole, tolerance)


def _zoo() -> Iterator[_Case]:
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(0.5 * rng.standard_normal(shape), jnp.float32)

    def diagonal(w):
        def f(h, x):
            h = jnp.tanh(w[0] * h + x)
            return h, h * x + w[1]

        return f

    def coupled(w):
        def f(carry, x):
            c = jax.nn.sigmoid(w * carry["h"]) * carry["c"] + x
            h = jnp.tanh(c)
            return {"c": c, "h": h}, (h, None)

        return f

    def dense(w):
        return lambda h, x: (jnp.tanh(h @ w + x), {"before": h, "positive": h > 0})

    def counted(w):
        def f(carry, x):
            h, n = carry
            h = jnp.cos(w * h + x) / (1 + n)
            return (h, n + 1), n

        return f

    def alone(w):
        return lambda h, _: (jnp.sin(w * h), h)

    pair = {"c": normal(3), "h": normal(3)}
    yield _Case("diagonal", diagonal, normal(2, 3), normal(3), normal(13, 3))
    yield _Case("one step", diagonal, normal(2, 3), normal(3), normal(1, 3))
    yield _Case("reversed", coupled, normal(3), pair, normal(13, 3), reverse=True)
    yield _Case("dense", dense, normal(3, 3), normal(2, 3), normal(13, 2, 3))
    yield _Case("counter", counted, normal(3), (normal(3), jnp.int32(0)), normal(13, 3))
    yield _Case("no inputs", alone, normal(3), normal(3), None, length=9)


def _is_floating(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _floating(case):
    return [leaf for leaf in jax.tree.leaves(case[2:5]) if _is_floating(leaf)]


def _solve(scan, case):
    """Floating leaves of (params, init, xs) to gradients and `(carry, ys)`, one program."""
    leaves, tree = jax.tree.flatten(case[2:5])
    places = [i for i, leaf in enumerate(leaves) if _is_floating(leaf)]

    def loss(*values):
        rows = list(leaves)
        for i, value in zip(places, values, strict=True):
            rows[i] = value
        params, init, xs = jax.tree.unflatten(tree, rows)
        out = scan(case.step(params), init, xs, length=case.length, reverse=case.reverse)
        terms = [jnp.sum(jnp.sin(o + 1)) for o in jax.tree.leaves(out) if _is_floating(o)]
        return sum(terms), out

    return jax.jit(jax.grad(loss, tuple(range(len(places))), has_aux=True))


def _compare(name, found, wanted, tolerance):
    if (a := jax.tree.structure(found)) != (b := jax.tree.structure(wanted)):
        raise AssertionError(f"{name}: structure {a}; expected {b}")
    pairs = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True)
    for (path, f), w in pairs:
        where = f"{name}, leaf {jax.tree_util.keystr(path) or 'root'}"
        if (f.shape, f.dtype) != (w.shape, w.dtype):
            raise AssertionError(f"{where}: {f.dtype}{f.shape}; expected {w.dtype}{w.shape}")
        f, w = np.asarray(f, np.float64), np.asarray(w, np.float64)
        worst = np.max(np.abs(f - w), initial=0.0)
        # Written so that a NaN fails.
        if not worst <= tolerance * max(1e-30, np.max(np.abs(w), initial=0.0)):
            raise AssertionError(f"{where}: off by {worst:.3g}, more than {tolerance:g} relative")
