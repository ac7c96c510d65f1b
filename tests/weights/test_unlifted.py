"""Mistakes with a state: `lift`, `combine` or the reparameterisation itself was mistaken."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpara as jp
from jaxpara.weights.weight import Weight
from tests.weights.kit import normal

KEY, X = jax.random.key(0), np.float32(normal(1, 3, 8))
PARAMS = {"w": np.float32(normal(0, 8, 4)), "b": np.zeros(4, np.float32)}
STATES = {
    "lora": lambda: jp.lora(rank=2).attach(KEY, PARAMS),
    "fake_quant": lambda: jp.fake_quant(bits=4).attach(KEY, PARAMS),
    "chain": lambda: jp.chain(jp.nf4(block=8), jp.lora(rank=2)).attach(KEY, PARAMS),
    "merged": lambda: jp.fake_quant(bits=4).merge(STATES["fake_quant"]()),
}


def product(params, x):
    return x @ params["w"] + params["b"]


# What a user does with a leaf that he takes for an array.
MISTAKES = {
    "jax @ w": lambda w: jnp.asarray(X) @ w,
    "numpy @ w": lambda w: X @ w,
    "w @ jax": lambda w: w @ jnp.asarray(X).T,
    "einsum": lambda w: jnp.einsum("bi,io->bo", X, w),
    "dot": lambda w: jax.lax.dot(jnp.asarray(X), w),
    "w * 2": lambda w: 2 * w + w * 2,
    "w[0]": lambda w: w[0],
    "w.shape": lambda w: w.shape,
    "w.T": lambda w: w.T,
    "tanh": jnp.tanh,
    "jnp.asarray": jnp.asarray,
    "np.asarray": np.asarray,
    "jit": lambda w: jax.jit(product)({"w": w, "b": 0.0}, X),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_weight_taken_for_an_array_names_lift_in_few_words(name, mistake):
    with pytest.raises((TypeError, AttributeError), match=r"not an array.*jp\.lift\(function") as e:
        MISTAKES[mistake](STATES[name]()["w"])
    assert "t.effective(state)" in str(e.value) and len(str(e.value)) < 240


def linen():
    nn = pytest.importorskip("flax.linen")
    model = nn.Dense(4)
    return model.apply, model.init(KEY, X)


def equinox():
    eqx = pytest.importorskip("equinox")
    return lambda model, x: jax.vmap(model)(x), eqx.nn.Linear(8, 4, key=KEY)


@pytest.mark.parametrize("library", [linen, equinox])
def test_a_model_of_another_library_on_a_state_names_lift(library):
    function, params = library()
    state = jp.lora(rank=2).attach(KEY, params)
    with pytest.raises(TypeError, match=r"jp\.lift\(function\)\(state"):
        function(state, jnp.asarray(X))


def test_a_pooled_state_names_lift():
    state = jp.mos(rank=2).attach(KEY, {"a": normal(0, 8, 8), "b": normal(1, 8, 8)})
    assert repr(state).startswith("Pooled(params={'a': Weight(mos") and "[[" not in repr(state)
    with pytest.raises(TypeError, match=r"a Pooled is not an array: .*jp\.lift"):
        state["a"]


@pytest.mark.parametrize("name", STATES)
def test_a_weight_prints_types_and_no_numbers(name):
    state = STATES[name]()
    assert len(repr(state["w"])) < 240 and "[[" not in repr(state["w"])
    assert "float32[" in repr(state["w"]) and state["w"].method.name in repr(state["w"])
    # Whatever a transform puts into its leaves, such as nothing or a truth value.
    for leaf in (None, True, jax.ShapeDtypeStruct((3,), "int8"), object()):
        assert repr(jax.tree.map(lambda _, leaf=leaf: leaf, state["w"])).startswith("Weight(")


def test_probes_and_copies_of_a_weight_are_those_of_any_dataclass():
    weight = STATES["chain"]()["w"]
    for name in ("shape", "dtype", "ndim", "__len__", "__array_interface__", "__cuda_array__"):
        assert not hasattr(weight, name)
    assert isinstance(weight, Weight) and bool(weight)
    for same in (copy.copy(weight), copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert jax.tree.structure(same) == jax.tree.structure(weight)
        jax.tree.map(np.testing.assert_array_equal, same, weight)


# What jp.split takes apart must be put together.
@pytest.mark.parametrize("part", ["trained", "frozen"])
@pytest.mark.parametrize("t", [jp.lora(rank=2), jp.mos(rank=2)], ids=["lora", "mos"])
def test_one_part_of_a_split_names_combine(t, part):
    state = t.attach(KEY, {"w": normal(0, 8, 8), "b": np.zeros(8, np.float32)})
    half = jp.split(state, t.trainable(state))[part == "frozen"]
    for use in (jp.lift(product), jax.jit(jp.lift(product))):
        with pytest.raises(ValueError, match=r"lacks .*give jp.combine\(trained, frozen\)"):
            use(half, X)
    for use in (t.merge, t.effective):
        with pytest.raises(ValueError, match=r"lacks .*give jp.combine\(trained, frozen\)"):
            use(half)


def test_a_state_of_another_method_is_not_merged():
    state = STATES["fake_quant"]()
    for t in (jp.lora(rank=2), jp.fake_quant(bits=8)):
        name = t.members[0].method.name
        with pytest.raises(ValueError) as error:
            t.merge(state)
        assert f"merge: the state is of fake_quant(bits=4), not of {name}: " in str(error.value)
    # Two methods that were attached apart are merged together, and a plain tree is its own merge.
    both = {"u": STATES["lora"]()["w"], **state}
    assert isinstance(jp.fake_quant(bits=4).merge(both)["u"], jax.Array)
    jax.tree.map(np.testing.assert_array_equal, jp.lora(rank=2).merge(PARAMS), PARAMS)


def test_a_state_behind_its_inputs_is_theirs():
    state = STATES["lora"]()
    wanted = jp.lift(product)(state, X)
    swapped = jp.lift(lambda x, state: jp.lift(product)(state, x))
    np.testing.assert_array_equal(swapped(X, state), wanted)
    inner = jp.lift(lambda params, state: jp.lift(product)(state, X) * params["scale"])
    np.testing.assert_array_equal(inner({"scale": 1.0}, state), wanted)


@pytest.mark.parametrize("t", [jp.rtn(bits=4), jp.fake_quant(bits=4), jp.lora(rank=2)])
def test_what_is_merged_may_be_merged_again(t):
    state = t.attach(jax.random.key(0), PARAMS)
    again = t.effective(t.merge(t.merge(state)))
    jax.tree.map(np.testing.assert_array_equal, again, t.effective(state))


def test_a_tree_without_a_leaf_is_no_half_of_a_state():
    t = jp.mos(rank=2, shards=2)
    state = t.attach(jax.random.key(0), {"w": jnp.ones((8, 8)), "bias": None})
    assert t.merge(state)["bias"] is None and t.effective(state)["w"].shape == (8, 8)
    trained, _ = jp.split(state, t.trainable(state))
    assert t.penalty(trained) == 0.0
    with pytest.raises(ValueError, match="jp.combine"):
        t.merge(trained)


def test_a_state_in_a_module_of_nnx_prints():
    nnx = pytest.importorskip("flax.nnx")
    assert "lora" in repr(nnx.Param(STATES["lora"]()["w"]))
