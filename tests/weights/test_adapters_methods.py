"""DoRA, PaCA, (IA)^3 and the adapters of convolutions: what their papers say of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp

KEY = jax.random.key(0)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def replaced(weight, **parts):
    return dataclasses.replace(weight, parts={**weight.parts, **parts})


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def a_dora(**settings):
    t = jp.dora(rank=2, alpha=3.0, **settings)
    state = t.attach(KEY, {"w": normal(0, 2, 6, 4)})["w"]
    moved = replaced(state, b=normal(1, 2, 2, 4), magnitude=1 + normal(2, 2, 4) ** 2)
    return t, state, moved


def test_dora_starts_as_the_weight_and_its_columns_have_the_trained_magnitudes(double):
    t, start, moved = a_dora()
    np.testing.assert_allclose(t.effective(start), start.base, rtol=1e-14)
    found = np.asarray(t.effective(moved))
    magnitude = np.asarray(moved.parts["magnitude"])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), magnitude, rtol=1e-14)
    v = moved.base + 1.5 * moved.parts["a"] @ moved.parts["b"]
    np.testing.assert_allclose(found, magnitude[:, None] * v / np.linalg.norm(v, axis=1)[:, None])
    # With the magnitudes that V has it is LoRA.
    lora = replaced(moved, magnitude=np.linalg.norm(v, axis=1))
    np.testing.assert_allclose(t.effective(lora), v, rtol=1e-14)


@pytest.mark.slow
def test_dora_gradients_are_the_finite_differences_with_the_norm_held(double):
    t, _, moved = a_dora()
    weights, parts = normal(3, 2, 6, 4), {k: np.asarray(v) for k, v in moved.parts.items()}
    grads = jax.grad(lambda p: jnp.sum(weights * t.effective(replaced(moved, **p))))(moved.parts)
    norm = np.linalg.norm(moved.base + 1.5 * parts["a"] @ parts["b"], axis=1, keepdims=True)

    def surrogate(parts):
        v = moved.base + 1.5 * parts["a"] @ parts["b"]
        return np.sum(weights * parts["magnitude"][:, None] * v / norm)

    for name, part in parts.items():
        step = normal(4, *part.shape)
        ahead, behind = ({**parts, name: part + h * step} for h in (1e-6, -1e-6))
        difference = (surrogate(ahead) - surrogate(behind)) / 2e-6
        np.testing.assert_allclose(np.sum(grads[name] * step), difference, rtol=1e-7)


@pytest.mark.slow
def test_dora_keeps_a_column_of_zeros_finite():
    w = np.float32(normal(0, 6, 4))
    w[:, 2] = 0
    t = jp.dora(rank=2)
    state = t.attach(KEY, {"w": w})
    grads = jax.grad(lambda p: jnp.sum(t.effective(replaced(state["w"], **p))))(state["w"].parts)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((t.effective(state), grads)))


def test_paca_gradients_are_the_rows_of_the_full_gradient_in_every_layer(double):
    w, x = normal(0, 3, 8, 8), normal(1, 5, 8)
    t = jp.paca(rank=3)
    state = t.attach(KEY, {"w": w})["w"]
    state = replaced(state, update=normal(2, 3, 3, 8))
    rows = np.asarray(state.parts["rows"])
    assert all(len(set(r)) == 3 and r.min() >= 0 and r.max() < 8 for r in rows)
    assert len({tuple(r) for r in rows}) > 1
    merged = np.asarray(t.merge(state))
    np.testing.assert_array_equal(merged, t.effective(state))

    def loss(w):
        return jnp.sum(jnp.sin(lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]))

    full = np.asarray(jax.grad(loss)(merged))
    found = jax.grad(lambda u: jp.lift(loss)(replaced(state, update=u)))(state.parts["update"])
    np.testing.assert_allclose(found, np.take_along_axis(full, rows[:, :, None], 1), rtol=1e-10)


def test_paca_leaves_the_other_rows_as_they_were_bit_for_bit():
    w = np.float32(normal(0, 8, 4))
    w[0] = -0.0
    t = jp.paca(rank=3)
    state = t.attach(KEY, {"w": w})["w"]
    rows = np.asarray(state.parts["rows"])
    trained = replaced(state, update=np.float32(normal(1, 3, 4)))
    merged, others = np.asarray(t.merge(trained)), np.setdiff1d(np.arange(8), rows)
    assert 0 in others
    assert merged[others].tobytes() == w[others].tobytes()
    np.testing.assert_array_equal(merged[rows], w[rows] + trained.parts["update"])
    assert jax.tree.leaves(t.trainable(state)) == [False, False, True]  # base, rows, update


def kept(run, *arguments):
    """Shapes of what the backward pass of `run` keeps."""
    shapes = jax.eval_shape(lambda *a: jax.vjp(run, *a)[1], *arguments)
    return {leaf.shape for leaf in jax.tree.leaves(shapes)}


def test_paca_keeps_of_the_inputs_only_what_its_rows_see():
    t = jp.paca(rank=3)
    state = t.attach(KEY, {"first": normal(0, 8, 8), "second": normal(1, 8, 8)})
    train, frozen = jp.split(state, t.trainable(state))
    x = jnp.zeros((11, 8))

    def function(p, x):
        return x @ p["first"] @ p["second"]

    lifted = kept(lambda train: jp.lift(function)(jp.combine(train, frozen), x), train)
    assert (11, 3) in lifted and (11, 8) not in lifted
    # The same maths on the parameters alone keeps the whole input.
    dense = kept(lambda train: function(t.effective(jp.combine(train, frozen)), x), train)
    assert (11, 8) in dense


@pytest.mark.slow
def test_paca_needs_the_memory_of_its_rows_in_a_scan_over_layers():
    depth, width, batch = 8, 64, 512
    w = jax.ShapeDtypeStruct((depth, width, width), jnp.float32)
    x = jax.ShapeDtypeStruct((batch, width), jnp.float32)

    def memory(t):
        state = jax.eval_shape(t.attach, KEY, {"w": w})
        train, frozen = jp.split(state, t.trainable(state))
        function = jp.lift(lambda p, x: lax.scan(lambda h, w: (h @ w, None), x, p["w"])[0])
        grad = jax.grad(lambda train, frozen, x: jnp.sum(function(jp.combine(train, frozen), x)))
        return jax.jit(grad).lower(train, frozen, x).compile().memory_analysis().temp_size_in_bytes

    activations = 4 * depth * batch * width
    assert memory(jp.lora(rank=4)) >= activations
    assert memory(jp.paca(rank=4)) < 0.6 * activations


def test_ia3_multiplies_outputs_or_inputs(double):
    w, x, along = normal(0, 2, 6, 4), normal(1, 3, 6), {-1: normal(2, 2, 4), -2: normal(3, 2, 6)}
    for axis, scale in along.items():
        t = jp.ia3(axis=axis)
        state = t.attach(KEY, {"w": w})["w"]
        np.testing.assert_array_equal(t.effective(state), w)
        found = jp.lift(lambda w, x: jnp.einsum("bi,lio->lbo", x, w))(
            replaced(state, factor=scale), x
        )
        for layer in range(2):
            by_hand = x @ w[layer] * scale[layer] if axis == -1 else (x * scale[layer]) @ w[layer]
            np.testing.assert_allclose(found[layer], by_hand, rtol=1e-13)


CONVOLUTIONS = {
    "NHWC, HWIO": (("NHWC", "HWIO", "NHWC"), {}, "r"),
    "NCHW out": (("NHWC", "HWIO", "NCHW"), {"window_strides": (2, 1), "rhs_dilation": (1, 2)}, "r"),
    "groups": (("NHWC", "HWIO", "NHWC"), {"feature_group_count": 2}, "r"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_with_an_adapted_kernel(name, double):
    numbers, options, how = CONVOLUTIONS[name]
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    kernel, x = normal(0, 3, 3, 4, 6), normal(1, 2, 5, 5, 4 * options.get("feature_group_count", 1))

    def function(w, x):
        return lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)

    t = jp.lora(rank=2, window=2)
    state = t.attach(KEY, kernel)
    assert state.parts["a"].shape == (3, 3, 4, 2) and state.parts["b"].shape == (2, 6)
    state = replaced(state, b=normal(2, 2, 6))
    by_hand = kernel + 2 * np.einsum("hwir,ro->hwio", state.parts["a"], state.parts["b"])
    np.testing.assert_allclose(jp.lift(function)(state, x), function(by_hand, x), rtol=1e-10)
    assert [use.how[0] for use in t.report(state, function, x).uses] == [how]
    # Adapters for each place of the window do not factor a convolution.
    each = jp.lora(rank=2)
    assert each.report(each.attach(KEY, kernel), function, x).uses[0].how == "densified"


@pytest.mark.parametrize("make", [jp.lora, jp.dora])
def test_a_kernel_may_lose_the_axes_of_its_window(make):
    kernel, x = normal(0, 3, 8, 4), normal(1, 5, 8)
    t = make(rank=2, window=1)
    state = t.attach(KEY, kernel)
    state = replaced(state, b=normal(2, 2, 4))
    uses = {
        "a place": lambda k, x: x @ k[1],
        "a place that is traced": lambda k, x: (
            x @ lax.dynamic_index_in_dim(k, x.shape[0] % 3, 0)[0]
        ),
        "all in turn": lambda k, x: lax.scan(lambda h, w: (h, h @ w), x, k)[1],
        "a cut": lambda k, x: x @ k.reshape(3, 2, 4, 4)[2].reshape(8, 4),
    }
    for name, function in uses.items():
        wanted = function(t.effective(state), x)
        np.testing.assert_allclose(
            jp.lift(function)(state, x), wanted, rtol=1e-5, atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jp.dora(rank=0), "rank=0: give at least 1"),
        (lambda: jp.paca(rank=0), "rank=0: give at least 1"),
        (lambda: jp.ia3(axis=0), "axis=0: give -1 to scale the outputs or -2"),
        (lambda: jp.lora(window=-1), "window=-1: give the number of window axes"),
        (
            lambda: jp.paca(rank=9).attach(KEY, {"w": normal(0, 8, 4)}),
            r"'w': rank=9 rows of a leaf of shape \(8, 4\): give 8 at most",
        ),
        (
            lambda: jp.dora(window=2).attach(KEY, {"w": normal(0, 8, 4)}),
            r"window=2 needs leaves of at least 4 axes .* give window=0",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
