"""What a lifted function and `attach` are given: operands of any dtype, sizes, and whose arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpara as jp
from tests.recurrence.kit import QUICK

KEY = jax.random.key(0)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def product(params, x):
    return x @ params["w"]


def moved(t, state):
    """Every trained part away from where it starts."""
    train, frozen = jp.split(state, t.trainable(state))
    return jp.combine(jax.tree.map(lambda leaf: 1.1 * leaf + 0.05, train), frozen)


OPERANDS = {
    "int32": np.arange(24, dtype=np.int32).reshape(3, 8) - 9,
    "bool": np.arange(24).reshape(3, 8) % 3 == 0,
    "bfloat16": jnp.asarray(normal(1, 3, 8), jnp.bfloat16),
    "float16": jnp.asarray(normal(1, 3, 8), jnp.float16),
}
RULES = {
    "ia3": jp.ia3(axis=-2),
    "ia3_outputs": jp.ia3(),
    "lora": jp.lora(rank=2),
    "dora": jp.dora(rank=2),
    "paca": jp.paca(rank=2),
    "bdwp": jp.bdwp(),
    "chain": jp.chain(jp.ia3(axis=-2), jp.lora(rank=2), jp.ia3(axis=-2)),
}


@pytest.mark.parametrize("name", RULES)
def test_an_operand_of_any_dtype_is_multiplied_as_in_the_dense_product(name):
    t = RULES[name]
    state = moved(t, t.attach(KEY, {"w": normal(0, 8, 4)}))
    wide = jax.tree.map(lambda leaf: leaf, state)
    for kind in OPERANDS if name == "ia3" else ("int32", "bfloat16"):
        x = OPERANDS[kind]

        def both(run, x=x):
            loss = lambda s: (jnp.sum(run(s, x) * normal(9, 3, 4)), run(s, x))  # noqa: E731
            step = jax.value_and_grad(loss, has_aux=True, allow_int=True)
            (_, y), grads = jax.jit(step, compiler_options=QUICK)(wide)
            return y, jax.tree.map(lambda g: g if g.dtype == jnp.float32 else None, grads)

        found = both(jp.lift(product))
        wanted = both(lambda s, x: product(t.effective(s), x))
        exact = np.float64(x) @ np.float64(t.effective(state)["w"])
        assert found[0].dtype == jnp.float32
        if name != "bdwp":
            assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(found[1]))
        np.testing.assert_allclose(found[0], exact, atol=2e-6 * np.max(np.abs(exact)))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, atol=4e-6 * max(np.max(np.abs(b)), 1))
    # The operand's own dtype would not do: scaled integers are no integers.
    x = OPERANDS["int32"]
    factors = np.linspace(0.5, 1.5, 8)
    assert not np.allclose(
        (x * factors).astype(np.int32) @ normal(0, 8, 4), x * factors @ normal(0, 8, 4)
    )


@pytest.mark.parametrize("merged", [False, True])
def test_quantised_activations_of_any_dtype_are_those_of_float32(merged):
    t = jp.fake_quant(activations=8)
    state = t.attach(KEY, {"w": normal(0, 8, 4)})
    state = t.merge(state) if merged else state
    for x in OPERANDS.values():
        exact = np.float64(x)
        unit = np.max(np.abs(exact), 1, keepdims=True) / 127
        wanted = np.round(exact / np.where(unit > 0, unit, 1)) * unit
        wanted = wanted @ np.float64(t.effective(state)["w"])
        found = jp.lift(product)(state, x)
        np.testing.assert_allclose(found, wanted, atol=4e-6 * np.max(np.abs(wanted)))
        if merged:
            found = jp.weights.quantised_dot(jnp.asarray(x), state["w"])
            np.testing.assert_allclose(found, wanted, atol=4e-6 * np.max(np.abs(wanted)))


@pytest.mark.parametrize("affine", [False, True])
def test_merged_integers_have_a_forward_derivative(affine):
    grids = jp.fake_quant(bits=6, activations=6, affine=affine), jp.fake_quant(affine=affine)
    for t in (*grids, jp.flexq(group=4)):
        merged = t.merge(t.attach(KEY, {"w": normal(0, 8, 4)}))
        x, dx = normal(1, 3, 8), normal(2, 3, 8)
        run = lambda x, merged=merged: jp.lift(product)(merged, x)  # noqa: E731
        y, dy = jax.jvp(run, (x,), (dx,))
        np.testing.assert_array_equal(y, run(x))
        # Straight through the grid of the activations: the product with the weight on its own.
        np.testing.assert_allclose(dy, dx @ t.effective(merged)["w"], rtol=1e-5, atol=1e-5)
        c = normal(3, 3, 4)
        (pulled,) = jax.vjp(run, x)[1](c)
        np.testing.assert_allclose(np.vdot(pulled, dx), np.vdot(c, dy), rtol=1e-5)


def test_flexq_takes_all_leaves_as_sensitive_and_only_those_that_where_selects():
    params = {"a": normal(0, 8, 8), "b": normal(1, 8, 8), "bias": normal(2, 8)}
    t = jp.flexq(group=None, sensitive="**")
    state = t.attach(KEY, params)
    names = [state[name].method.name for name in ("a", "b")]
    assert names == ["fake_quant(bits=6, activations=8)"] * 2
    narrow = jp.flexq(group=None, sensitive="**", where="a").attach(KEY, params)
    assert narrow["a"].method.name == names[0] and narrow["b"].shape == (8, 8)
    with pytest.raises(ValueError, match="where='c' selects none"):
        jp.flexq(group=None, sensitive="c").attach(KEY, params)


def test_freezing_belongs_to_leaves():
    params = {"attn": {"w": normal(0, 8, 8)}, "mlp": {"w": normal(1, 8, 8)}, "bias": normal(2, 8)}

    def trained(t):
        mask = t.trainable(t.attach(KEY, params))
        leaves = jax.tree_util.tree_leaves_with_path(mask)
        return {jp.tree.path_of(keys) for keys, train in leaves if train}

    lora, quant = jp.lora(rank=2, where="attn/*"), jp.fake_quant(where="mlp/*")
    adapters = {"attn/w/parts/a", "attn/w/parts/b"}
    assert trained(lora) == adapters
    for t in (jp.chain(lora, quant), jp.chain(quant, lora)):
        assert trained(t) == {*adapters, "mlp/w/base"}
    both = jp.chain(jp.lora(rank=2, where="*/w"), quant)
    assert trained(both) == {*adapters, "mlp/w/base/parts/a", "mlp/w/base/parts/b"}
    assert trained(quant) == {"attn/w", "mlp/w/base", "bias"}


def test_adapters_hold_the_biases_that_were_trained_too():
    params = {"w": normal(0, 8, 4), "bias": normal(1, 4), "other": normal(2, 4)}
    t = jp.lora(rank=2, where="w")
    state = t.attach(KEY, params)
    mask = t.trainable(state) | {"bias": True}
    state = state | {"bias": state["bias"] + 1}
    saved = jp.weights.adapters(state, mask)
    assert set(saved) == {"w", "bias"}
    again = jp.weights.with_adapters(t.attach(jax.random.key(1), params), saved)
    jax.tree.map(np.testing.assert_array_equal, state, again)
    assert set(jp.weights.adapters(state)) == {"w"}
    with pytest.raises(ValueError, match="there is no 'w/a'|has shape"):
        jp.weights.with_adapters(state, {"bias": np.ones(5)})
    whole = jax.tree.map(lambda _: True, mask)
    with pytest.raises(ValueError, match="trains the weight 'w' itself"):
        jp.weights.adapters(state, whole)


@pytest.mark.parametrize("t", [jp.lora(rank=2, where="w"), jp.rtn(where="w")])
def test_a_donated_state_leaves_the_parameters_alone_and_the_other_way_round(t):
    shared = jnp.asarray(normal(0, 8, 4))
    params = {"w": shared, "bias": jnp.ones(4), "tied": shared, "key": jax.random.key(3)}
    step = jax.jit(lambda tree: jax.tree.map(lambda a: a, tree), donate_argnums=0)
    state = t.attach(KEY, params)
    saved = jp.weights.adapters(state)
    step(state)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, saved)))
    state = t.attach(KEY, params)
    again = jp.weights.with_adapters(state, saved)
    step({name: leaf for name, leaf in params.items() if name != "tied"})
    step(state)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((again, saved)))
    # Handing the memory over is asked for.
    given = {"w": jnp.asarray(normal(0, 8, 4)), "bias": jnp.ones(4)}
    jax.jit(t.attach, donate_argnums=1)(KEY, given)
    assert given["bias"].is_deleted()


@pytest.mark.parametrize(
    "t",
    [
        jp.mos(rank=2, shards=2),
        jp.easy_quant(by="layer"),
        jp.sparse_nm(),
        jp.chain(jp.nf4(block=8), jp.lora(rank=2)),
    ],
    ids=["mos", "easy_quant", "sparse_nm", "nf4_lora"],
)
def test_a_leaf_without_elements_stays_as_it_is(t):
    # A stack of no layers, a product without inputs, and one without outputs.
    empty = {"stack": jnp.zeros((0, 8, 8)), "in": jnp.zeros((0, 4)), "out": jnp.zeros((8, 0))}
    params = {"w": normal(0, 8, 4), **empty}

    def f(params, x):
        x = x @ params["w"]
        h = jax.lax.scan(lambda h, w: (h @ w, None), jnp.ones((3, 8)), params["stack"])[0]
        return x + x[:, :0] @ params["in"], h @ params["out"]

    state = t.attach(KEY, params)
    alone = t.attach(KEY, {"w": params["w"]})
    x = normal(1, 3, 8)
    found, nothing = jp.lift(f)(state, x)
    np.testing.assert_array_equal(found, jp.lift(product)(alone, x))
    assert nothing.shape == (3, 0)
    for tree in (t.effective(state), t.merge(state)):
        assert {name: tree[name].shape for name in empty} == {
            name: leaf.shape for name, leaf in empty.items()
        }
    nowhere = t.attach(KEY, empty)  # nothing is left to reparameterise
    assert jax.tree.map(jnp.shape, nowhere) == jax.tree.map(jnp.shape, empty)


def test_leaves_of_eight_bits_are_refused_by_name():
    params = {"w": jnp.ones((8, 4), jnp.float8_e4m3fn)}
    for t in (jp.lora(rank=2), jp.fake_quant(), jp.nf4()):
        with pytest.raises(ValueError, match="16 bits or more; 'w' has dtype float8_e4m3fn: cast"):
            t.attach(KEY, params)


I8, I32, I64 = np.int8, np.int32, np.int64
SIZES = {
    "lora": lambda n: jp.lora(rank=n(2), window=n(0)),
    "dora": lambda n: jp.dora(rank=n(2)),
    "ia3": lambda n: jp.ia3(axis=n(-2)),
    "paca": lambda n: jp.paca(rank=n(2)),
    "mos": lambda n: jp.mos(rank=n(2), budget=n(2), shards=n(2), private=n(1)),
    "fake_quant": lambda n: jp.fake_quant(bits=n(8), group=n(4), activations=n(8)),
    "ternary": lambda n: jp.ternary(group=n(4)),
    "lsq": lambda n: jp.lsq(bits=n(4), group=n(4)),
    "l4q": lambda n: jp.l4q(bits=n(4), rank=n(2), group=n(4)),
    "lr_qat": lambda n: jp.lr_qat(bits=n(4), rank=n(2), group=n(4)),
    "rtn": lambda n: jp.rtn(bits=n(8), group=n(4), activations=n(8)),
    "nf4": lambda n: jp.nf4(block=n(4), scale_block=n(4)),
    "easy_quant": lambda n: jp.easy_quant(bits=n(8), group=n(4), steps=n(2)),
    "flexq": lambda n: jp.flexq(bits=n(8), group=n(4)),
    "sparse_nm": lambda n: jp.sparse_nm(n=n(2), m=n(4)),
    "bdwp": lambda n: jp.bdwp(n=n(2), m=n(4)),
}


@pytest.mark.untyped
@pytest.mark.parametrize("name", SIZES)
def test_sizes_may_be_integers_of_numpy(name):
    # Equal settings make equal methods, which are traced once; 2^7 does not fit into int8.
    assert SIZES[name](I8) == SIZES[name](I32) == SIZES[name](I64) == SIZES[name](int)
    for member in SIZES[name](I8).members:
        assert "np." not in repr(member.method.settings)
    with pytest.raises(ValueError, match="give a whole number"):
        SIZES[name](lambda n: n + 0.5)


@pytest.mark.untyped
@pytest.mark.parametrize("name", ["lora", "dora", "paca", "mos", "l4q", "lr_qat"])
@pytest.mark.parametrize("alpha", ["x", float("nan"), float("inf"), [1.0]])
def test_an_alpha_that_is_no_finite_number_is_refused(name, alpha):
    with pytest.raises(ValueError, match="alpha=.*: give a finite number"):
        getattr(jp, name)(alpha=alpha)


@pytest.mark.untyped
@pytest.mark.parametrize("name", ["lora", "dora", "paca", "mos", "l4q", "lr_qat"])
def test_a_rank_of_none_is_refused(name):
    with pytest.raises(ValueError, match="rank=None: give a whole number"):
        getattr(jp, name)(rank=None)


@pytest.mark.untyped
def test_what_is_given_in_the_wrong_place_is_named():
    t, params = jp.lora(rank=2), {"w": normal(0, 8, 8)}
    for wrong in (jp.lora, 1, [t]):
        with pytest.raises(TypeError, match="chain got .*expected reparameterisations"):
            jp.chain(wrong)  # type: ignore
    with pytest.raises(TypeError, match="expected a jp.Model.*jp.lift"):
        t(product)  # type: ignore
    with pytest.raises(TypeError, match="a key of type dict; expected attach"):
        t.attach(params, KEY)  # type: ignore
    with pytest.raises(TypeError, match="leaf 'act' of the state is a relu .* not an array"):
        jp.lift(product)({"act": jax.nn.relu, **t.attach(KEY, params)}, normal(1, 2, 8))
    with pytest.raises(TypeError, match="lift got 3; expected a function"):
        jp.lift(3)  # type: ignore
    with pytest.raises(ValueError, match="bits=None: give a whole number"):
        jp.fake_quant(bits=None)  # type: ignore
    with pytest.raises(
        ValueError, match="where=None .floating leaves of two or more axes. selects"
    ):
        t.attach(KEY, {"w": normal(0, 8)})
    for wrong in (2, "no", np.float32(1)):
        with pytest.raises(ValueError, match="at .a. of the mask: give split.tree, mask"):
            jp.split({"a": 1}, {"a": wrong})
    assert jp.split({"a": 1, "b": 2}, {"a": np.True_, "b": False})[0] == {"a": 1, "b": None}
    for keys in (jax.random.split(KEY), np.zeros((2, 2), np.uint32)):
        with pytest.raises(TypeError, match="attach got keys of shape .2.*expected one"):
            t.attach(keys, params)
    with pytest.raises(TypeError, match="sample got a key of type int; expected sample.state, key"):
        t.sample(t.attach(KEY, params), 0)  # type: ignore
    with pytest.raises(TypeError, match="attach got function=5; expected a function"):
        t.attach(KEY, params, function=5)  # type: ignore
    with pytest.raises(ValueError, match="only the first has a leaf at 'a'.: give the two"):
        jp.combine({"a": 1}, {"b": None})


def test_integers_of_numpy_are_sizes_inside_a_lifted_function_too():
    run = jp.lift(lambda p, x, n: (x @ p["w"])[:n])
    state = jp.lora(rank=2).attach(KEY, {"w": normal(0, 8, 4)})
    assert run(state, normal(1, 3, 8), np.int64(2)).shape == (2, 4)
    swap = jp.lift(lambda p, x, flag: x @ p["w"] if flag else x)
    assert swap(state, normal(1, 3, 8), np.bool_(True)).shape == (3, 4)


@pytest.mark.untyped
def test_what_is_reparameterised_already_is_not_passed_over():
    params = {"w": normal(0, 8, 8), "v": normal(1, 8, 8)}
    first, second = jp.fake_quant(where="w"), jp.lora(rank=2)
    state = first.attach(KEY, params)
    for known in (state, first.merge(state)):
        with pytest.raises(ValueError, match="reparameterised already.*chain.first, second"):
            second.attach(KEY, known)
    # Beside it there is nothing against it.
    both = jp.lora(rank=2, where="v").attach(KEY, state)
    assert jp.lift(lambda p, x: x @ p["w"] @ p["v"])(both, normal(2, 3, 8)).shape == (3, 8)
