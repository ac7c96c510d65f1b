"""What `attach` and `report` say when a method does not do what it is for, and what they refuse."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpara as jp
from jaxpara.weights import Layout

# Warnings name the line of the caller, and the checker would be the caller.
pytestmark = pytest.mark.untyped

KEY = jax.random.key(0)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def said(run):
    """What is returned, as shapes, and the warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        out = jax.eval_shape(run)
    assert all(w.filename == __file__ for w in found)  # the caller's line
    return out, [str(w.message) for w in found]


def product(p, x):
    return x @ p["w"].T


W, ROW = {"w": normal(0, 40, 6)}, normal(1, 2, 6)


def test_an_adapter_larger_than_its_weight_is_warned_of():
    heads = {"w": normal(0, 16, 4, 4)}
    t, function = jp.lora(rank=4), lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"])
    _, lines = said(lambda: t.attach(KEY, heads))
    assert lines == [
        "attach: 'w': lora(rank=4) has 512 numbers for the 256 of the weight, as matrices "
        "(4, 4) of (16, 4, 4); give a smaller rank, or narrow where=, or pass attach function= and "
        "inputs=, which say what is summed over"
    ]
    state, lines = said(lambda: t.attach(KEY, heads, function=function, inputs=(normal(1, 2, 16),)))
    assert not lines and sum(part.size for part in state["w"].base.parts.values()) == 128
    _, lines = said(lambda: jp.lora(rank=8).attach(KEY, W, function=product, inputs=(ROW,)))
    assert "368 numbers for the 240 of the weight" in lines[0] and "a smaller rank" in lines[0]
    pool = jp.mos(rank=8, budget=6, shards=2)
    assert "pools" in said(lambda: pool.attach(KEY, W))[1][0]


def test_a_leaf_is_warned_of_once_and_leaves_alike_share_a_line():
    names = [f"bias{i}" for i in range(6)]
    p = {"w": normal(0, 6, 40), **{name: normal(1, 1, 40) for name in names}}
    function = lambda p, x: x @ p["w"] + sum(p[name] for name in names)  # noqa: E731
    t = jp.lora(rank=1)
    sized = (
        "attach: 'bias0': lora(rank=1) has 41 numbers for the 40 of the weight, as matrices "
        "(1, 40) of (1, 40) (likewise 'bias1', 'bias2', 'bias3' and 2 more); give a smaller rank, "
        "or narrow where="
    )
    _, lines = said(lambda: t.attach(KEY, p))
    assert len(lines) == 1 and lines[0].startswith(sized) and lines[0].endswith("summed over")
    # Their layouts are not known either, and each is built whole: one line says what to do.
    _, lines = said(lambda: t.attach(KEY, p, function=function, inputs=(ROW,)))
    layout = ", or pass layout={'bias0': jp.weights.Layout(inputs=.., outputs=..)}"
    assert lines == [sized + layout]
    twice = jp.chain(*[jp.lora(rank=4, where="w")] * 2)
    _, lines = said(lambda: twice.attach(KEY, {"w": normal(0, 4, 4)}))
    assert len(lines) == 1 and "likewise" not in lines[0]
    p = {"w": p["w"], **{name: normal(1, 3, 40) for name in names}}  # no larger, yet no products
    _, lines = said(lambda: t.attach(KEY, p, function=function, inputs=(normal(2, 3, 6),)))
    assert len(lines) == 1 and lines[0].startswith("attach: 'bias0' of shape (3, 40): no product ")
    assert "(likewise 'bias1', 'bias2', 'bias3' and 2 more); pass layout=" in lines[0]


@pytest.mark.parametrize(
    ("t", "lost"),
    [
        (jp.fake_quant(activations=6), "its activations are not quantised"),
        (jp.rtn(activations=6), "its activations are not quantised"),
        (jp.chain(jp.fake_quant(activations=6), jp.lora(rank=1)), "activations are not quantised"),
        (jp.bdwp(n=1, m=2), "the backward pass is not sparse"),
    ],
)
def test_an_ineffective_method_warns_until_the_layout_is_given(t, lost):
    state, lines = said(lambda: t.attach(KEY, W))
    assert not lines
    _, lines = said(lambda: str(t.report(state, product, ROW)) and None)
    assert len(lines) == 1 and lost in lines[0] and "meets no rule in dot_general" in lines[0]
    assert lines[0].startswith("report: 'w': ") and "pass attach function=" in lines[0]
    state, lines = said(lambda: t.attach(KEY, W, function=product, inputs=(ROW,)))
    assert not lines and not said(lambda: str(t.report(state, product, ROW)) and None)[1]


def test_a_weight_that_is_built_whole_is_warned_of():
    function = lambda p, x: x @ jnp.exp(p["w"]).T  # noqa: E731
    _, lines = said(lambda: jp.lora(rank=2).attach(KEY, W, function=function, inputs=(ROW,)))
    assert lines == [
        "attach: 'w': lora(rank=2) meets no rule in exp: the weight is built whole; write that use "
        "as a product, or narrow where="
    ]
    # What always builds its weight does what it is for.
    assert not said(lambda: jp.fake_quant().attach(KEY, W, function=function, inputs=(ROW,)))[1]


def test_disagreeing_uses_are_named_and_the_leaf_keeps_its_layout():
    function = lambda p, x: x @ p["w"].T @ p["w"]  # noqa: E731
    t = jp.lora(rank=2)
    state, lines = said(lambda: t.attach(KEY, W, function=function, inputs=(ROW,)))
    assert lines == [
        "attach: 'w' of shape (40, 6): its uses disagree about what is summed over: dot_general "
        "over axis 1, dot_general over axis 0; lora(rank=2) takes axis 0 as what is summed over; "
        "pass layout={'w': jp.weights.Layout(inputs=.., outputs=..)}, or narrow where="
    ]
    plain, _ = said(lambda: t.attach(KEY, W))
    assert jax.tree.structure(state) == jax.tree.structure(plain)
    mine, lines = said(lambda: t.attach(KEY, W, layout={"w": Layout((1,), (0,))}))
    assert not lines and mine["w"].base.parts["a"].shape == (6, 2)


def test_without_a_function_a_state_is_what_it_was():
    t = jp.chain(jp.lora(rank=2), jp.fake_quant())
    state = t.attach(KEY, {"w": W["w"].T})
    proved = t.attach(KEY, {"w": W["w"].T}, function=lambda p, x: x @ p["w"], inputs=(ROW,))
    assert jax.tree.structure(state) == jax.tree.structure(proved)
    jax.tree.map(np.testing.assert_array_equal, state, proved)
    assert state["w"].method.name == "fake_quant(bits=4)" and state["w"].base.base is not None


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"inputs": (ROW,)}, "inputs= and no function="),
        ({"function": product, "inputs": ROW}, r"inputs= of type ndarray: give a tuple"),
        ({"function": product, "inputs": (ROW,), "layout": {}}, "give one of them"),
        (
            {"layout": {"v": Layout((0,), (1,))}},
            "'v', which is no leaf .*; near it are 'w'",
        ),
        ({"layout": {"w": Layout((0,), (0,))}}, "give each of 0 to 1 once"),
        ({"layout": {"w": Layout((0,), (1,), (2,))}}, "give each of 0 to 1 once"),
        ({"layout": {"w": Layout((), (1, 0))}}, "has no inputs"),
        ({"layout": {"w": Layout((2,), (1,), (0,), ((3, 2), (6,)))}}, "must multiply to its size"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        jp.lora(rank=2).attach(KEY, W, **how)


def test_a_layout_of_no_leaf_is_refused_by_name():
    layout = Layout((1,), (0,))
    for given in ({"kernle": layout}, {"w": layout, "kernle": layout}):
        with pytest.raises(ValueError, match="layout= of 'kernle', .*; near it are 'w'"):
            jp.lora(rank=1).attach(KEY, W, layout=given)
