"""Which steps' derivatives are proved to tell how their values move."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from jaxpara.recurrence.structure import custom_jvps
from jaxpara.recurrence.structure.true_derivative import certain, kinked

X = np.float32([0.3, -0.2, 0.5])
W = np.float32([[0.1, 0.2, 0.3], [0.0, 0.5, 0.1], [0.2, 0.2, 0.2]])


@jax.custom_jvp
def straight_through(x):
    return jnp.round(x)


straight_through.defjvps(lambda t, ans, x: t)


@jax.custom_jvp
def slower(x):
    return jnp.sin(x)


@slower.defjvp
def _(primals, tangents):
    return slower(*primals), 0.5 * tangents[0]


# A function of JAX's own with a rule of the user's: where it comes from proves nothing.
borrowed = jax.custom_jvp(jax.nn.silu)
borrowed.defjvps(lambda t, ans, x: 0.0 * t)


def surrogate(f):
    """A function with half of the slope of a ReLU."""
    f = jax.custom_jvp(f)
    f.defjvps(lambda t, ans, x: 0.5 * t * (x > 0))
    return f


@jax.custom_vjp
def clipped(x):
    return jnp.sin(x)


clipped.defvjp(lambda x: (jnp.sin(x), None), lambda _, g: (jnp.clip(g, -1, 1),))


def solved_with(factor, rounded=lambda h: h):
    """`h / factor(h)` by a linear solve whose equation holds the factor."""

    def f(h):
        solve = lambda _, b: rounded(b / factor(h))  # noqa: E731
        return lax.custom_linear_solve(lambda v: v * factor(h), h, solve)

    return f


def counted(h):
    return lax.fori_loop(0, 3, lambda _, v: jnp.tanh(v), h)


PROVED = {
    "a sum": lambda h: h + X,
    "a dense layer": lambda h: jnp.tanh(h @ W + X),
    "a gate of the input": lambda h: jnp.where(X > 0, h, jnp.sin(h)),
    "a kink": lambda h: jnp.maximum(h, 0) + jnp.abs(h) + jnp.clip(h, -1, 1),
    "relu": jax.nn.relu,
    "relu6": lambda h: jax.vmap(jax.nn.relu6)(jax.nn.relu6(h)),
    "relu of lanes": lambda h: jax.vmap(jax.nn.relu)(h[None])[0],
    "logaddexp2": lambda h: jnp.logaddexp2(h, X),
    "a Bessel function": jnp.i0,
    "its own derivative": lambda h: jax.jvp(lambda h: lax.erf(jnp.tanh(h)), (h,), (X,))[1],
    "fixed bounds": lambda h: lax.clamp(X, h, X + 1),
    "softplus": jax.nn.softplus,
    "log_sigmoid": jax.nn.log_sigmoid,
    "a norm": lambda h: (h - jnp.mean(h)) / jnp.sqrt(jnp.var(h) + 1e-6),
    "stack and slices": lambda h: jnp.concatenate([h[1:], h[:1]]) + jnp.stack([h[0]] * 3),
    "a loop": counted,
    "a scan": lambda h: lax.scan(lambda c, x: (jnp.sin(c) + x, c), h, X)[0],
    "jit and remat": lambda h: jax.jit(jax.checkpoint(jnp.cos))(h),
    "a branch of the input": lambda h: lax.cond(X[0] > 0, jnp.sin, jnp.cos, h),
    "widening": lambda h: h.astype(jnp.float32).astype(jnp.float32) * 2,
    "exact products": lambda h: (
        jnp.dot(h, W, precision="highest") + jnp.dot(h, W, precision="F32_F32_F32")
    ),
    "complex numbers": lambda h: (jnp.exp(lax.complex(h, X)) * lax.complex(X, h)).real,
    "a solve": lambda h: jax.scipy.linalg.solve_triangular(np.eye(3, dtype=np.float32) + W, h),
    "an equation": solved_with(lambda _: 2.0),
    "a dense equation": lambda h: jnp.linalg.solve(np.eye(3, dtype=np.float32) + W, h),
    "an update": lambda h: h.at[1].set(h[0] * 2),
}
BROKEN = {
    "stop_gradient": lambda h: lax.stop_gradient(h) + X,
    "a part of it": lambda h: h + 1e-9 * lax.stop_gradient(h),
    "rounding": lambda h: jnp.round(h * 8) / 8,
    "floor": lambda h: h + jnp.floor(h),
    "sign": lambda h: h + jnp.sign(h),
    "reduce_precision": lambda h: lax.reduce_precision(h, 8, 7),
    "through bfloat16": lambda h: (h.astype(jnp.bfloat16) * 2).astype(jnp.float32),
    "a product that rounds": lambda h: jnp.dot(h, W, preferred_element_type=jnp.bfloat16).astype(
        jnp.float32
    ),
    "a product of rounded factors": lambda h: jnp.dot(h, W, precision="BF16_BF16_F32"),
    "through integers": lambda h: h + h.astype(jnp.int32).astype(jnp.float32),
    "a jump": lambda h: jnp.where(h > 0, h + 1, h),
    "a flag as a number": lambda h: h + (h > 0),
    "a branch of the state": lambda h: lax.cond(h[0] > 0, jnp.sin, jnp.cos, h),
    "a loop that the state ends": lambda h: lax.while_loop(
        lambda v: v[0] < 1, lambda v: v + 0.1, h
    ),
    "the largest element": lambda h: h + jnp.max(h),
    "the smallest so far": lambda h: h + lax.cummin(h),
    "an angle": lambda h: jnp.arctan2(h, X),
    "a complex logarithm": lambda h: jnp.log(lax.complex(h, X)).imag,
    "a complex root": lambda h: jnp.sqrt(lax.complex(h, X)).imag,
    "an index of the state": lambda h: h + h[jnp.argmax(h)],
    "a straight-through estimator": straight_through,
    "a slower rule": slower,
    "a borrowed name": borrowed,
    "a jitted ReLU with another slope": surrogate(jax.jit(jax.nn.relu)),
    "a checkpointed one": surrogate(jax.checkpoint(jax.nn.relu)),
    "what a ReLU wraps": surrogate(jax.nn.relu.__wrapped__),
    "a renamed one": surrogate(functools.wraps(jax.nn.relu)(lambda x: jnp.maximum(x, 0))),
    "a jitted relu6": surrogate(jax.jit(jax.nn.relu6)),
    "a complex sum of exponentials": lambda h: jnp.logaddexp(lax.complex(h, 9 * h), 1j * X).imag,
    "the sign of a determinant": lambda h: h + jnp.linalg.slogdet(jnp.diag(h))[0],
    "a determinant, whose rule is wrong where a column is 0": lambda h: (
        h * jnp.linalg.det(jnp.diag(jnp.tile(h, 2)))
    ),
    "a pseudo-inverse, whose rank jumps": lambda h: jnp.linalg.pinv(jnp.diag(h)) @ X,
    "a factor of one triangle": lambda h: lax.linalg.cholesky(
        jnp.eye(3) + jnp.outer(X, h), symmetrize_input=False
    )[1],
    "bounds that cross": lambda h: lax.clamp(X + 2, X, h) + lax.clamp(h, X, X - 2),
    "a custom_vjp": clipped,
    "sorting": lambda h: h + jnp.argsort(h),
    "an equation with a rounding": solved_with(lambda h: 2 + jnp.round(h)),
    "an equation that moves, which nobody need solve exactly": solved_with(jnp.exp),
    "a solve that starts from the carry": lambda h: lax.custom_linear_solve(
        lambda v: 2.0 * v, X, lambda _, b: h + 0.5 * (b - 2.0 * h)
    ),
    "a solve that is not linear": lambda h: lax.custom_linear_solve(
        lambda v: W @ v, h, lambda _, b: b * (b @ b) / (b @ (W @ b))
    ),
    "what a solve says beside": lambda h: lax.custom_linear_solve(
        lambda v: 2.0 * v, h, lambda _, b: (b / 2.0, b), has_aux=True
    )[1],
    "a solve that rounds": solved_with(lambda _: 2.0, lambda h: lax.reduce_precision(h, 8, 7)),
    "deep inside": lambda h: lax.scan(lambda c, x: (jax.jit(jnp.round)(c) + x, None), h, X)[0],
}


def proved(f, like=X):
    return certain(jax.make_jaxpr(f)(like), (0,), (0,))


@pytest.mark.parametrize("name", PROVED)
def test_true_derivatives_are_proved(name):
    assert proved(PROVED[name])


@pytest.mark.parametrize("name", BROKEN)
def test_broken_links_are_not(name):
    assert not proved(BROKEN[name])


# `softplus` is smooth, but made of a maximum, and nobody proves that it cancels.
WITH_KINKS = {"a kink", "relu", "softplus", "log_sigmoid", "relu6", "logaddexp2", "fixed bounds"}
WITH_KINKS |= {"relu of lanes"}
# Smooth on both sides of 0, where JAX has put an absolute value.
MADE_OF_KINKS = {"a Bessel function", "its own derivative"}


@pytest.mark.parametrize("name", [name for name in PROVED if name not in MADE_OF_KINKS])
def test_kinks_are_found(name):
    jaxpr = jax.make_jaxpr(PROVED[name])(X)
    assert kinked(jaxpr, (0,), (0,)) == (name in WITH_KINKS)


def test_a_kink_of_the_inputs_is_none():
    step = lambda h, x: jnp.tanh(h + jax.nn.relu(x) + jnp.max(x))  # noqa: E731
    assert not kinked(jax.make_jaxpr(step)(X, X), (0,), (0,))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_states_are_not(dtype):
    assert proved(lambda h: h * 2) and not proved(lambda h: h * 2, X.astype(dtype))


def test_inputs_and_outputs_may_hold_anything():
    def step(h, x):
        quantised = jnp.round(x * 8) / 8 + straight_through(x)
        return jnp.tanh(h + quantised), (h > 0, lax.stop_gradient(h), jnp.round(h))

    assert certain(jax.make_jaxpr(step)(X, X), (0,), (0,))


@pytest.mark.parametrize(
    "cell",
    [jp.cells.para_gru, jp.cells.para_lstm, jp.cells.slstm, jp.cells.elman, jp.cells.min_gru],
)
def test_cells_of_the_library_are_proved(cell):
    cell = cell(3, 3)
    params = cell.init(jax.random.key(0))
    start, gates = cell.start(params, ()), cell.project(params, X[None])
    f = lambda h, x: cell.step(params, h, x)[0]  # noqa: E731
    jaxpr = jax.make_jaxpr(f)(start, jax.tree.map(lambda g: g[0], gates))
    carries = tuple(range(len(jax.tree.leaves(start))))
    assert certain(jaxpr, carries, carries)


def test_trusted_structures_prove_nothing():
    f = lambda h, x: (jnp.tanh(W @ h + x), None)  # noqa: E731
    found = jp.explain_choice(f, X, X[None], solver=jp.shooting())
    trusted = jp.shooting(structure=jp.unchecked(jp.structure.Dense()))
    assert found.certain and not jp.explain_choice(f, X, X[None], solver=trusted).certain


def test_a_function_of_jax_is_known_on_every_mesh():
    step = lambda h, x: (jax.nn.relu(0.5 * h + x), None)  # noqa: E731
    found = []

    def local(h, x):
        found.append(jp.explain_choice(step, h, x, solver=jp.shooting()).certain)
        return h

    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((2,), ("lanes",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            h, x = jnp.ones((2, 3)), jnp.ones((4, 2, 3))
            h = jax.device_put(h, jax.NamedSharding(mesh, jax.P("lanes")))
            x = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "lanes")))
            local(h, x)
            jax.shard_map(local, in_specs=(jax.P("lanes"), jax.P(None, "lanes")),
                          out_specs=jax.P("lanes"))(h, x)  # fmt: skip
    assert found == [True] * 4


def test_the_page_lists_the_custom_rules_that_count():
    page = (pathlib.Path(__file__).parents[2] / "docs/methods/recurrence.md").read_text()
    (listed,) = re.findall(r"- a custom rule, except JAX's own of (.*?)\.\n", page, re.S)
    known = {name for name, _ in custom_jvps._TRUE} | set(custom_jvps._BY_DEFJVPS)
    known = {name.removeprefix("_").removesuffix("_impl") for name in known}
    assert set(re.findall("`(.*?)`", re.sub(r"\(.*?\)", "", listed))) == known
