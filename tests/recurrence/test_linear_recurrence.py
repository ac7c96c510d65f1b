"""Linear recurrences against a loop in NumPy and float64."""

import functools
from itertools import accumulate

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpara as jp
from tests.recurrence.kit import QUICK, assert_close

TIME = 45  # one length for all that can share programs, and none that chunks divide
METHODS = ("sequential", "associative", "chunked")
# Diagonal over a batch, blocks over a batch, and one dense matrix.
SHAPES = {
    "diagonal": ((3, 4), (3, 4)),
    "block": ((3, 2, 2), (3, 2)),
    "dense": ((5, 5), (5,)),
}


def draw(kind, time, scale=0.5):
    rng = np.random.default_rng(time)
    a, b = SHAPES[kind]
    shapes = ((time, *a), (time, *b), b)
    a, b, init = ((scale * rng.standard_normal(s)).astype(np.float32) for s in shapes)
    return a, b, init


def apply(a, s):
    return a * s if a.shape == s.shape else np.einsum("...ij,...j->...i", a, s)


def loop(a, b, init, reverse):
    a, b, s = (np.asarray(x, np.float64) for x in (a, b, init))
    states = np.zeros(b.shape)
    for t in range(len(b))[:: -1 if reverse else 1]:
        s = apply(a[t], s) + b[t]
        states[t] = s
    return states


def loop_gradient(a, b, init, weights, reverse):
    """Backpropagation by hand of `sum(weights * states)`."""
    a, b, weights = (np.asarray(x, np.float64) for x in (a, b, weights))
    states = loop(a, b, init, reverse)
    order = list(range(len(b)))[:: -1 if reverse else 1]
    back = np.zeros(np.shape(init))
    da, db = np.zeros(a.shape), np.zeros(b.shape)
    for k in reversed(range(len(order))):
        t = order[k]
        before = np.asarray(init, np.float64) if k == 0 else states[order[k - 1]]
        back = back + weights[t]
        db[t] = back
        if a.shape == b.shape:
            da[t], back = back * before, a[t] * back
        else:
            da[t] = back[..., :, None] * before[..., None, :]
            back = np.einsum("...ij,...i->...j", a[t], back)
    return da, db, back


@functools.cache
def compiled(method, reverse):
    """Values, gradients and a tangent in one program; shapes retrace it."""

    def run(a, b, init, weights):
        def solve(a, b, init):
            return jp.linear_recurrence(a, b, init, reverse=reverse, implementation=method)

        loss = lambda *args: jnp.sum(weights * solve(*args))  # noqa: E731
        tangent = jax.jvp(solve, (a, b, init), (a, b, init))
        return *tangent, jax.grad(loss, argnums=(0, 1, 2))(a, b, init)

    return jax.jit(run, compiler_options=QUICK)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_values_and_derivatives_are_those_of_a_loop(method, kind, reverse):
    a, b, init = draw(kind, TIME, scale=0.4)  # so that dense states do not grow
    weights = np.random.default_rng(0).standard_normal(b.shape).astype(np.float32)
    states, tangent, grads = compiled(method, reverse)(a, b, init, weights)
    assert_close(states, loop(a, b, init, reverse))
    assert_close(grads, loop_gradient(a, b, init, weights, reverse))
    # Along (a, b, init) itself the derivative is the slope of s(e) at (1 + e)(a, b, init).
    e = 1e-5
    wide = [np.asarray(x, np.float64) for x in (a, b, init)]
    ahead, behind = (loop(*[(1 + d) * x for x in wide], reverse) for d in (e, -e))
    assert_close(tangent, (ahead - behind) / (2 * e))


@pytest.mark.parametrize("method", METHODS)
def test_no_steps_one_step_and_no_initial_state(method):
    for time in (0, 1):
        a, b, init = draw("block", time)
        solve = functools.partial(jp.linear_recurrence, implementation=method)
        both = jax.jit(lambda a, b, *s, f=solve: (f(a, b, *s), f(a, b)), compiler_options=QUICK)
        begun, unbegun = both(a, b, init)
        assert_close(begun, loop(a, b, init, False))
        assert_close(unbegun, loop(a, b, 0 * init, False))


@pytest.mark.parametrize("method", METHODS)
def test_vmap_over_some_of_the_arguments(method):
    a, b, init = draw("diagonal", 13)
    rows = np.stack([b, -2 * b])
    solve = functools.partial(jp.linear_recurrence, implementation=method)
    found = jax.jit(jax.vmap(solve, in_axes=(None, 0, None)), compiler_options=QUICK)(a, rows, init)
    assert_close(found, np.stack([loop(a, r, init, False) for r in rows]))


@pytest.mark.parametrize("kind", SHAPES)
def test_products_may_overflow_where_states_and_cotangents_do_not(kind):
    """Through the middle, `a` is 1e6 but nothing is carried: products are infinite there."""
    a, b, init = draw(kind, TIME)
    weights = np.random.default_rng(2).standard_normal(b.shape).astype(np.float32)
    middle = slice(12, 38)
    a[middle] = 1e6
    a[12] = a[37] = 0
    b[middle] = weights[middle] = 0
    states, _, grads = compiled("chunked", False)(a, b, init, weights)
    assert_close(states, loop(a, b, init, False))
    assert_close(grads, loop_gradient(a, b, init, weights, False))


# Blocks in both directions, the other two kinds in one each.
@pytest.mark.parametrize(
    ("kind", "reverse"),
    [
        pytest.param("block", False, marks=pytest.mark.slow),
        ("block", True),
        ("diagonal", True),
        ("dense", False),
    ],
)
def test_time_sharded_over_a_mesh_axis(kind, reverse):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("time",))
    a, b, init = draw(kind, 24)
    weights = np.random.default_rng(1).standard_normal(b.shape).astype(np.float32)
    solve = jax.shard_map(
        lambda a, b, init: jp.linear_recurrence(a, b, init, reverse=reverse, axis="time"),
        mesh=mesh,
        in_specs=(P("time"), P("time"), P()),
        out_specs=P("time"),
    )

    def run(a, b, init):
        states = solve(a, b, init)
        return jnp.sum(weights * states), states

    run = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)
    (_, states), grads = jax.jit(run, compiler_options=QUICK)(a, b, init)
    assert_close(states, loop(a, b, init, reverse))
    assert_close(grads, loop_gradient(a, b, init, weights, reverse))


def test_the_states_have_the_dtype_that_holds_the_initial_state():
    a, b = np.array([0.5, 1.0, 0.25], np.float32), np.ones(3, np.float32)

    def after(state, step):
        return step[0] * state + step[1]

    def held(start, narrow=jnp.float32):
        found = jp.linear_recurrence(jnp.asarray(a, narrow), jnp.asarray(b, narrow), start)
        exact = list(
            accumulate(
                zip(a.tolist(), b.tolist(), strict=True), after, initial=np.asarray(start).item()
            )
        )
        # Four units: each step rounds a product and a sum.
        np.testing.assert_allclose(found, exact[1:], rtol=4 * jnp.finfo(found.dtype).eps)
        return found.dtype

    assert held(np.float32(1.0010000467300415), jnp.bfloat16) == jnp.float32
    assert held(1 + 1j) == jnp.complex64
    with jax.enable_x64(True):
        assert held(np.float64(1 + 1e-9)) == jnp.float64
    # A Python number has the dtype of the others.
    assert jp.linear_recurrence(jnp.bfloat16([1.0]), jnp.bfloat16([1.0]), 0.5).dtype == jnp.bfloat16


def test_complex_numbers_are_solved_on_every_platform(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(2, 40, 3)) * 0.5 for _ in range(2))
    a, b = (jnp.asarray(v[0] + 1j * v[1], jnp.complex64) for v in (a, b))
    pair = lambda v: np.stack([v.real, v.imag], -1)  # noqa: E731
    blocks = np.stack([pair(np.asarray(a)), pair(np.asarray(1j * a))], -1)
    exact = loop(blocks, pair(np.asarray(b)), np.zeros((3, 2)), False)
    for platform in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        # 2e-6 absolute: sums of 40 steps in float32, of size up to 3.4, some of which cancel.
        np.testing.assert_allclose(pair(jp.linear_recurrence(a, b)), exact, atol=2e-6)
    with pytest.raises(ValueError, match="complex64 cannot be solved .* implementation='chunked'"):
        jp.linear_recurrence(a, b, implementation="chunked")


@pytest.mark.untyped
def test_what_does_not_fit_is_named():
    with pytest.raises(
        TypeError, match=r"have dtype int32; convert one of them: a.astype\(float\)"
    ):
        jp.linear_recurrence(jnp.ones(3, int), jnp.ones(3, int))
    ones = jnp.ones
    with pytest.raises(ValueError, match=r"a has shape \(3, 2\) and b \(4, 2\).*equal length"):
        jp.linear_recurrence(ones((3, 2)), ones((4, 2)))
    with pytest.raises(
        ValueError, match=r"expected a of shape \(3, 2\) \(diagonal\) or \(3, 2, 2\)"
    ):
        jp.linear_recurrence(ones((3, 5)), ones((3, 2)))
    with pytest.raises(
        ValueError, match=r"init has shape \(3,\); b has shape \(3, 2\) and expects"
    ):
        jp.linear_recurrence(ones((3, 2)), ones((3, 2)), ones(3))
    with pytest.raises(ValueError, match="both expect leading time"):
        jp.linear_recurrence(1.0, 2.0)
    with pytest.raises(ValueError, match="associative"):
        jp.linear_recurrence(ones((3, 2)), ones((3, 2)), implementation="associativ")
    with pytest.raises(ValueError, match='cannot run with time sharded.*use "chunked"'):
        jp.linear_recurrence(ones((3, 2)), ones((3, 2)), implementation="sequential", axis="time")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(3,), (2, 3, 3)], ids=["diagonal", "block"])
def test_products_that_overflow_leave_finite_states_and_gradients_finite(method, shape):
    """A state of zero stays zero, however large the matrices; later ones are as in a loop."""
    time, state = 40, shape[:2] if len(shape) == 3 else shape
    factor = np.ones(shape, np.float32) if len(shape) == 1 else np.broadcast_to(np.eye(3), shape)
    a = np.where(np.arange(time).reshape(-1, *[1] * len(shape)) < 30, 1e4, 0.5) * factor
    b = np.zeros((time, *state), np.float32)
    b[30:] = 1.0

    def loss(b):
        states = jp.linear_recurrence(a.astype(np.float32), b, implementation=method)
        return jnp.sum(states[30:]), states

    run = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)
    gradient, states = run(b)
    # 1e-6: eight units, for sums that associate otherwise.
    np.testing.assert_allclose(states, loop(a, b, np.zeros(state), False), rtol=1e-6)
    np.testing.assert_allclose(gradient[30:].ravel()[-1], 1.0)
    assert np.all(np.isfinite(gradient[30:]))
