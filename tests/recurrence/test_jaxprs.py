"""The walker answers what the function does, through every kind of control flow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxpr_as_fun

from jaxpara import jaxprs


@jax.custom_jvp
def forward_rule(x):
    return jnp.sin(x)


forward_rule.defjvp(lambda p, t: (jnp.sin(p[0]), jnp.cos(p[0]) * t[0]))


@jax.custom_vjp
def backward_rule(x):
    return jnp.sin(x)


backward_rule.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.cos(x) * g,))

WRAPPERS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "cond": lambda f: lambda x: lax.cond(x > 0, f, lambda x: x, x),
    "scan": lambda f: lambda x: lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0],
    "while": lambda f: lambda x: lax.while_loop(lambda c: f(c) < 3, lambda c: c + 1, x),
    "custom_jvp": lambda f: lambda x: forward_rule(f(x)),
    "vmap of jit": lambda f: lambda x: jax.vmap(jax.jit(f))(x[None])[0],
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_contains_finds_a_custom_rule_at_any_depth(wrap):
    found = jax.make_jaxpr(jax.jit(wrap(backward_rule)))(1.0)
    missing = jax.make_jaxpr(jax.jit(wrap(jnp.sin)))(1.0)
    assert jaxprs.contains(found, "custom_vjp_call")
    assert not jaxprs.contains(missing, "custom_vjp_call")
    assert jaxprs.contains(found, lambda eqn: eqn.primitive.name.startswith("custom_vjp"))


def test_contains_passes_over_what_it_is_told_to_skip():
    @jax.jit
    def solve(x):
        return backward_rule(x)

    closed = jax.make_jaxpr(lambda x: solve(x) + 1)(1.0)
    assert jaxprs.contains(closed, "custom_vjp_call")
    assert not jaxprs.contains(closed, "custom_vjp_call", skip={"solve"})


def test_contains_finds_collectives():
    def f(x):
        return jax.jit(lambda x: lax.psum(x, "i"))(x)

    closed = jax.make_jaxpr(f, axis_env=[("i", 2)])(1.0)
    assert jaxprs.contains(closed, jaxprs.COLLECTIVES)
    assert not jaxprs.contains(jax.make_jaxpr(jnp.sin)(1.0), jaxprs.COLLECTIVES)


def reach(f, *args):
    return [set(found) for found in jaxprs.dependence(jax.make_jaxpr(f)(*args))]


def test_dependence_is_of_values_not_derivatives():
    assert reach(lambda a, b, c: (jnp.round(a) + lax.stop_gradient(b), c), 1.0, 2.0, 3.0) == [
        {0, 1}, {2}
    ]  # fmt: skip


def test_dependence_follows_a_scan_to_its_fixpoint():
    def f(a, b, c, x):
        return lax.scan(lambda s, v: ((s[1], s[2], s[2] + 1), s[0] * v), (a, b, c), x)

    assert reach(f, 1.0, 2.0, 3.0, jnp.ones(3)) == [{0, 1, 2}, {1, 2}, {2}, {0, 1, 2, 3}]


def test_dependence_counts_predicates():
    assert reach(lambda p, a, b: lax.cond(p, lambda a, b: (a, b), lambda a, b: (b, -b), a, b),
                 True, 1.0, 2.0) == [{0, 1, 2}, {0, 2}]  # fmt: skip
    f = lambda a, n, m: lax.while_loop(lambda s: s[1] < n, lambda s: (-s[0], s[1] + m), (a, 0.0))  # noqa: E731
    assert reach(f, 1.0, 2.0, 3.0) == [{0, 1, 2}, {1, 2}]


def test_dependence_tells_the_key_of_a_carry_from_its_floats():
    def step(carry, x):
        key, count, h = carry
        key, sub = jax.random.split(key)
        return (key, count + 1, h * x + jax.random.normal(sub)), h

    found = reach(step, (jax.random.key(0), 0, 1.0), 2.0)
    assert found == [{0}, {1}, {0, 2, 3}, {2}]


def test_prune_keeps_what_the_wanted_outputs_need():
    table = np.arange(3.0)

    def f(a, b, c):
        return jnp.sin(a) * b, lax.scan(lambda s, v: (s + v, s * b), c, table)[0], a + 1

    closed = jax.make_jaxpr(f)(1.0, 2.0, 3.0)
    pruned, used = jaxprs.prune(closed, [False, True, False])
    assert used == [False, False, True]
    (value,) = jaxpr_as_fun(pruned)(jnp.float32(3.0))
    np.testing.assert_allclose(value, 6.0)
    assert not jaxprs.contains(pruned, "sin")


def test_prune_refuses_a_wrong_number_of_flags():
    with pytest.raises(ValueError, match="2 flags for a jaxpr with 1 outputs"):
        jaxprs.prune(jax.make_jaxpr(jnp.sin)(1.0), [True, False])
