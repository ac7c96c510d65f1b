"""The laws of a sequence model for every mixer, and the layers against plain numpy."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpara import nn
from jaxpara.nn.attention import AttentionState
from jaxpara.recurrence import cells

VOCAB, WIDTH, BATCH, TIME, MAX_LENGTH = 11, 16, 2, 9, 12
HYBRID = (
    nn.mixers.recurrent(cells.para_gru),
    nn.mixers.recurrent(cells.lstm_heads, heads=2, hidden=8),
    nn.mixers.attention(heads=2),
)
# name -> decoder options; tied and remat are spread over the table. A loop over depth compiles
# faster than the default, a straight line, which para_gru keeps.
LOOP = {"unroll": 1}
MODELS = {
    "para_gru": {"mixer": nn.mixers.recurrent(cells.para_gru), "remat": jax.checkpoint},
    "para_lstm": {"mixer": nn.mixers.recurrent(cells.para_lstm), **LOOP},
    "slstm": {"mixer": nn.mixers.recurrent(cells.slstm), "tied": True, **LOOP},
    "min_gru": {"mixer": nn.mixers.recurrent(cells.min_gru), **LOOP},
    "attention": {
        "mixer": nn.mixers.attention(heads=2),
        "remat": jax.checkpoint,
        **LOOP,
    },
    "hybrid": {"mixer": HYBRID, "tied": True, **LOOP},
}
EVERYDAY = ("para_gru", "attention")  # what `make check` runs
NAMES = [pytest.param(name, marks=() if name in EVERYDAY else pytest.mark.slow) for name in MODELS]


@cache
def make(name, **options):
    options = {**MODELS[name], **options}
    model = nn.decoder(VOCAB, WIDTH, layers(name), mlp_hidden=24, **options)
    return model, jax.jit(model.init)(jax.random.key(0))


def layers(name):
    return 3 if name == "hybrid" else 2


def tokens(seed=1, time=TIME):
    return jax.random.randint(jax.random.key(seed), (BATCH, time), 0, VOCAB)


def in_pieces(run, state, x, lengths, reset=None):
    logits, at = [], 0
    for n in lengths:
        args = () if reset is None else (reset[:, at : at + n],)
        state, part = run(state, x[:, at : at + n], *args)
        logits.append(part)
        at += n
    assert at == x.shape[1]
    return state, jnp.concatenate(logits, axis=1)


def begin(model, params):
    return jax.jit(lambda p: model.start(p, BATCH, MAX_LENGTH))(params)


def assert_close(a, b, scale=1.0):
    """Equal but for the order of float32 sums: matmuls of other shapes, a longer cache.

    A sum of n terms in another order moves by about sqrt(n) ulp; through a few layers of
    width 16 this is some 1e-6 of the largest entry.
    """
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_allclose(a, b, rtol=0, atol=scale * 1e-5 * max(np.abs(b).max(), 1e-3))


@pytest.mark.parametrize("name", NAMES)
def test_apply_equals_run_whole_in_uneven_pieces_and_token_by_token(name):
    model, params = make(name)
    x = tokens()
    expected = jax.jit(model.apply)(params, x)
    assert expected.shape == (BATCH, TIME, VOCAB)
    assert expected.dtype == jnp.float32
    assert np.std(np.asarray(expected)) > 0.1
    run = jax.jit(partial(model.run, params))
    start = begin(model, params)
    whole, logits = run(start, x)
    assert_close(logits, expected)
    for lengths in ((4, 1, 4), (1,) * TIME):
        state, logits = in_pieces(run, start, x, lengths)
        assert_close(logits, expected)
        assert jax.tree.structure(state) == jax.tree.structure(start)
        for leaf, same, first in zip(*map(jax.tree.leaves, (state, whole, start)), strict=True):
            assert leaf.dtype == first.dtype and leaf.shape == first.shape
            assert_close(leaf, same)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_apply_equals_gradient_of_run_in_pieces(name):
    model, params = make(name)
    x = tokens()
    weights = np.cos(np.arange(BATCH * TIME * VOCAB, dtype=np.float32))
    weights = jnp.asarray(weights.reshape(BATCH, TIME, VOCAB))

    run = jax.jit(model.run)

    def whole(params):
        return jnp.sum(weights * model.apply(params, x))

    def pieces(params):  # equal ones, and not jitted as a whole: they share a compilation
        return jnp.sum(weights * in_pieces(partial(run, params), start, x, (3, 3, 3))[1])

    # The start is zeros for any parameters.
    start = begin(model, params)

    a, b = jax.jit(jax.grad(whole))(params), jax.grad(pieces)(params)
    jax.tree.map(assert_close, a, b)
    assert all(np.any(leaf) for leaf in map(np.asarray, jax.tree.leaves(a)))


@pytest.mark.parametrize("name", NAMES)
def test_output_has_exactly_zero_gradient_with_respect_to_later_inputs(name):
    # One token for each position, so that the gradient of a row of the embedding is that of
    # an input; untied, because a tied head reads every row.
    model = nn.decoder(TIME, WIDTH, layers(name), mlp_hidden=24, **{**MODELS[name], "tied": False})
    params = jax.jit(model.init)(jax.random.key(0))
    at = 4

    @jax.jit
    @jax.grad
    def gradient(table):
        logits = model.apply({**params, "embedding": {"table": table}}, jnp.arange(TIME)[None])
        return jnp.sum(jnp.sin(logits[0, at]))

    rows = np.asarray(gradient(params["embedding"]["table"]))
    assert np.all(rows[at + 1 :] == 0)
    assert np.all(np.any(rows[: at + 1] != 0, axis=1))


@pytest.mark.parametrize("name", ["para_lstm", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_reset_hides_the_documents_before_in_values_and_gradients(name):
    model, params = make(name)
    x = tokens()
    reset = np.zeros((BATCH, TIME), bool)
    reset[:, 5] = True
    reset[0, 2] = True
    reset = jnp.asarray(reset)
    apply = jax.jit(model.apply)
    logits = apply(params, x, reset)
    run = jax.jit(partial(model.run, params))
    start = begin(model, params)
    assert_close(in_pieces(run, start, x, (4, 1, 4), reset)[1], logits)
    assert_close(logits[1, :5], apply(params, x[:, :5])[1])  # the oracle: each document alone
    assert_close(logits[:, 5:], apply(params, x[:, 5:]))
    assert_close(logits[0, 2:5], apply(params, x[:, 2:5])[0])
    other = x.at[:, :5].set((x[:, :5] + 1) % VOCAB)
    np.testing.assert_array_equal(apply(params, other, reset)[:, 5:], logits[:, 5:])

    def loss(params, x, reset):
        return jnp.sum(jnp.sin(model.apply(params, x, reset)[:, -4:]))

    a = jax.jit(jax.grad(loss))(params, x, reset)
    jax.tree.map(
        assert_close, a, jax.jit(jax.grad(loss))(params, x[:, 5:], jnp.zeros((BATCH, 4), bool))
    )


@pytest.mark.parametrize("name", ["slstm", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_bfloat16_compute_keeps_recurrent_carries_and_logits_in_float32(name):
    model, params = make(name, compute_dtype=jnp.bfloat16)
    exact, _ = make(name)
    x = tokens()
    first = begin(model, params)
    state, logits = jax.jit(model.run)(params, first, x)
    assert logits.dtype == jnp.float32
    for layer, start in zip(state, first, strict=True):
        assert layer["conv"].dtype == jnp.bfloat16
        if isinstance(layer["mixer"], AttentionState):
            assert layer["mixer"].keys.dtype == jnp.bfloat16
        else:
            carries = jax.tree.leaves((layer["mixer"], start["mixer"]))
            assert {leaf.dtype for leaf in carries} == {jnp.dtype("float32")}
    # bfloat16 keeps 8 bits: some 2e-2 of the largest logit after three blocks
    reference = np.asarray(jax.jit(exact.apply)(params, x))
    assert np.max(np.abs(logits - reference)) < 0.05 * np.max(np.abs(reference))
    gradient = jax.eval_shape(jax.grad(lambda p: jnp.sum(model.apply(p, x) ** 2)), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("cell", ["elman", "linear", "gru_heads", "elman_heads"])
def test_every_other_cell_is_a_mixer_too(cell):
    options = {"heads": 2} if cell.endswith("heads") else {}
    mixer = nn.mixers.recurrent(getattr(cells, cell), **options)
    model = nn.decoder(VOCAB, WIDTH, 1, mixer=mixer)
    params = jax.jit(model.init)(jax.random.key(0))
    run = jax.jit(partial(model.run, params))
    _, logits = in_pieces(run, begin(model, params), tokens(), (4, 1, 4))
    assert_close(logits, jax.jit(model.apply)(params, tokens()))


@pytest.mark.slow
def test_the_scan_over_blocks_equals_a_python_loop_over_them():
    model, params = make("para_gru")
    stack = [jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"][0]) for i in range(2)]
    one = nn.block(WIDTH, nn.mixers.recurrent(cells.para_gru), mlp_hidden=24, depth=2)
    x = params["embedding"]["table"][tokens()]
    for layer in stack:
        state = one.start(layer, BATCH, TIME, jnp.float32)
        _, x = jax.jit(one.run)(layer, state, x, None)
    x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * params["norm"]["scale"]
    assert_close(x @ params["head"]["kernel"], jax.jit(model.apply)(params, tokens()))


def test_a_second_call_compiles_nothing():
    model, params = make("hybrid")
    traces = []

    @jax.jit
    def run(params, state, x):
        traces.append(x.shape)
        return model.run(params, state, x)

    state = begin(model, params)
    for seed in range(3):
        state, _ = run(params, state, tokens(seed, time=2))
    assert traces == [(BATCH, 2)]


def test_default_model_has_seven_hundred_thousand_parameters():
    def count(mixer, **options):
        model = nn.decoder(256, 128, 3, mixer=mixer, **options)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    total = count(nn.mixers.recurrent(cells.para_gru))
    per_layer = (128 * 3 * 128 + 6 * 128) + 2 * 128**2 + 4 * 128 + 3 * 128 * 336 + 2 * 128
    assert total == 3 * per_layer + 2 * 256 * 128 + 128 == 703_104
    assert count(nn.mixers.recurrent(cells.para_gru), tied=True) == total - 256 * 128


@pytest.mark.slow
def test_initial_loss_is_that_of_a_guess_and_the_stream_does_not_explode():
    model = nn.decoder(64, 32, 6, mixer=nn.mixers.recurrent(cells.para_gru), **LOOP)
    params = jax.jit(model.init)(jax.random.key(0))
    x = jax.random.randint(jax.random.key(1), (2, 32), 0, 64)
    logits = jax.jit(model.apply)(params, x)
    nats = -jnp.mean(jax.nn.log_softmax(logits)[..., 0])
    assert abs(nats - np.log(64)) < 1.0
    assert 0.5 < jnp.std(logits) < 2.0


# ------------------------------------------------------------------ layers


def test_short_conv_is_the_causal_sum_over_taps():
    conv = nn.short_conv(3, taps=4)
    params = conv.init(jax.random.key(0))
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, 7, 3)))
    expected = np.zeros_like(x)
    for t in range(7):
        for k in range(min(4, t + 1)):
            expected[:, t] += np.asarray(params["taps"])[k] * x[:, t - k]
    start = state = conv.start(params, 2, 7, jnp.float32)
    whole = conv.run(params, start, jnp.asarray(x), None)[1]
    np.testing.assert_allclose(whole, expected, rtol=1e-6, atol=1e-6)
    parts = []
    for piece in (x[:, :1], x[:, 1:3], x[:, 3:]):  # shorter than the state, and longer
        state, y = conv.run(params, state, jnp.asarray(piece), None)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(state, x[:, -3:])


def test_swiglu_and_rms_norm_follow_their_equations():
    x = np.asarray(jax.random.normal(jax.random.key(0), (5, 8)), np.float64)
    mlp = nn.swiglu(8, 6)
    params = mlp.init(jax.random.key(1))
    up, down = (np.asarray(params[n]["kernel"], np.float64) for n in ("up", "down"))
    gate, value = x @ up[:, :6], x @ up[:, 6:]
    expected = (gate / (1 + np.exp(-gate)) * value) @ down
    np.testing.assert_allclose(mlp.apply(params, jnp.float32(x)), expected, rtol=1e-5, atol=1e-6)
    norm = nn.rms_norm(8)
    y = norm.apply({"scale": jnp.full(8, 2.0)}, jnp.float32(x))
    expected = 2 * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    assert jnp.all(norm.apply(norm.init(jax.random.key(0)), jnp.zeros((1, 8))) == 0)


def test_more_tokens_than_max_length_give_nan_and_not_a_wrong_answer():
    model, params = make("attention")
    run = jax.jit(partial(model.run, params))
    state, fits = run(model.start(params, BATCH, 6), tokens(time=4))
    _, beyond = run(state, tokens(time=4))
    assert jnp.isfinite(fits).all() and jnp.isnan(beyond).all()


def test_a_token_outside_the_vocabulary_gives_nan():
    model, params = make("min_gru")
    for bad in (VOCAB, -1):
        logits = jax.jit(model.apply)(params, tokens().at[0, 3].set(bad))
        assert jnp.isfinite(logits[0, :3]).all() and jnp.isfinite(logits[1]).all()
        assert jnp.isnan(logits[0, 3:]).all()


def call_with_other_vocabulary():
    params = make("min_gru")[1]
    mixer = nn.mixers.recurrent(cells.min_gru)
    nn.decoder(VOCAB + 1, WIDTH, 2, mixer=mixer).apply(params, tokens())


def overlong_call():
    model, params = make("attention")
    model.run(params, model.start(params, BATCH, 4), tokens())


@pytest.mark.untyped
@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: nn.decoder(VOCAB, 20, 1, mixer=nn.mixers.attention(heads=4)),
            "width=20 does not split into heads=4 .* multiple of 8",
        ),
        (overlong_call, "9 tokens does not fit a state of max_length=4: call start with a larger"),
        (call_with_other_vocabulary, "embed 11 tokens, .* vocab_size=12"),
        (
            lambda: nn.decoder(VOCAB, WIDTH, 4, mixer=HYBRID),
            "layers=4 is not a multiple of the 3 mixers",
        ),
        (
            lambda: nn.decoder(0, WIDTH, 4, mixer=HYBRID),
            "vocab_size=0: give a whole number, at least 1",
        ),
        (
            lambda: make("min_gru")[0].apply(make("min_gru")[1], tokens().astype(float)),
            "tokens have dtype float32; give integers below 11",
        ),
        (
            lambda: make("min_gru")[0].apply(make("min_gru")[1], tokens()[0]),
            r"tokens have shape \(9,\); give \[batch, time\]",
        ),
        (lambda: nn.short_conv(4, taps=0), "taps=0: give a whole number, at least 1"),
    ],
)
def test_bad_input_says_what_was_given_and_what_to_change(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.untyped
@pytest.mark.parametrize(
    "mixer",
    [
        "recurrent",
        ["attention"],
        cells.para_gru,
        nn.mixers.recurrent,
        nn.mixers.attention,
        nn.mixers.attention(heads=1)(8),
        lambda width: width,
        None,
        {},
    ],
)
def test_what_is_no_mixer_is_refused(mixer):
    with pytest.raises(TypeError, match="expected (a function width -> Mixer|recurrent)"):
        nn.decoder(8, 8, 1, mixer=mixer)


@pytest.mark.untyped
def test_a_cell_in_place_of_its_factory_is_refused():
    with pytest.raises(
        TypeError, match="recurrent.cell. got Cell; .*as recurrent.jp.cells.para_gru"
    ):
        nn.mixers.recurrent(cells.para_gru(8, 8))  # type: ignore
