"""`lift` over modules of other libraries: linen, nnx, Equinox and Haiku, without a wrapper."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpara as jp

KEY = jax.random.key(0)
X = np.asarray(np.random.default_rng(0).standard_normal((3, 4)), np.float32)
TOKENS = np.array([[0, 3, 2], [1, 1, 4]])


class Case(NamedTuple):
    """Somebody else's model as a function of its own parameters, and which are to be adapted."""

    function: Any
    params: Any
    where: Any
    inputs: Any
    adapted: int


def linen_case():
    nn = pytest.importorskip("flax.linen")

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(6)(x)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(5, 6)
            stack = nn.scan(
                nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            return embed.attend(stack()(embed(tokens), None)[0])

    net = Net()
    where = re.compile(".*(kernel|embedding)")
    return Case(net.apply, net.init(KEY, TOKENS), where, TOKENS, 2)


def nnx_case():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 6, rngs=rngs)
            self.second = nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.tanh(self.first(x)))

    graph, params = nnx.split(Net(nnx.Rngs(0)))
    return Case(lambda params, x: nnx.merge(graph, params)(x), params, "**/kernel/**", X, 2)


def equinox_case():
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.MLP(4, 2, 6, 1, key=KEY)
    params, rest = eqx.partition(net, eqx.is_array)
    return Case(
        lambda params, x: jax.vmap(eqx.combine(params, rest))(x), params, "layers/*/weight", X, 2
    )


def haiku_case():
    hk = pytest.importorskip("haiku")
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([6, 2])(x)))
    return Case(net.apply, net.init(KEY, X), "**/w", X, 2)


CASES = {"linen": linen_case, "nnx": nnx_case, "equinox": equinox_case, "haiku": haiku_case}


QUICK = "equinox"  # the others take seconds, most of them Flax's own


@pytest.mark.slow
@pytest.mark.parametrize(
    "library",
    [pytest.param(name, marks=[] if name == QUICK else [pytest.mark.slow]) for name in CASES],
)
def test_adapters_work_in_models_of(library):
    case = CASES[library]()
    t = jp.lora(rank=2, where=case.where)
    state = t.attach(KEY, case.params)
    train, frozen = jp.split(state, t.trainable(state))
    state = jp.combine(jax.tree.map(lambda leaf: leaf + 0.1, train), frozen)

    def loss(function):
        return lambda state: jnp.sum(jnp.sin(function(state, case.inputs)))

    lifted, dense = jp.lift(case.function), case.function
    np.testing.assert_allclose(
        lifted(state, case.inputs), dense(t.effective(state), case.inputs), rtol=2e-6, atol=2e-6
    )
    difference = lifted(state, case.inputs) - dense(case.params, case.inputs)
    assert np.max(np.abs(difference)) > 1e-2
    got = jax.grad(loss(lifted))(state)
    wanted = jax.grad(loss(lambda s, x: dense(t.effective(s), x)))(state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, wanted)
    report = t.report(state, case.function, case.inputs)
    assert len(report.leaves) == case.adapted and {u.how for u in report.uses} == {"rule"}
    # Merged, it is the library's own tree again, and its own code runs it.
    merged = t.merge(state)
    assert jax.tree.structure(merged) == jax.tree.structure(case.params)
