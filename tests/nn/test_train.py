"""The step against one written out by hand in numpy, and accumulation against the whole batch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpara as jp
from jaxpara import nn, train
from jaxpara.recurrence import cells
from jaxpara.types import Model

VOCAB, BATCH, TIME = 7, 8, 6


@pytest.fixture(scope="module")
def model():
    return nn.decoder(
        VOCAB, 8, 1, mixer=nn.mixers.recurrent(cells.para_gru), mlp_hidden=8, conv_taps=2
    )


def windows(seed=0, batch=BATCH):
    return jax.random.randint(jax.random.key(seed), (batch, TIME + 1), 0, VOCAB)


def table_model():
    """Logits of the next token are a row of one matrix: small enough to differentiate by hand."""

    def init(key):
        return {"kernel": jax.random.normal(key, (VOCAB, VOCAB))}

    return Model(init, lambda params, tokens: params["kernel"][tokens])


def slow_loss(kernel, batch):
    """Mean nats and their gradient for `table_model`, in float64 loops."""
    gradient, total = np.zeros_like(kernel), 0.0
    for row in batch:
        for now, following in zip(row[:-1], row[1:], strict=True):
            p = np.exp(kernel[now] - kernel[now].max())
            p /= p.sum()
            total -= math.log(p[following])
            p[following] -= 1
            gradient[now] += p
    count = batch.shape[0] * (batch.shape[1] - 1)
    return total / count, gradient / count


@pytest.mark.slow
def test_loss_and_evaluation_are_nats_of_the_next_token():
    model = table_model()
    params = model.init(jax.random.key(0))
    expected, _ = slow_loss(np.asarray(params["kernel"], np.float64), np.asarray(windows()))
    value, metrics = train.next_token_loss(model)(params, windows(), jax.random.key(1))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["bits_per_token"], expected / math.log(2), rtol=1e-6)
    totals = [train.evaluate(model)(params, windows()[part]) for part in (slice(3), slice(3, 8))]
    assert sum(int(t["tokens"]) for t in totals) == BATCH * TIME
    nats = sum(float(t["nats"]) for t in totals)
    np.testing.assert_allclose(nats / (BATCH * TIME), expected, rtol=1e-6)


def test_three_steps_equal_adamw_written_out_by_hand():
    options = dict(learning_rate=0.1, steps=10, warmup=0.2, floor=0.1, weight_decay=0.05, clip=0.05)
    model = table_model()
    optimizer = train.optimizer(**options)
    state = train.init_state(model, optimizer, jax.random.key(0))
    kernel = np.asarray(state.params["kernel"], np.float64)
    mean, square = np.zeros_like(kernel), np.zeros_like(kernel)
    step = jax.jit(train.make_step(train.next_token_loss(model), optimizer))
    first = slow_loss(kernel, np.asarray(windows()))[0]
    for i in range(3):
        value, g = slow_loss(kernel, np.asarray(windows()))
        state, metrics = step(state, windows())
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
        norm = np.sqrt(np.sum(g**2))
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        assert norm > 0.05  # or the clip is not tested
        g *= 0.05 / norm
        mean, square = 0.9 * mean + 0.1 * g, 0.98 * square + 0.02 * g**2
        direction = (mean / (1 - 0.9 ** (i + 1))) / (np.sqrt(square / (1 - 0.98 ** (i + 1))) + 1e-8)
        if i < 2:  # two rising steps of ten
            rate = 0.1 * i / 2
        else:
            progress = (i - 2) / 8
            rate = 0.1 * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)
        kernel -= rate * (direction + 0.05 * kernel)
        np.testing.assert_allclose(state.params["kernel"], kernel, rtol=1e-5, atol=1e-6)
    assert int(state.step) == 3
    assert slow_loss(kernel, np.asarray(windows()))[0] < first


@pytest.mark.slow
def test_training_a_decoder_lowers_its_loss_and_compiles_once(model):
    optimizer = train.optimizer(learning_rate=0.02, steps=30)
    traces = []
    loss = train.next_token_loss(model)

    def counted(params, batch, key):
        traces.append(1)
        return loss(params, batch, key)

    step = jax.jit(train.make_step(counted, optimizer), donate_argnums=0)
    state = train.init_state(model, optimizer, jax.random.key(0))
    losses = []
    for _ in range(30):
        state, metrics = step(state, windows())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.6 * losses[0]
    assert len(traces) == 1
    # what a step reports is the loss before its update, by an evaluation that shares no gradient
    fresh = train.init_state(model, optimizer, jax.random.key(0))
    totals = train.evaluate(model)(fresh.params, windows())
    np.testing.assert_allclose(losses[0], totals["nats"] / totals["tokens"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_step_equals_the_step_on_the_whole_batch(model, parts):
    # SGD: one step of Adam hides a wrong factor of the gradient.
    optimizer = optax.sgd(1.0)
    loss = train.next_token_loss(model)
    state = train.init_state(model, optimizer, jax.random.key(0))
    whole, expected = jax.jit(train.make_step(loss, optimizer))(state, windows())
    out, metrics = jax.jit(train.make_step(loss, optimizer, accumulate=parts))(state, windows())
    moved = jax.tree.map(lambda a, b: a - b, whole.params, state.params)
    assert all(jnp.max(jnp.abs(leaf)) > 1e-5 for leaf in jax.tree.leaves(moved))
    for a, b in zip(jax.tree.leaves(out.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)


def test_keys_differ_from_step_to_step_and_from_part_to_part():
    def noise(params, batch, key):
        draw = jax.random.uniform(key, ())
        return params["w"] * draw, {"draw": draw}

    state = train.init_state(
        Model(lambda key: {"w": jnp.ones(())}, lambda p: p), optax.sgd(0.0), jax.random.key(3)
    )
    step = train.make_step(noise, optax.sgd(0.0))
    again, first = step(state, jnp.zeros(4))
    _, second = step(again, jnp.zeros(4))
    _, repeated = step(state, jnp.zeros(4))
    assert first["draw"] == repeated["draw"] != second["draw"]
    _, mean = train.make_step(noise, optax.sgd(0.0), accumulate=4)(state, jnp.zeros(4))
    key = jax.random.fold_in(state.key, 0)
    draws = [float(jax.random.uniform(jax.random.fold_in(key, i), ())) for i in range(4)]
    assert len(set(draws)) == 4
    np.testing.assert_allclose(mean["draw"], np.mean(draws), rtol=1e-6)


def test_projection_holds_after_every_step(model):
    optimizer = optax.sgd(50.0)
    project = cells.clip_recurrent(0.3)
    step = jax.jit(train.make_step(train.next_token_loss(model), optimizer, project=project))
    state, _ = step(train.init_state(model, optimizer, jax.random.key(0)), windows())
    recurrent = jax.tree.leaves(state.params["blocks"][0]["mixer"]["recurrent"])
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in recurrent)
    np.testing.assert_allclose(largest, 0.3, rtol=1e-6)


def test_what_is_not_trainable_stays_and_costs_no_moments():
    """An integer leaf too, of which no gradient exists; the rest moves as without the mask."""
    weights = {"kernel": jnp.arange(3.0), "moving": jnp.ones(3), "codes": jnp.arange(3)}
    model = Model(lambda key: weights, lambda params, x: x)

    def loss(params, batch, key):
        whole = params["kernel"] * params["moving"] * params["codes"] * batch[:, None]
        return jnp.mean(whole**2), {"loss": jnp.mean(whole**2)}

    def trainable(params):
        return {"kernel": False, "moving": True, "codes": False}

    optimizer = optax.adam(0.1)
    state = train.init_state(model, optimizer, jax.random.key(0), trainable=trainable)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) == 2 * 3 + 1
    step = jax.jit(train.make_step(loss, optimizer, trainable=trainable, accumulate=2))
    after, metrics = step(state, jnp.ones(4))
    for name in ("kernel", "codes"):
        np.testing.assert_array_equal(after.params[name], weights[name])
    # d/dm mean over 12 of (k m c)^2 = 2 k^2 m c^2 4 / 12, with k = c = 0, 1, 2
    gradient = np.array([0.0, 2.0, 32.0]) / 3
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-6)
    # Adam's first step is the sign.
    np.testing.assert_allclose(after.params["moving"], [1.0, 0.9, 0.9], rtol=1e-6)


def test_only_matrices_decay(model):
    params = jax.eval_shape(model.init, jax.random.key(0))
    decays = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, value in jax.tree_util.tree_leaves_with_path(train.decay_mask(params))
        if value
    }
    assert decays == {
        "blocks/0/gate/kernel",
        "blocks/0/mixer/kernel",
        "blocks/0/mlp/down/kernel",
        "blocks/0/mlp/up/kernel",
        "blocks/0/out/kernel",
        "head/kernel",
    }
    grid = jp.chain(jp.lsq(), jp.lsq()).attach(jax.random.key(0), {"kernel": jnp.ones((2, 2))})
    assert train.decay_mask(grid)["kernel"].base.base is True
    assert not any(jax.tree.leaves(train.decay_mask(grid)["kernel"].parts))


def test_schedule_rises_falls_and_ends_at_the_floor():
    rate = train.schedule(2.0, 100, warmup=0.05, floor=0.03)
    np.testing.assert_allclose([rate(0), rate(5), rate(100)], [0.0, 2.0, 0.06], rtol=1e-6)
    values = np.asarray([rate(i) for i in range(5, 101)])
    assert np.all(np.diff(values) < 0)
    np.testing.assert_allclose(rate(5 + 95 / 2), (2.0 + 0.06) / 2, rtol=1e-5)


@pytest.mark.untyped
@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: train.make_step(lambda *_: None, optax.sgd(1.0), accumulate=0),
            "accumulate=0: give a whole number, at least 1",
        ),
        (
            lambda: train.make_step(
                train.next_token_loss(table_model()), optax.sgd(1.0), accumulate=3
            )(train.init_state(table_model(), optax.sgd(1.0), jax.random.key(0)), windows()),
            "accumulate=3 does not divide the batch of 8: use a batch of 6",
        ),
        (lambda: train.optimizer(steps=0), "steps=0: give a whole number, at least 1"),
        (lambda: train.optimizer(steps=10, warmup=5), "warmup=5 is a fraction"),
        (lambda: train.optimizer(steps=10, clip=0.0), "clip=0.0 must be positive"),
        (
            lambda: train.next_token_loss(table_model())({}, windows()[0], None),
            r"windows have shape \(7,\); give \[batch, time \+ 1\]",
        ),
    ],
)
def test_bad_input_says_what_was_given_and_what_to_change(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train.next_token_loss(len), "got a model of type len .*; expected a jp.Model"),
        (lambda: train.evaluate({}), "evaluate.model. got a model of type dict"),
        (
            lambda: train.make_step(Model(len, len), optax.sgd(1.0)),
            "a loss of type Model.*next_token_loss",
        ),
        (lambda: train.make_step(optax.sgd(1.0), len), "a loss of type GradientTransformation"),
        (lambda: train.make_step(len, len), "an optimizer of type len .*optax.adamw"),
        (
            lambda: train.init_state(jax.random.key(0), Model(len, len), optax.sgd(1.0)),
            "init_state.*model of",
        ),
        (
            lambda: train.init_state(Model(len, len), jax.random.key(0), optax.sgd(1.0)),
            "optimizer of type",
        ),
        (lambda: jp.testing.check_model(len, None), "check_model.*expected a jp.Model"),
    ],
)
def test_arguments_in_the_wrong_place_are_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()
