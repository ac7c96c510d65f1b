"""LSQ, L4Q and LR-QAT: their gradients by the papers' formulas, their merges bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from jaxpara.weights.quant.grid import limits
from jaxpara.weights.weight import Weight
from tests.recurrence.kit import QUICK

slow = pytest.mark.slow


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def replaced(weight, **parts):
    return Weight(weight.base, {**weight.parts, **parts}, weight.method)


def quick(function, *args):
    return jax.jit(function, compiler_options=QUICK)(*args)


def attached(t, w):
    return quick(lambda w: t.attach(jax.random.key(0), {"w": w})["w"], w)


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


LSQ = [
    dict(bits=bits, affine=affine, **more)
    for bits in (2, 4)
    for affine in (False, True)
    for more in ({}, {"group": 3}, {"per_tensor": True})
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", LSQ, ids=str)
def test_lsq_gradients_are_the_finite_differences_of_the_surrogate(settings, double):
    # In the surrogate the rounding error of each entry is frozen: round(v) becomes v + error.
    w, weights = normal(0, 2, 6, 4), normal(1, 2, 6, 4)
    t = jp.lsq(**settings)
    state = t.attach(jax.random.key(0), {"w": w})["w"]
    # A scale that clips some entries, and an offset that is not zero.
    state = replaced(state, scale=0.4 * state.parts["scale"])
    if settings["affine"]:
        state = replaced(state, offset=0.1 + state.parts["offset"])
    low, high = limits(state.method.settings)
    group = settings.get("group", 6)

    def value(w, parts, error=None):
        shape = w.reshape(2, 6 // group, group, 4)
        scale, offset = parts["scale"], parts.get("offset", 0.0)
        v = (shape - offset) / scale
        clipped = np.clip(v, low, high)
        rounded = np.round(clipped) if error is None else clipped + error
        return (rounded * scale + offset).reshape(w.shape), np.round(clipped) - clipped, v

    exact, error, v = value(w, state.parts)
    assert 0 < np.mean((v < low) | (v > high)) < 0.9
    np.testing.assert_allclose(t.effective({"w": state})["w"], exact, rtol=1e-12, atol=1e-12)

    def loss(w, parts):
        return np.sum(weights * value(w, parts, error)[0])

    grads = jax.grad(lambda s: jnp.sum(weights * t.effective({"w": s})["w"]))(state)
    step = 1e-6
    for name in state.parts:
        part = np.asarray(state.parts[name])
        for index in np.ndindex(part.shape):
            up, down = part.copy(), part.copy()
            up[index] += step
            down[index] -= step
            above, below = (loss(w, {**state.parts, name: x}) for x in (up, down))
            wanted = (above - below) / (2 * step)
            np.testing.assert_allclose(grads.parts[name][index], wanted, rtol=1e-6, atol=1e-6)
    inside = ((v >= low) & (v <= high)).reshape(w.shape)
    np.testing.assert_allclose(grads.base, weights * inside, rtol=1e-12)


def test_a_weight_on_the_bound_of_the_grid_is_inside(double):
    w, weights = np.array([[1.5], [-1.5], [1.6], [0.7]]), np.array([[1.0], [2.0], [4.0], [8.0]])
    t = jp.lsq(bits=3)
    state = replaced(attached(t, w), scale=np.full((1, 1, 1), 0.5))
    grads = quick(jax.grad(lambda s: jnp.sum(weights * t.effective({"w": s})["w"])), state)
    np.testing.assert_array_equal(grads.base, [[1], [2], [0], [8]])
    # round(v) - v, which is zero on the bound, and the bound beyond it.
    np.testing.assert_allclose(grads.parts["scale"], 4 * 3 + 8 * (1 - 1.4), rtol=1e-12)


def test_the_affine_start_clips_nothing_and_a_symmetric_one_is_the_papers():
    w = normal(0, 6, 4).astype(np.float32)
    affine = jp.lsq(bits=4, affine=True)
    found = affine.effective(affine.attach(jax.random.key(0), {"w": w}))["w"]
    scale = affine.attach(jax.random.key(0), {"w": w})["w"].parts["scale"]
    assert np.max(np.abs(found - w) / scale[0]) <= 0.5 + 1e-6
    start = jp.lsq(bits=4).attach(jax.random.key(0), {"w": w})["w"].parts["scale"]
    np.testing.assert_allclose(start[0, 0], 2 * np.mean(np.abs(w), 0) / np.sqrt(7), rtol=1e-6)


def test_l4q_gradients_of_the_adapters_are_zero_where_the_weight_is_clipped(double):
    t = jp.l4q(bits=3, rank=2)
    state = t.attach(jax.random.key(0), {"w": normal(0, 6, 4)})["w"]
    lora = replaced(state.base, b=0.1 * normal(2, 2, 4))
    state = Weight(lora, {**state.parts, "scale": 0.4 * state.parts["scale"]}, state.method)
    weights = normal(1, 6, 4)
    grads = jax.grad(lambda s: jnp.sum(weights * t.effective({"w": s})["w"]))(state)
    low, high = limits(state.method.settings)
    whole = np.asarray(lora.base) + 2 * np.asarray(lora.parts["a"]) @ np.asarray(lora.parts["b"])
    v = whole / np.asarray(state.parts["scale"])[0]
    passed = weights * ((v >= low) & (v <= high))
    assert 0 < np.mean(passed == 0) < 1
    a, b = (np.asarray(lora.parts[name]) for name in "ab")
    np.testing.assert_allclose(grads.base.parts["a"], 2 * passed @ b.T, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(grads.base.parts["b"], 2 * a.T @ passed, rtol=1e-10, atol=1e-12)
    assert grads.base.base.shape == (6, 4)
    trained = t.trainable({"w": state})["w"]
    assert not trained.base.base and all(trained.base.parts.values())
    assert all(trained.parts.values())


def tied(seed, rows, columns):
    """A and B in quarters and whole numbers: their product is often half of an odd number."""
    a, b = normal(seed, rows, 2), normal(seed + 1, 2, columns)
    return np.float32(np.round(2 * a) / 4), np.float32(np.round(b))


def trained(t, shape, seed=0):
    """A state whose adapters and scales have moved, with ties in its weights and its updates."""
    w = normal(seed, *shape).astype(np.float32)
    w[1::2] = np.round(w[1::2] * 8) / 8
    state = t.attach(jax.random.key(0), {"w": w})["w"]
    update = 0.05 * normal(seed + 1, 2, shape[-1]).astype(np.float32)
    if isinstance(state.base, Weight):
        return {"w": Weight(replaced(state.base, b=update), state.parts, state.method)}
    a, b = tied(seed + 2, *shape)
    b[:, ::2] = update[:, ::2]
    if state.base.dtype == jnp.float32:
        # The sum of base and update is a tie, or beside one if the update is not rounded first.
        kept = np.array(state.base)
        kept[1::2] = (
            np.floor(kept[1::2]) + 0.5 - np.float32(state.method.settings.scale) * (a @ b)[1::2]
        )
        state = Weight(jnp.asarray(kept), state.parts, state.method)
    return {"w": replaced(state, a=a, b=b, scale=1.01 * state.parts["scale"])}


MERGED = {
    "lr_qat": jp.lr_qat(bits=4, rank=2, alpha=3.1),
    "lr_qat_bfloat16": jp.lr_qat(bits=4, rank=2, downcast="bfloat16"),
    "lr_qat_fixed8": jp.lr_qat(bits=4, rank=2, downcast="fixed8"),
    "lr_qat_int8": jp.lr_qat(bits=4, rank=2, downcast="int8"),
    "l4q": jp.l4q(bits=4, rank=2, group=256),
}


@pytest.mark.parametrize("name", MERGED)
def test_merged_integers_are_those_of_the_forward_bit_for_bit(name):
    t = MERGED[name]
    state = trained(t, (1024, 1024))
    merged = t.merge(state)
    assert merged["w"].base.dtype == jnp.int8 and merged["w"].base.size > 1e6
    low, high = limits(merged["w"].method.settings.grid)
    assert low <= np.min(merged["w"].base) and np.max(merged["w"].base) == high
    assert len(np.unique(merged["w"].base)) > 8
    # The forward is compiled whole, the merge op by op.
    x = normal(5, 3, 1024).astype(np.float32)
    forward = jp.lift(lambda p, x: (jnp.tanh(x @ p["w"]), p["w"]))(state, x)[1]
    np.testing.assert_array_equal(forward, t.effective(merged)["w"])
    before = t.effective(t.attach(jax.random.key(0), {"w": normal(0, 1024, 1024)}))["w"]
    assert np.mean(np.asarray(forward) != np.asarray(before)) > 0.1


def test_plain_lora_merged_and_rounded_is_not_what_was_trained():
    t = jp.chain(jp.fake_quant(bits=4), jp.lora(rank=2))
    w = normal(0, 256, 256).astype(np.float32)
    state = t.attach(jax.random.key(0), {"w": w})["w"]
    whole = t.merge({"w": replaced(state, b=0.05 * normal(1, 2, 256).astype(np.float32))})
    again = jp.fake_quant(bits=4)
    rounded = again.effective(again.attach(jax.random.key(0), whole))
    assert np.mean(np.asarray(rounded["w"]) != np.asarray(whole["w"])) > 0.5


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_fixed_point_keeps_the_frozen_weight_to_half_a_place(bits):
    w = {"w": normal(0, 64, 8).astype(np.float32)}
    exact = jp.lr_qat(bits=bits, rank=1).attach(jax.random.key(0), w)["w"]
    fixed = jp.lr_qat(bits=bits, rank=1, downcast="fixed8").attach(jax.random.key(0), w)["w"]
    assert fixed.base.dtype == jnp.int8
    error = np.abs(np.asarray(fixed.base) / 2 ** (8 - bits) - np.asarray(exact.base))
    assert np.max(error) <= 2.0 ** -(9 - bits) * (1 + 1e-6)


def test_lr_qat_on_integers_adds_the_rounded_update_to_them():
    t = jp.lr_qat(bits=3, rank=2, alpha=2.0, downcast="int8")
    state = attached(t, normal(0, 64, 8).astype(np.float32))
    scale = np.float64(state.parts["scale"][0])
    kept = np.clip(np.round(normal(0, 64, 8) / scale), -3, 3)
    assert state.base.dtype == jnp.int8
    np.testing.assert_array_equal(state.base, kept)
    a, b = tied(1, 64, 8)
    state, update = replaced(state, a=a, b=b), a @ b
    wanted = np.clip(kept + np.round(update), -3, 3)
    assert np.mean(update % 1 == 0.5) > 0.1 and np.mean(np.abs(kept + update) > 3) > 0.01
    # It is another function than rounding the sum: a tie goes to the even update.
    assert np.any(wanted != np.clip(np.round(kept + update), -3, 3))
    np.testing.assert_array_equal(t.merge({"w": state})["w"].base, wanted)
    np.testing.assert_allclose(t.effective({"w": state})["w"], wanted * scale, rtol=1e-6)


@pytest.mark.parametrize(
    "downcast", ["fixed8", "int8", *(pytest.param(d, marks=slow) for d in ("float32", "bfloat16"))]
)
def test_lr_qat_gradients_pass_where_the_nearest_integer_is_on_the_grid(downcast, double):
    t = jp.lr_qat(bits=3, rank=2, alpha=3.0, downcast=downcast)
    state = attached(t, normal(0, 24, 16))
    a, b = 0.5 * normal(1, 24, 2), normal(2, 2, 16)
    state, weights = replaced(state, a=a, b=b), normal(3, 24, 16)
    kept = np.float64(state.base) / (32 if downcast == "fixed8" else 1)
    update = 1.5 * a @ b
    nearest = kept + np.round(update) if downcast == "int8" else np.round(kept + update)
    inside = np.abs(nearest) <= 3
    # Some are beyond the last point of the grid and still round to it.
    assert 0.03 < np.mean(~inside) < 0.5 and np.any(inside & (np.abs(kept + update) > 3))
    scale = np.asarray(state.parts["scale"])[0]
    value = lambda p: jnp.sum(weights * t.effective({"w": replaced(state, **p)})["w"])  # noqa: E731
    grads = quick(jax.grad(value), state.parts)
    passed = 1.5 * weights * scale * inside
    np.testing.assert_allclose(grads["a"], passed @ b.T, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(grads["b"], a.T @ passed, rtol=1e-10, atol=1e-12)


def test_l4q_without_an_update_is_lsq(double):
    l4q, lsq = jp.l4q(bits=3, rank=2, alpha=0.0), jp.lsq(bits=3, affine=True)
    weights, grads = normal(1, 6, 4), []
    for t in (l4q, lsq):
        state = attached(t, normal(0, 6, 4))
        state = replaced(state, scale=0.4 * state.parts["scale"])
        value = lambda s, t=t: jnp.sum(weights * t.effective({"w": s})["w"])  # noqa: E731
        grads.append(quick(jax.value_and_grad(value), state))
    assert grads[0][0] == grads[1][0]
    for name in ("scale", "offset"):
        assert np.any(grads[1][1].parts[name] != 0)
        np.testing.assert_array_equal(grads[0][1].parts[name], grads[1][1].parts[name])
    assert not np.any(grads[0][1].base.parts["b"])


def test_lr_qat_gradient_of_the_scale_is_the_clipped_integer(double):
    t = jp.lr_qat(bits=3, rank=2)
    state = t.attach(jax.random.key(0), {"w": normal(0, 6, 4)})["w"]
    weights = normal(1, 6, 4)
    grads = jax.grad(lambda s: jnp.sum(weights * t.effective({"w": s})["w"]), allow_int=True)(state)
    integers = np.asarray(t.merge({"w": state})["w"].base, np.float64)
    wanted = np.sum(weights * integers, axis=0)
    np.testing.assert_allclose(grads.parts["scale"][0, 0], wanted, rtol=1e-12)


def test_the_start_of_lr_qat_is_no_worse_than_rounding_to_nearest():
    w = {"w": normal(0, 128, 16).astype(np.float32)}

    def error(t):
        return np.sum((np.asarray(t.effective(t.attach(jax.random.key(0), w))["w"]) - w["w"]) ** 4)

    for bits in (2, 3, 4):
        assert error(jp.lr_qat(bits=bits)) <= error(jp.fake_quant(bits=bits)) * (1 + 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MERGED)
def test_stacked_layers_are_quantised_layer_by_layer_inside_a_scan(name, double):
    t = {"l4q": jp.l4q(bits=4, rank=2)}.get(name, MERGED[name])
    stack, x = 0.5 * normal(0, 3, 8, 8), normal(1, 2, 8)
    state = t.attach(jax.random.key(0), {"w": stack})
    step = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
    function = lambda p, x: lax.scan(step, x, p["w"])[0]  # noqa: E731
    train, frozen = jp.split(state, t.trainable(state))

    def both(run):
        return jax.value_and_grad(lambda train: jnp.sum(run(jp.combine(train, frozen))))(train)

    ours = both(lambda s: jp.lift(function)(s, x))
    theirs = both(lambda s: function(t.effective(s), x))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    uses = t.report(state, function, x).uses
    assert [(use.primitive, use.how) for use in uses] == [("dot_general", "densified")]
    np.testing.assert_allclose(
        jp.lift(function)(t.merge(state), x), function(t.effective(state), x)
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jp.lr_qat(downcast="int4"), "expected one of float32, bfloat16, fixed8, int8"),
        (lambda: jp.lr_qat(bits=8, downcast="fixed8"), "no binary place"),
        (lambda: jp.lr_qat(rank=0), "rank=0"),
        (lambda: jp.lsq(bits=9), "bits=9: give 2 to 8"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
