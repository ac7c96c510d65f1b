"""Dropout and stochastic rounding: a key makes a state, which is a weight like others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpara as jp
from jaxpara import nn
from jaxpara.train import next_token_loss
from tests.recurrence.kit import QUICK

KEY = jax.random.key(0)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


METHODS = {
    "dropout": jp.lora(rank=2, dropout=0.4),
    "fake_quant": jp.fake_quant(bits=3, rounding="stochastic"),
    "format": jp.number_format("float8_e4m3fn", rounding="stochastic"),
    "blocks": jp.number_format("mxfp4", rounding="stochastic"),
    "chain": jp.chain(
        jp.lora(rank=2, dropout=0.4), jp.fake_quant(activations=8, rounding="stochastic")
    ),
}


def state_of(t, w):
    state = t.attach(KEY, {"w": w})
    train, frozen = jp.split(state, t.trainable(state))
    return jp.combine(jax.tree.map(lambda leaf: leaf + 0.1, train), frozen)


@pytest.mark.parametrize("name", METHODS)
def test_a_sampled_state_is_one_weight_in_a_scan_over_layers(name):
    t, w, x = METHODS[name], normal(0, 3, 8, 8), normal(1, 2, 8)
    state = state_of(t, w)
    drawn = t.sample(state, jax.random.key(1))
    ours, theirs = t.effective(drawn)["w"], t.effective(t.sample(state, jax.random.key(2)))["w"]
    assert np.any(ours != theirs) and np.any(ours[0] - w[0] != ours[1] - w[1])
    np.testing.assert_array_equal(ours, t.effective(t.sample(state, jax.random.key(1)))["w"])
    assert np.any(ours != t.effective(state)["w"])
    if name == "chain":  # activations are quantised by the rule alone
        return

    def layers(p):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]

    def both(run):
        train, frozen = jp.split(state, t.trainable(state))
        whole = lambda train: t.sample(jp.combine(train, frozen), jax.random.key(1))  # noqa: E731
        loss = lambda train: jnp.sum(jnp.sin(run(whole(train))))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(train)

    found, wanted = both(jp.lift(layers)), both(lambda s: layers(t.effective(s)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, wanted)


def test_dropped_inputs_are_zeros_of_a_and_the_mean_is_the_weight():
    t = METHODS["dropout"]
    state = state_of(t, normal(0, 8, 4))
    a = np.asarray(state["w"].parts["a"])
    draw = jax.jit(jax.vmap(lambda key: t.sample(state, key)["w"].parts["a"]))
    drawn = np.asarray(draw(jax.random.split(KEY, 4000)))
    kept = np.any(drawn != 0, axis=2)
    np.testing.assert_allclose(drawn, kept[..., None] * a / 0.6, rtol=1e-6)
    assert abs(np.mean(kept) - 0.6) < 0.01
    np.testing.assert_allclose(np.mean(drawn, 0), a, atol=0.1 * np.max(np.abs(a)))
    # No dropout, no choice: the key changes nothing.
    plain = jp.lora(rank=2).attach(KEY, {"w": normal(0, 8, 4)})
    jax.tree.map(np.testing.assert_array_equal, jp.lora(rank=2).sample(plain, KEY), plain)


@pytest.mark.parametrize("name", ["fake_quant", "format"])
def test_stochastic_rounding_takes_a_neighbour_and_its_mean_is_the_weight(name):
    t, w = METHODS[name], normal(0, 8, 4)
    state = t.attach(KEY, {"w": w})
    draw = jax.jit(jax.vmap(lambda key: t.effective(t.sample(state, key))["w"]))
    drawn = np.asarray(draw(jax.random.split(KEY, 2000)))
    nearest = np.asarray(t.effective(state)["w"])
    for place in np.ndindex(w.shape):
        seen = np.unique(drawn[(slice(None), *place)])
        assert len(seen) <= 2 and nearest[place] in seen
        assert seen[0] - 1e-6 <= w[place] <= seen[-1] + 1e-6
        width = seen[-1] - seen[0]
        assert abs(np.mean(drawn[(slice(None), *place)]) - w[place]) <= 0.06 * width + 1e-6
    plain = {"fake_quant": jp.fake_quant(bits=3), "format": jp.number_format("float8_e4m3fn")}[name]
    np.testing.assert_array_equal(nearest, plain.effective(plain.attach(KEY, {"w": w}))["w"])
    merged = t.effective(t.merge(state))["w"]
    np.testing.assert_array_equal(merged, nearest)
    # Keys of the older kind do as well.
    found = t.effective(t.sample(state, jax.random.PRNGKey(1)))["w"]
    np.testing.assert_array_equal(found, t.effective(t.sample(state, jax.random.key(1)))["w"])
    # Straight through, whatever was drawn.
    step = lambda s: jnp.sum(t.effective(t.sample(s, KEY))["w"] * w)  # noqa: E731
    np.testing.assert_array_equal(jax.grad(step)(state)["w"].base, w)


def test_a_model_takes_a_key_and_its_loss_hands_it_over():
    model = nn.decoder(11, 8, 1, mixer=nn.mixers.attention(heads=2))
    t = jp.lora(rank=2, dropout=0.5, where="**/kernel")
    tuned = t(model)
    state = jax.tree.map(lambda leaf: leaf + 0.05, jax.jit(tuned.init)(KEY))
    tokens = np.arange(12).reshape(2, 6) % 11
    apply = jax.jit(tuned.apply, compiler_options=QUICK)
    one, two, none = (apply(state, tokens, key=k) for k in (KEY, jax.random.key(1), None))
    assert np.any(one != two) and np.any(one != none)
    np.testing.assert_allclose(
        one, model.apply(t.effective(t.sample(state, KEY)), tokens), atol=2e-5
    )
    np.testing.assert_allclose(none, model.apply(t.effective(state), tokens), atol=2e-5)
    loss = jax.jit(next_token_loss(tuned), compiler_options=QUICK)
    assert loss(state, tokens, KEY)[0] != loss(state, tokens, jax.random.key(1))[0]
    plain = next_token_loss(model)
    params = t.effective(state)
    assert plain(params, tokens, KEY)[0] == plain(params, tokens, jax.random.key(1))[0]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"dropout=1.0: give a probability from 0 to below 1"):
        jp.lora(dropout=1.0)
    with pytest.raises(ValueError, match="rounding='up': give 'nearest' or 'stochastic'"):
        jp.fake_quant(rounding="up")
