"""Reparameterisations: what attaches, what trains, what is merged, and the errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpara as jp
from jaxpara import tree
from jaxpara.weights.quant.grid import Grid, absmax_scale, dequantised, integers
from jaxpara.weights.weight import Weight


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def params():
    return {
        "blocks": [{"kernel": normal(i, 6, 4), "bias": normal(9, 4)} for i in range(2)],
        "stack": normal(3, 3, 6, 4),
        "count": np.arange(6).reshape(2, 3),
    }


def weights_in(state):
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: isinstance(x, Weight))
    return {tree.path_of(keys) for keys, leaf in leaves if isinstance(leaf, Weight)}


@pytest.mark.parametrize(
    ("where", "selected"),
    [
        (None, {"blocks/0/kernel", "blocks/1/kernel", "stack"}),
        ("blocks/*/kernel", {"blocks/0/kernel", "blocks/1/kernel"}),
        ("**/kernel", {"blocks/0/kernel", "blocks/1/kernel"}),
        ("stack", {"stack"}),
        (re.compile(r"blocks/1/.*l"), {"blocks/1/kernel"}),
        (lambda path, leaf: leaf.ndim == 3, {"stack"}),
    ],
)
def test_where_selects_by_path(where, selected):
    t = jp.lora(rank=2, where=where)
    assert weights_in(t.attach(jax.random.key(0), params())) == selected


@pytest.mark.untyped
def test_a_pattern_that_selects_nothing_names_what_comes_near():
    with pytest.raises(ValueError, match="selects none of the 6 leaves; near it are 'blocks/"):
        jp.lora(where="block/*/kernel").attach(jax.random.key(0), params())
    with pytest.raises(ValueError, match="selects none"):
        jp.lora(where="kernel").attach(jax.random.key(0), params())  # a whole path, not its end
    with pytest.raises(
        ValueError, match=r"also selects 'blocks/0/bias', of shape \(4,\).*narrow it"
    ):
        jp.lora(where="blocks/0/*").attach(jax.random.key(0), params())
    with pytest.raises(ValueError, match="also selects 'count', of shape .* dtype int"):
        jp.fake_quant(where="count").attach(jax.random.key(0), params())
    assert weights_in(jp.lora().attach(jax.random.key(0), {"w": normal(0, 2, 2), "x": 1.5})) == {
        "w"
    }
    with pytest.raises(TypeError, match="where=3: expected a glob"):
        jp.lora(where=3).attach(jax.random.key(0), params())


def test_two_leaves_of_one_path_are_refused():
    params = {"a": {"b": 2 * np.ones((4, 4))}, "a/b": np.ones((4, 4))}
    state = {name: jp.lora(rank=1).attach(jax.random.key(0), each) for name, each in params.items()}

    def product(params, x):
        return x @ params["a"]["b"] @ params["a/b"]

    x = np.ones((1, 4))
    for where in (
        lambda: jp.lora(rank=1).attach(jax.random.key(0), params),
        lambda: jp.lora(where="a/*").attach(jax.random.key(0), params),
        lambda: jp.mos(rank=1).attach(jax.random.key(0), params),
        lambda: jp.weights.layout(product, params, x),
        lambda: tree.marked(params, "a/b"),
        lambda: jp.lora(rank=1).report(state, product, x),
    ):
        both = r"\['a'\]\['b'\] and \['a/b'\] have the same path 'a/b': rename one"
        with pytest.raises(ValueError, match=both):
            where()
    with pytest.raises(ValueError, match="two arrays have the path 'a/b'"):
        jp.weights.adapters(state)
    # The part "a" of the leaf "w", and a leaf "w/a" that a mask adds.
    state = {"w": state["a/b"], "w/a": np.ones(3, np.float32)}
    with pytest.raises(ValueError, match="two arrays have the path 'w/a'"):
        jp.weights.adapters(state, jax.tree.map(lambda _: True, state) | {"w": False})
    with pytest.raises(ValueError, match="have the same path 'w/a'"):
        jp.weights.with_adapters({"w": state["w"]}, {"w": {"a": x, "b": x}, "w/a": x})


def test_attaching_does_not_change_the_function_and_draws_by_path():
    t = jp.lora(rank=2)
    key = jax.random.key(1)
    state = t.attach(key, params())
    jax.tree.map(np.testing.assert_array_equal, t.effective(state), params())
    alone = t.attach(key, {"stack": params()["stack"]})
    np.testing.assert_array_equal(alone["stack"].parts["a"], state["stack"].parts["a"])
    kernels = [block["kernel"].parts["a"] for block in state["blocks"]]
    assert not np.array_equal(*kernels)


def test_adapters_of_a_stack_are_those_of_its_layers():
    t = jp.lora(rank=2, alpha=3.0)
    state = t.attach(jax.random.key(1), {"stack": params()["stack"]})
    weight = state["stack"]
    assert {name: part.shape for name, part in weight.parts.items()} == {
        "a": (3, 6, 2),
        "b": (3, 2, 4),
    }
    parts = {"a": weight.parts["a"], "b": normal(5, 3, 2, 4)}
    found = t.effective({"stack": Weight(weight.base, parts, weight.method)})["stack"]
    for layer in range(3):
        product = np.float64(parts["a"][layer]) @ np.float64(parts["b"][layer])
        wanted = np.float64(params()["stack"][layer]) + 1.5 * product
        np.testing.assert_allclose(found[layer], wanted, rtol=1e-5, atol=1e-6)


def test_the_scale_of_the_update():
    def scale(**settings):
        return jp.lora(rank=4, **settings).members[0].method.settings.scale

    assert isinstance(jp.lora(), jp.Reparam)
    assert scale() == 2.0 and scale(alpha=8.0) == 2.0 and scale(alpha=1.0) == 0.25
    assert scale(alpha=8.0, rank_stabilised=True) == 4.0


def names_of_trained(t):
    state = t.attach(jax.random.key(0), {"w": params()["stack"], "bias": normal(1, 4)})
    mask = t.trainable(state)
    assert jax.tree.structure(mask) == jax.tree.structure(state)
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    return {tree.path_of(keys) for keys, train in leaves if train}


def test_what_is_trained():
    adapters = {"w/parts/a", "w/parts/b"}
    inside = {"w/base/parts/a", "w/base/parts/b"}
    assert names_of_trained(jp.lora()) == adapters
    assert names_of_trained(jp.fake_quant()) == {"w/base", "bias"}
    assert names_of_trained(jp.chain(jp.fake_quant(), jp.lora())) == adapters
    assert names_of_trained(jp.chain(jp.lora(), jp.fake_quant())) == inside


def test_split_and_combine_undo_one_another():
    t = jp.lora(rank=2, where="stack")
    state = t.attach(jax.random.key(0), params())
    train, frozen = jp.split(state, t.trainable(state))
    assert len(jax.tree.leaves(train)) == 2
    again = jp.combine(train, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    with pytest.raises(ValueError, match="both parts have a leaf at"):
        jp.combine(state, state)
    holes = {"weight": jnp.ones((2, 2)), "bias": None}  # as Equinox leaves what is no array
    parts = jp.split(holes, {"weight": True, "bias": None})
    assert jp.combine(*parts)["bias"] is None
    with pytest.raises(ValueError, match="only the first has a leaf at .*mask of booleans"):
        jp.split(state, {"stack": True})


GRIDS = [
    dict(bits=bits, **more)
    for bits in (2, 3, 4, 8)
    for more in ({}, {"group": 3}, {"per_tensor": True})
]


@pytest.mark.parametrize("settings", GRIDS, ids=str)
def test_the_grid_against_a_loop_in_float64(settings):
    w = normal(0, 2, 6, 4)
    t = jp.fake_quant(**settings)
    found = t.effective(t.attach(jax.random.key(0), {"w": w}))["w"]
    q = 2 ** (settings["bits"] - 1) - 1
    group = settings.get("group", 6)
    for layer in range(2):
        for column in range(4):
            for start in range(0, 6, group):
                rows = slice(start, start + group)
                shared = w[layer] if "per_tensor" in settings else w[layer, rows, column]
                scale = np.float64(np.max(np.abs(shared))) / q
                wanted = np.round(np.float64(w[layer, rows, column]) / scale) * scale
                np.testing.assert_allclose(found[layer, rows, column], wanted, rtol=1e-6)


def test_the_gradient_passes_straight_through():
    t = jp.fake_quant(bits=3)
    state = t.attach(jax.random.key(0), {"w": normal(0, 6, 4)})
    weights = normal(1, 6, 4)
    grads = jax.grad(lambda s: jnp.sum(weights * t.effective(s)["w"]))(state)
    np.testing.assert_array_equal(grads["w"].base, weights)


def test_a_weight_of_zeros_and_one_of_tiny_numbers_stay_finite():
    t = jp.fake_quant(bits=4)
    square = jax.grad(lambda state: jnp.sum(t.effective(state)["w"] ** 2))
    for w in (np.zeros((4, 3), np.float32), np.full((4, 3), 1e-42, np.float32)):
        state = t.attach(jax.random.key(0), {"w": w})
        assert np.isfinite(t.effective(state)["w"]).all()
        assert np.isfinite(square(state)["w"].base).all()


def with_ties(shape, bits):
    """Random entries, and entries half way between two points of the grid in every column."""
    w = normal(0, *shape)
    w[0] = 1.0  # the scale is then 1 / q exactly where the rest is smaller
    w[1:] = np.clip(w[1:], -0.99, 0.99)
    q = 2 ** (bits - 1) - 1
    w[1::2] = (np.round(w[1::2] * q) + 0.5) / q
    return w


@pytest.mark.parametrize("inside", [False, True])
def test_merged_integers_reproduce_the_training_forward_bit_for_bit(inside):
    # A million entries with ties; the forward is jitted, the merge another program.
    w = with_ties((1024, 1024), 4)
    t = jp.chain(jp.lora(rank=2), jp.fake_quant(bits=4)) if inside else jp.fake_quant(bits=4)
    state = t.attach(jax.random.key(0), {"w": w})
    if inside:
        lora = state["w"].base
        moved = Weight(lora.base, {**lora.parts, "b": 0.01 * normal(4, 2, 1024)}, lora.method)
        state = {"w": Weight(moved, {}, state["w"].method)}
    merged = t.merge(state)
    assert merged["w"].base.dtype == jnp.int8
    assert np.max(np.abs(np.asarray(merged["w"].base, np.int32))) == 7
    x = normal(5, 3, 1024)
    forward = jp.lift(lambda p, x: (x @ p["w"], p["w"]))
    for a, b in zip(forward(state, x), forward(merged, x), strict=True):
        if a.shape == w.shape:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("ranges", ["absmax", "minmax", "mse"])
@pytest.mark.parametrize("affine", [False, True])
def test_one_column_is_merged_op_by_op_to_the_compiled_forward(ranges, affine):
    draws = np.random.default_rng(0).standard_normal((40, 4, 1)).astype(np.float32)
    t = jp.fake_quant(ranges=ranges, affine=affine)
    forward = jax.jit(t.effective)
    for w in draws:
        state = t.attach(jax.random.key(0), {"w": w})
        merged = t.effective(t.merge(state))["w"]
        np.testing.assert_array_equal(forward(state)["w"], merged)


def test_plain_lora_merged_and_requantised_is_not_what_was_trained():
    w = with_ties((256, 256), 4)
    t = jp.chain(jp.fake_quant(bits=4), jp.lora(rank=2))
    state = t.attach(jax.random.key(0), {"w": w})
    weight = state["w"]
    state = {"w": Weight(weight.base, {**weight.parts, "b": normal(4, 2, 256)}, weight.method)}
    trained = t.merge(state)["w"]
    grid = Grid(4)
    scale = {"scale": absmax_scale(grid, trained)}
    again = dequantised(grid, integers(grid, trained, scale), scale)
    assert np.mean(again != trained) > 0.5


@pytest.mark.slow
def test_a_transformed_model_has_every_function_of_the_model():
    model = jp.nn.decoder(
        vocab_size=16,
        width=8,
        layers=2,
        mixer=jp.nn.mixers.recurrent(jp.cells.para_gru, solver=jp.sequential()),
    )
    t = jp.chain(jp.lora(rank=2), jp.fake_quant(bits=8))
    tuned = t(model)
    state = tuned.init(jax.random.key(0))
    tokens = np.arange(10).reshape(2, 5) % 16
    wanted = model.apply(t.effective(state), tokens)
    np.testing.assert_allclose(tuned.apply(state, tokens), wanted, rtol=2e-5, atol=2e-5)
    start = tuned.start(state, 2, 5)
    _, logits = tuned.run(state, start, tokens)
    np.testing.assert_allclose(logits, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jp.lora(rank=0), "rank=0: give at least 1"),
        (lambda: jp.fake_quant(bits=1), "bits=1: give 2 to 8"),
        (lambda: jp.fake_quant(group=2, per_tensor=True), "choose one of them"),
        (lambda: jp.chain(), "needs at least one"),
        (
            lambda: jp.fake_quant(group=4).attach(jax.random.key(0), {"w": normal(0, 6, 4)}),
            r"group=4 does not divide the 6 rows .* give one of \[1, 2, 3, 6\], or None",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
