"""Leaves of any layout: what a function says of them, and every method on them.

The oracle is the same function written for leaves `[*batch, in, out]`, to which the same is
attached as they stand.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from jaxpara.weights import Layout
from tests.recurrence.kit import QUICK

KEY = jax.random.key(0)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def conv(x, w, spec="OIH", **options):
    rest = spec.replace("O", "").replace("I", "")
    image = f"NC{rest}" if spec[0] == "O" else f"N{rest}C"
    return lax.conv_general_dilated(
        x, w, (1,) * len(rest), "SAME", dimension_numbers=(image, spec, image), **options
    )


# Analysis: a function, the leaf, an input, and what the function says of the leaf.


class Said(NamedTuple):
    function: Any
    shape: tuple[int, ...]
    x: Any
    wanted: Layout | str


def scanned(w, x):
    return lax.scan(lambda h, w: (jnp.tanh(w @ h), None), x, w)[0]


def scanned_twice(w, x):
    inner = lambda h, w: (lax.scan(lambda h, w: (h @ w, None), h, w)[0], None)  # noqa: E731
    return lax.scan(inner, x, w.reshape(2, 2, 3, 3))[0]


@jax.custom_jvp
def with_a_rule(w, x):
    return x @ w.T


with_a_rule.defjvp(lambda p, t: (with_a_rule(*p), p[1] @ t[0].T + t[1] @ p[0].T))

X, IMAGE, IDS = normal(0, 2, 3), normal(1, 1, 6, 5), np.array([1, 2])
IMAGE_2D = normal(1, 1, 4, 4, 6)
SAID = {
    "in_out": Said(lambda w, x: x @ w, (3, 8), X, Layout((0,), (1,))),
    "out_in": Said(lambda w, x: x @ w.T, (8, 3), X, Layout((1,), (0,))),
    "equinox": Said(lambda w, x: jax.vmap(lambda x: w @ x)(x), (8, 3), X, Layout((1,), (0,))),
    "heads": Said(
        lambda w, x: jnp.einsum("bd,dhk->bhk", x, w), (3, 2, 4), X, Layout((0,), (1, 2))
    ),
    "heads_back": Said(
        lambda w, x: jnp.einsum("bhk,hkd->bd", x, w), (2, 4, 3), normal(2, 5, 2, 4),
        Layout((0, 1), (2,)),
    ),
    "a_matrix_for_each_head": Said(
        lambda w, x: jnp.einsum("bhk,dhk->bhd", x, w), (3, 2, 4), normal(2, 5, 2, 4),
        Layout((2,), (0,), (1,)),
    ),
    "heads_packed_in_an_axis": Said(
        lambda w, x: jnp.einsum("bhk,hkd->bhd", x, w.reshape(2, 4, 3)), (8, 3),
        normal(2, 5, 2, 4), Layout((1,), (2,), (0,), ((2, 4), (3,))),
    ),
    "all_heads_packed": Said(
        lambda w, x: jnp.einsum("bd,dhk->bhk", x, w.reshape(3, 2, 4)), (3, 8), X,
        Layout((0,), (1,)),
    ),
    "convolution": Said(
        lambda w, x: conv(x, w), (8, 6, 3), IMAGE, Layout((2, 1), (0,))
    ),
    "convolution_2d": Said(
        lambda w, x: conv(x, w, "HWIO"), (3, 3, 6, 8), IMAGE_2D, Layout((0, 1, 2), (3,))
    ),
    "groups": Said(
        lambda w, x: conv(x, w, feature_group_count=2), (8, 3, 3), IMAGE,
        Layout((3, 2), (1,), (0,), ((2, 4), (3,), (3,))),
    ),
    "depthwise": Said(
        lambda w, x: conv(x, w, "HWIO", feature_group_count=6), (3, 3, 1, 6), IMAGE_2D,
        Layout((0, 1, 2), (), (3,)),
    ),
    "kernels_under_vmap": Said(
        lambda w, x: jax.vmap(conv)(x, w), (2, 8, 6, 3), np.stack([IMAGE, IMAGE]),
        Layout((3, 2), (1,), (0,)),
    ),
    "weights_under_vmap": Said(
        lambda w, x: jax.vmap(lambda w, x: w @ x)(w, x), (2, 8, 3), X, Layout((2,), (1,), (0,))
    ),
    "weights_under_vmap_that_see_the_same": Said(
        lambda w, x: jax.vmap(lambda w: w @ x[0])(w), (2, 8, 3), X, Layout((2,), (0, 1))
    ),
    "layers": Said(scanned, (4, 3, 3), X.T, Layout((2,), (1,), (0,))),
    "layers_in_the_middle": Said(
        lambda w, x: scanned(jnp.moveaxis(w, 1, 0), x), (3, 4, 3), X.T, Layout((2,), (0,), (1,))
    ),
    "layers_in_two_loops": Said(scanned_twice, (4, 3, 3), X, Layout((1,), (2,), (0,))),
    "layers_by_index": Said(
        lambda w, x: lax.fori_loop(0, 4, lambda i, h: h @ w[i].T, x), (4, 3, 3), X,
        Layout((2,), (1,), (0,)),
    ),
    "experts": Said(
        lambda w, x: lax.ragged_dot(x, w, jnp.array([1, 1], jnp.int32)), (2, 3, 4), X,
        Layout((1,), (2,), (0,)),
    ),
    "tied_embedding": Said(
        lambda w, i: jnp.tanh(w[i]) @ w.T, (8, 3), IDS, Layout((1,), (0,))
    ),
    "embedding": Said(lambda w, i: jnp.tanh(w[i]), (8, 3), IDS, Layout((0,), (1,))),
    "embedding_of_columns": Said(lambda w, i: w[:, i], (3, 8), IDS, Layout((1,), (0,))),
    "sliced": Said(
        lambda w, x: [part @ x[0] for part in jnp.split(w, 3)], (9, 3), X, Layout((1,), (0,))
    ),
    "indexed_at_the_end": Said(
        lambda w, x: [w[..., i] @ x[0] for i in range(2)], (4, 3, 2), X, Layout((1,), (0,), (2,))
    ),
    "normalised": Said(
        lambda w, x: x @ (w / jnp.linalg.norm(w, axis=1, keepdims=True)).T, (8, 3), X,
        Layout((1,), (0,)),
    ),
    "rounded": Said(
        lambda w, x: x @ w.astype(jnp.bfloat16).T, (8, 3), X, Layout((1,), (0,))
    ),
    "in_a_branch": Said(
        lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w.T, lambda: -x @ w.T), (8, 3), X,
        Layout((1,), (0,)),
    ),
    "in_a_loop": Said(
        lambda w, x: lax.while_loop(lambda h: h[0, 0] < 3, lambda h: h @ w.T, x), (3, 3), X,
        Layout((1,), (0,)),
    ),
    "in_remat": Said(jax.checkpoint(lambda w, x: x @ w.T), (8, 3), X, Layout((1,), (0,))),
    "behind_a_rule": Said(with_a_rule, (8, 3), X, Layout((1,), (0,))),
    "no_data": Said(lambda w, x: x @ w.T, (8, 3), normal(0, 0, 3), Layout((1,), (0,))),
    "both_ways": Said(
        lambda w, x: jnp.tanh(x @ w) @ w.T, (3, 8), X,
        "disagree about what is summed over: dot_general over axis 0, dot_general over axis 1",
    ),
    "a_diagonal": Said(lambda w, x: jnp.einsum("bi,ii->b", x, w), (3, 3), X, "used by reduce_sum"),
    "added": Said(lambda w, x: x + w, (2, 3), X, "there is no product with it"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_the_jaxpr_says_what_is_summed_over(name):
    case = SAID[name]
    leaf = jax.ShapeDtypeStruct(case.shape, jnp.float32)
    found = jp.weights.layout(lambda p, x: case.function(p["w"], x), {"w": leaf}, case.x)
    if isinstance(case.wanted, Layout):
        assert found.known == {"w": case.wanted} and not found.unknown
    else:
        assert not found.known and case.wanted in found.unknown["w"]


# Every method on a network of such leaves, and on the same one of matrices.

PARAMS = {
    "dense": normal(0, 8, 6),  # [out, in]
    "heads": normal(1, 8, 2, 4),  # [in, heads, size]
    "stack": 0.5 * normal(3, 2, 8, 8),  # [layers, out, in]
    "kernel": normal(4, 8, 2, 2),  # [out, in, window], of two groups
}
ROWS = normal(5, 3, 6)


def network(p, x):
    h = jnp.tanh(x @ p["dense"].T)
    h = jnp.tanh(jnp.einsum("bd,dhk->bhk", h, p["heads"]))
    h = h.transpose(0, 2, 1).reshape(3, 8)
    h = lax.scan(lambda h, w: (jnp.tanh(h @ w.T), None), h, p["stack"])[0]
    return conv(h.reshape(3, 4, 2), p["kernel"], feature_group_count=2)


def matrices(p):
    """The leaves as `[*batch, in, out]`; the inputs of a kernel are its window, then channels."""
    kernel = p["kernel"].reshape(2, 4, 2, 2).transpose(0, 3, 2, 1)
    return {
        "dense": p["dense"].T,
        "heads": p["heads"].reshape(8, 8),
        "stack": p["stack"].transpose(0, 2, 1),
        "kernel": kernel.reshape(2, 4, 4),
    }


def network_of_matrices(p, x):
    h = jnp.tanh(x @ p["dense"])
    h = jnp.tanh(h @ p["heads"]).reshape(3, 2, 4)
    h = h.transpose(0, 2, 1).reshape(3, 8)
    h = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["stack"])[0]
    groups = jnp.pad(h.reshape(3, 2, 2, 2), ((0, 0), (0, 0), (0, 0), (0, 1)))
    seen = jnp.stack([groups[..., :2], groups[..., 1:]], axis=2)  # [n, group, window, channel, t]
    out = jnp.einsum("ngit,gio->ngto", seen.reshape(3, 2, 4, 2), p["kernel"])
    return out.transpose(0, 1, 3, 2).reshape(3, 8, 2)


METHODS = {
    "lora": jp.lora(rank=1),
    "dora": jp.dora(rank=1),
    "ia3": jp.ia3(),
    "ia3 of inputs": jp.ia3(axis=-2),
    "paca": jp.paca(rank=2),
    "mos": jp.mos(rank=1, budget=1, shards=2, private=0),
    "fake_quant": jp.fake_quant(bits=4),
    "fake_quant of activations": jp.fake_quant(bits=4, group=2, activations=5),
    "ternary": jp.ternary(group=2),
    "flexq": jp.flexq(sensitive="heads", group=2),
    "rtn": jp.rtn(bits=4, affine=True),
    "rtn of activations": jp.rtn(bits=6, activations=5),
    "nf4": jp.nf4(block=4),
    "easy_quant": jp.easy_quant(bits=3),
    "lsq": jp.lsq(bits=3),
    "l4q": jp.l4q(bits=4, rank=1),
    "lr_qat": jp.lr_qat(bits=4, rank=1),
    "number_format": jp.number_format("mxfp4"),
    "sparse_nm": jp.sparse_nm(n=1, m=2),
    "bdwp": jp.bdwp(n=1, m=2),
    "qlora": jp.chain(jp.rtn(bits=4), jp.lora(rank=1)),
    "lora in a quantiser": jp.chain(jp.lora(rank=1), jp.fake_quant(bits=4, activations=6)),
}
FAST = ("lora", "bdwp")


def moved(t, state):
    """The state with every trained number moved."""
    train, frozen = jp.split(state, t.trainable(state))
    leaves, structure = jax.tree.flatten(train)
    leaves = [
        leaf + jnp.asarray(0.1 * normal(i + 20, *leaf.shape), leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, leaves), frozen


def everything(t, run, params, rows, **how):
    """A state; values, gradients of what is trained and of x, values merged; effective weights."""
    train, frozen = moved(t, t.attach(KEY, params, **how))
    state = jp.combine(train, frozen)

    def loss(train, x):
        out = jp.lift(run)(jp.combine(train, frozen), x)
        return jnp.sum(jnp.sin(out)), out

    (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(train, rows)
    return state, (out, grads, jp.lift(run)(t.merge(state), rows)), t.effective(state)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in METHODS]
)
def test_a_method_on_any_layout_is_the_method_on_matrices(name, double):
    t = METHODS[name]
    # Number formats are those of float32 at most.
    dtype, tolerance = (np.float32, 2e-6) if name == "number_format" else (np.float64, 1e-11)
    params, rows = jax.tree.map(lambda a: a.astype(dtype), (PARAMS, ROWS))

    def both():
        ours = everything(t, network, params, rows, function=network, inputs=(rows,))
        theirs = everything(t, network_of_matrices, matrices(params), rows)
        try:
            plain = t.attach(KEY, {"dense": params["dense"]})
        except ValueError:  # a setting that does not fit these axes
            return ours, theirs, None
        return ours, theirs, t.effective(jp.combine(*moved(t, plain)))["dense"]

    ours, theirs, plain = jax.jit(both, compiler_options=QUICK)()
    (state, found, effective), (other, wanted, again) = ours, theirs
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.max(np.abs(b)), 1e-3))
    assert {k: w.shape for k, w in effective.items()} == {k: w.shape for k, w in PARAMS.items()}
    for path, w in matrices(jax.tree.map(np.asarray, effective)).items():
        np.testing.assert_allclose(w, again[path], rtol=1e-12, atol=1e-14)
    # As many numbers in adapters and scales, and the same rules.
    one, two = t.report(state, network, rows), t.report(other, network_of_matrices, rows)
    assert (one.parts, one.bases) == (two.parts, two.bases)
    ruled = lambda report: {use.path for use in report.uses if use.how == "rule"}  # noqa: E731
    # A convolution has no rule for inputs that are scaled; stored integers are unpacked for it.
    assert ruled(two) - ruled(one) == ({"kernel"} if name in ("ia3 of inputs", "rtn") else set())
    # The control: taken as it stands, a leaf becomes another one.
    assert plain is None or not np.allclose(plain, effective["dense"], atol=1e-6)


@pytest.mark.untyped
def test_a_layout_that_is_none_is_named():
    t: Any = jp.lora(rank=1)
    roles: Any = jp.weights.Layout
    params = {"w": np.ones((3, 2))}
    for wrong in ("oi", ((1,), (0,)), None):
        with pytest.raises(TypeError, match="layout={'w': .*expected a layout, such as"):
            t.attach(jax.random.key(0), params, layout={"w": wrong})
    with pytest.raises(TypeError, match="layout=5; expected jp.weights.layout"):
        t.attach(jax.random.key(0), params, layout=5)
    with pytest.raises(ValueError, match="inputs is 1; give a tuple, such as inputs="):
        t.attach(jax.random.key(0), params, layout={"w": roles(1, 0)})
    # Equal to 1 and to 0, which would be axes.
    for axis in (True, 1.0):
        with pytest.raises(ValueError, match="axis=.*: give a whole number"):
            t.attach(jax.random.key(0), params, layout={"w": roles((axis,), (0,))})


def test_adapters_of_a_state_with_layouts_are_saved_and_put_back(double):
    where = re.compile("dense|heads")
    t = jp.chain(jp.ia3(where=where), jp.lora(rank=1, where=where))
    layouts = jp.weights.layout(network, PARAMS, ROWS)
    state = jp.combine(*moved(t, t.attach(KEY, PARAMS, layout=layouts)))
    saved = jp.weights.adapters(state)
    assert set(saved["dense"]) == {"a", "b", "base"} and saved["dense"]["a"].shape == (6, 1)
    fresh = t.attach(jax.random.key(1), PARAMS, layout=layouts)
    again = jp.weights.with_adapters(fresh, saved)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_the_example_of_the_manual_runs():
    text = (Path(__file__).parents[2] / "docs/methods/weights.md").read_text()
    section = text.split("## `weights.layout`")[1].split("\n## ")[0]
    code = section.split("```python\n")[1].split("```")[0]
    assert code.count("\nassert ") == 3  # which say what the layouts, adapters and merges are
    exec(code, {})
