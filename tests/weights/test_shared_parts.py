"""The contract of methods that take several leaves at once, by two methods that are written here.

`tied`: layers that have one trained block in common and differ by what is left of them.
`pair`: the same few channels of two matrices, drawn once: columns of one, rows of the other.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpara as jp
from jaxpara.weights.factors import Factors, Pick, Term
from jaxpara.weights.method import Method
from jaxpara.weights.reparam import reparam
from jaxpara.weights.weight import Weight, dense
from tests.recurrence.kit import QUICK

KEY = jax.random.key(0)
PICKED = 3

method = functools.partial(Method, init=None, effective=None, freezes=True)


def share_block(method, key, bases):
    block = sum(map(dense, bases.values())) / len(bases)
    shared = (("block", "mean"),)
    return {"mean": block}, {
        path: Weight(dense(base) - block, {}, method, shared) for path, base in bases.items()
    }


TIED = method(
    name="tied",
    settings=(),
    factors=lambda settings, parts, shape: Factors(1.0, (Term(parts["block"], (-2, -1)),)),
    axes=lambda settings, ndim: {"block": (-2, -1)},
    separable=lambda settings, ndim: frozenset((-2, -1)),
    share=share_block,
)


def channels(axis):
    """For a matrix whose channels are along `axis`, -1 or -2."""
    across = -3 - axis
    return method(
        name="channels",
        settings=axis,
        factors=lambda axis, parts, shape: Factors(
            1.0,
            (
                Pick(parts["at"], ("picked",), axis, shape[axis]),
                Term(parts["delta"], ("picked", across)),
            ),
        ),
        axes=lambda axis, ndim: {"at": ("picked",), "delta": ("picked", across)},
        separable=lambda axis, ndim: frozenset((across,)),
    )


def share_channels(method, key, bases):
    size = bases["up"].shape[-1]
    weights = {
        path: Weight(
            base,
            {"delta": jnp.zeros((PICKED, base.size // size), base.dtype)},
            CHANNELS[path],
            (("at", "at"),),
        )
        for path, base in bases.items()
    }
    return {"at": jax.random.permutation(key, size)[:PICKED]}, weights


CHANNELS = {"up": channels(-1), "down": channels(-2)}
PAIR = CHANNELS["up"]._replace(name="pair", share=share_channels)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def moved(t, params):
    """A state that has been trained a while: whatever is trained is somewhere else."""
    state = t.attach(KEY, params)
    train, frozen = jp.split(state, t.trainable(state))
    train = jax.tree.map(lambda a: a + normal(a.size, *a.shape), train)
    return jp.combine(train, frozen)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def both(t, function, state, x):
    """Value and gradient of the lifted function and of the definition."""

    def loss(run):
        return lambda train, frozen: jnp.sum(jnp.sin(run(jp.combine(train, frozen), x)))

    parts = jp.split(state, t.trainable(state))
    lifted = jax.value_and_grad(loss(jp.lift(function)))(*parts)
    return lifted, jax.value_and_grad(loss(lambda s, x: function(t.effective(s), x)))(*parts)


def layers(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"][:, :4]


def wide(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


@pytest.mark.parametrize(
    ("t", "function", "params"),
    [
        (reparam(TIED, None), layers, {"a": normal(0, 6, 6), "b": normal(1, 6, 6)}),
        (reparam(PAIR, None), wide, {"up": normal(0, 6, 8), "down": normal(1, 8, 5)}),
        (
            jp.chain(reparam(TIED, None), jp.lora(rank=2)),
            layers,
            {"a": normal(0, 6, 6), "b": normal(1, 6, 6)},
        ),
    ],
    ids=["tied", "pair", "adapters on tied"],
)
def test_attaching_changes_nothing_and_lifted_is_the_definition(t, function, params):
    x = normal(2, 3, 6)
    state = t.attach(KEY, params)
    np.testing.assert_allclose(function(t.effective(state), x), function(params, x), rtol=1e-12)
    state = moved(t, params)
    assert {use.how for use in t.report(state, function, x).uses} == {"rule"}
    (value, grads), (wanted, wanted_grads) = both(t, function, state, x)
    np.testing.assert_allclose(value, wanted, rtol=1e-12)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-9), grads, wanted_grads)


def test_the_gradient_of_a_common_block_is_the_sum_of_those_of_its_layers():
    t, x = reparam(TIED, None), normal(2, 3, 6)
    params = {"a": normal(0, 6, 6), "b": normal(1, 6, 6)}
    (_, grads), _ = both(t, layers, t.attach(KEY, params), x)
    of_layers = jax.grad(lambda p: jnp.sum(jnp.sin(layers(p, x))))(params)
    (found,) = jax.tree.leaves(grads)
    np.testing.assert_allclose(found, of_layers["a"] + of_layers["b"], rtol=1e-9)


def test_both_of_a_pair_change_at_the_same_channels_and_nowhere_else():
    t, params = reparam(PAIR, None), {"up": normal(0, 6, 8), "down": normal(1, 8, 5)}
    merged = t.merge(moved(t, params))
    columns = np.flatnonzero(np.any(merged["up"] != params["up"], axis=0))
    rows = np.flatnonzero(np.any(merged["down"] != params["down"], axis=1))
    np.testing.assert_array_equal(columns, rows)
    assert len(columns) == PICKED
    # Channels may be reordered so that the chosen ones come first, in both, and nothing changes.
    order = np.concatenate([columns, np.setdiff1d(np.arange(8), columns)])
    x = normal(2, 3, 6)
    reordered = {"up": merged["up"][:, order], "down": merged["down"][order]}
    np.testing.assert_allclose(wide(reordered, x), wide(merged, x), rtol=1e-12)
