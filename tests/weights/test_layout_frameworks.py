"""Layouts of other libraries' modules: the models that are made of them bring what proves it."""

import math
import re
import warnings

import jax
import numpy as np
import pytest

import jaxpara as jp
from jaxpara import tree
from jaxpara.weights import Layout
from tests.recurrence.kit import QUICK

KEY = jax.random.key(0)


def normal(seed, *shape):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape), np.float32)


X = normal(0, 2, 5, 8)
KERNELS = re.compile(".*(kernel|weight|embedding).*")


def linen_model():
    nn = pytest.importorskip("flax.linen")
    from jaxpara.linen import from_linen

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.MultiHeadDotProductAttention(2, qkv_features=12)(x)
            x = nn.DenseGeneral((3, 4))(x)
            x = nn.DenseGeneral(6, axis=(-2, -1))(x)
            x = nn.Conv(8, (3,), feature_group_count=2)(x)
            return nn.Dense(4)(nn.Dropout(0.1, deterministic=False)(x))

    expected = {
        "Conv_0/kernel": Layout((0, 1), (3,), (2,), ((3,), (3,), (2, 4))),
        "Dense_0/kernel": Layout((0,), (1,)),
        "DenseGeneral_0/kernel": Layout((0,), (1, 2)),
        "DenseGeneral_1/kernel": Layout((0, 1), (2,)),
        "MultiHeadDotProductAttention_0/key/kernel": Layout((0,), (1, 2)),
        "MultiHeadDotProductAttention_0/out/kernel": Layout((0, 1), (2,)),
        "MultiHeadDotProductAttention_0/query/kernel": Layout((0,), (1, 2)),
        "MultiHeadDotProductAttention_0/value/kernel": Layout((0,), (1, 2)),
    }
    return from_linen(Net(), X, rngs=("dropout",)), (X, jax.random.key(1)), expected


def nnx_model():
    nnx = pytest.importorskip("flax.nnx")
    from jaxpara.nnx import from_nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.heads = nnx.LinearGeneral(8, (3, 4), rngs=rngs)
            self.conv = nnx.Conv(12, 6, (3,), feature_group_count=3, rngs=rngs)

        def __call__(self, x):
            return self.conv(self.heads(x).reshape(2, 5, 12))

    expected = {
        "heads/kernel": Layout((0,), (1, 2)),
        "conv/kernel": Layout((0, 1), (3,), (2,), ((3,), (4,), (3, 2))),
    }
    return from_nnx(Net, examples=(X,)), (X,), expected


def equinox_model():
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        conv: eqx.nn.Conv1d
        linear: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.attention = eqx.nn.MultiheadAttention(2, 8, key=keys[0])
            self.conv = eqx.nn.Conv1d(8, 6, 3, groups=2, key=keys[1])
            self.linear = eqx.nn.Linear(6, 4, key=keys[2])

        def __call__(self, x):
            x = self.conv(self.attention(x, x, x).T).T
            return jax.vmap(self.linear)(x)

    static = eqx.partition(Net(KEY), eqx.is_array)[1]
    model = jp.Model(
        lambda key: eqx.filter(Net(key), eqx.is_array),
        lambda params, x: jax.vmap(eqx.combine(params, static))(x),
        inputs=(X,),
    )
    names = ("query", "key", "value", "output")
    expected = {f"attention/{name}_proj/weight": Layout((1,), (0,)) for name in names} | {
        "conv/weight": Layout((3, 2), (1,), (0,), ((2, 3), (4,), (3,))),
        "linear/weight": Layout((1,), (0,)),
    }
    return model, (X,), expected


MODELS = {"linen": linen_model, "nnx": nnx_model, "equinox": equinox_model}


@pytest.mark.slow
@pytest.mark.parametrize("library", MODELS)
def test_models_of_other_libraries_bring_their_layouts(library):
    model, inputs, expected = MODELS[library]()
    params = model.init(KEY)
    assert dict(jp.weights.layout(model.apply, params, *model.inputs).known) == expected
    t = jp.lora(rank=1, where=KERNELS)
    tuned = t(model)
    assert tuned.inputs == model.inputs
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        state = tuned.init(KEY)
        report = t.report(state, model.apply, *inputs)
    assert {use.how for use in report.uses} == {"rule"}
    # An adapter of rank one has a number for each input and for each output, and no more.
    leaves = {path: leaf for path, leaf in tree.select(params, KERNELS).items()}
    count = 0
    for path, layout in expected.items():
        pieces = layout.pieces or tuple((n,) for n in leaves[path].shape)
        sizes = [n for axis in pieces for n in axis]
        of = lambda names, sizes=sizes: math.prod(sizes[i] for i in names)  # noqa: E731
        count += of(layout.batch) * (of(layout.inputs) + of(layout.outputs))
    assert report.parts == count
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of adapters larger than a weight, where one is
        plain = jax.eval_shape(lambda: t.attach(KEY, params))
    assert t.report(plain, model.apply, *inputs).parts > count  # the control

    train, frozen = jp.split(state, t.trainable(state))
    state = jp.combine(jax.tree.map(lambda leaf: leaf + 0.1, train), frozen)

    def both(state):
        return tuned.apply(state, *inputs), model.apply(t.effective(state), *inputs)

    ours, theirs = jax.jit(both, compiler_options=QUICK)(state)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)
    assert jax.tree.structure(t.merge(state)) == jax.tree.structure(params)
