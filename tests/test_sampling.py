"""Sampling: what is drawn, that decoding equals re-running the prefix, batches, stops, prompts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import decoding, sampling
from experiments.data.tokens import BYTES, Tokenizer
from experiments.sampling import Request, Rule, complete, drawing, row_key, sample_text
from jaxpara.nn import decoder, mixers

WIDTH, LENGTH = 16, 12
PROMPTS = [b"def f(x):", b"a", b"import os\n\n", b"class A(B):\n    x"]
NAMES = ("para_gru", "para_lstm", "slstm", "min_gru", "attention")
HYBRID = [mixers.named("para_gru"), mixers.named("attention", heads=2)]
MIXERS = {**{name: mixers.named(name) for name in NAMES}, "hybrid": HYBRID}
# Printable characters only, fewer than the model has tokens: every drawn one can be seen.
ASCII = Tokenizer(
    vocab_size=95,
    encode=lambda text: np.frombuffer(text, np.uint8).astype(np.int32) - 32,
    decode=lambda ids: bytes(i + 32 for i in ids),
    separator=(0,),
)
PLAIN = [prompt.replace(b"\n", b" ") for prompt in PROMPTS]
LIKELIEST, DRAWN = Rule(LENGTH, 0.0), Rule(LENGTH, 1.3, top_k=50, top_p=0.95)


def make(mixer):
    model = decoder(256, WIDTH, len(mixer) if isinstance(mixer, list) else 1, mixer=mixer)
    params = jax.jit(model.init)(jax.random.key(0))
    # Sharper than at the start of training: what came before then matters.
    return model, jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 2 else leaf, params)


@pytest.fixture(scope="module")
def tiny():
    return make(mixers.named("min_gru"))


@functools.cache
def jitted(rule, vocab_size=None):
    return jax.jit(drawing(rule, vocab_size=vocab_size))


def rerun(model, params, prompts, rule, *, vocab_size=None):
    """The oracle: all tokens so far are read anew for every token; no padding on the left, no
    state, no resets. The model is causal: what stands behind the last token plays no part.
    """
    keys = jnp.stack([row_key(0, prompt, 0) for prompt in prompts])
    tokens = np.zeros((len(prompts), max(map(len, prompts)) + rule.length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = np.asarray(prompt)
    ends, rows = np.array([len(prompt) for prompt in prompts]), np.arange(len(prompts))
    apply = jax.jit(model.apply)
    for i in range(rule.length):
        logits = apply(params, jnp.asarray(tokens))[rows, ends + i - 1]
        keys_i = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        tokens[rows, ends + i] = jitted(rule, vocab_size)(keys_i, logits)
    return [tokens[row, end : end + rule.length].tolist() for row, end in enumerate(ends)]


@pytest.fixture(scope="module", params=MIXERS, ids=str)
def mixed(request):
    """A model, and what re-running the prefix makes of every prompt, likeliest and drawn."""
    model, params = make(MIXERS[request.param])
    return (
        model,
        params,
        {
            rule: [
                bytes(drawn)
                for drawn in rerun(model, params, list(map(BYTES.encode, PROMPTS)), rule)
            ]
            for rule in (LIKELIEST, DRAWN)
        },
    )


@pytest.mark.parametrize("rule", [LIKELIEST, DRAWN], ids=["likeliest", "drawn"])
def test_decoding_in_blocks_and_batches_equals_rerunning_the_prefix(mixed, rule):
    model, params, expected = mixed
    sampler = sampling.sampler(model, rule, block=5)
    requests = [Request(prompt) for prompt in PROMPTS]
    together = complete(sampler, params, requests, seed=0, batch_size=len(PROMPTS))
    assert [c.text for c in together] == [
        drawn.decode(errors="replace") for drawn in expected[rule]
    ]
    assert len(set(expected[rule])) == len(PROMPTS), "the test must see differences"


@pytest.fixture(scope="module")
def drawn(tiny):
    """What a small model makes of the prompts by re-running the prefix."""
    return [
        ASCII.decode(tokens).decode()
        for tokens in rerun(*tiny, list(map(ASCII.encode, PLAIN)), DRAWN, vocab_size=95)
    ]


@pytest.mark.parametrize("block, batch_size", [(1, 1), (LENGTH + 1, 3)])
def test_a_prompt_gives_the_same_text_in_any_batch_and_block(tiny, drawn, block, batch_size):
    model, params = tiny
    requests = [Request(prompt) for prompt in PLAIN]
    sampler = sampling.sampler(model, DRAWN, tokenizer=ASCII, block=block)
    done = complete(sampler, params, requests, seed=0, batch_size=batch_size)
    assert [c.text for c in done] == drawn
    # Three at a time leave one over: its batch is filled up, and the filling is not counted.
    read, made = sum(map(len, PLAIN)), LENGTH * len(PLAIN)
    assert sampler.decode.watch.tokens == {"prefill": read, "decode": made}


def test_a_stop_string_ends_each_prompt_where_rerunning_the_prefix_meets_it(tiny, drawn):
    model, params = tiny
    stop = (drawn[0][3:5], drawn[1][6])
    expected = []
    for text in drawn:
        ends = [(text.index(s) + len(s), text.index(s), s) for s in stop if s in text]
        expected.append((text[: min(ends)[1]], min(ends)[2]) if ends else (text, None))
    assert sum(stopped is not None for _, stopped in expected) >= 2
    for block in (1, 5):
        sampler = sampling.sampler(model, DRAWN._replace(stop=stop), tokenizer=ASCII, block=block)
        requests = [Request(prompt) for prompt in PLAIN]
        done = list(complete(sampler, params, requests, seed=0, batch_size=len(PLAIN)))
        assert done == expected


def test_no_more_is_drawn_once_every_prompt_has_met_its_stop_string(tiny, drawn):
    rule = DRAWN._replace(length=10_000, stop=(drawn[0][4],))
    sampler = sampling.sampler(*tiny[:1], rule, tokenizer=ASCII, block=8)
    [done] = complete(sampler, tiny[1], [Request(PLAIN[0])], seed=0, batch_size=1)
    assert done.stopped == drawn[0][4] and sampler.decode.watch.tokens["decode"] == 8


def test_a_long_prompt_is_read_in_pieces(tiny, monkeypatch):
    model, params = tiny
    prompt = bytes(range(97, 97 + 23))
    [expected] = rerun(model, params, [ASCII.encode(prompt)], LIKELIEST, vocab_size=95)
    for piece in (4, 23):
        monkeypatch.setattr(decoding, "PIECE", piece)
        text = sample_text(
            model, params, prompt=prompt.decode(), seed=0, tokenizer=ASCII, **LIKELIEST._asdict()
        )
        assert text == prompt.decode() + ASCII.decode(expected).decode()


def test_the_draw_loop_is_compiled_once_for_all_batches_and_blocks(tiny):
    model, params = tiny
    traced = []
    counted = model._replace(
        run=lambda *inputs: traced.append(inputs[2].shape) or model.run(*inputs)
    )
    sampler = sampling.sampler(
        counted, LIKELIEST, tokenizer=ASCII, block=5
    )  # 12 tokens: the last block is shorter
    for seed in (0, 1):
        requests = [Request(b"abc"), Request(b"a"), Request(b"xyz")]
        list(complete(sampler, params, requests, seed=seed, batch_size=2))
    assert [shape for shape in traced if shape[1] == 1] == [(2, 1)]


def test_text_is_a_function_of_the_seed_the_prompt_and_the_number_of_the_sample(tiny):
    model, params = tiny
    sampler = sampling.sampler(model, DRAWN, tokenizer=ASCII)

    def texts(seed, requests):
        return [c.text for c in complete(sampler, params, requests, seed=seed, batch_size=2)]

    first, second = texts(0, [Request(b"ab", 0), Request(b"ab", 1)])
    assert first != second
    assert texts(0, [Request(b"cd", 0), Request(b"ab", 1)])[1] == second
    assert texts(1, [Request(b"ab", 0), Request(b"ab", 1)])[0] != first


def test_other_prompts_draw_other_numbers():
    keys = [row_key(0, prompt, sample) for prompt in ([1], [2], [1, 2]) for sample in (0, 1)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    "rule, kept",
    [
        (dict(temperature=0.5, top_k=3), [0, 1, 1, 1]),
        (dict(temperature=0.5), [1, 1, 1, 1]),
        # 0.4 alone is less than 0.45, so one more is needed.
        (dict(temperature=1.0, top_p=0.45), [0, 0, 1, 1]),
        (dict(temperature=1.0, top_p=0.39), [0, 0, 0, 1]),
        (dict(temperature=1.0, top_p=1.0), [1, 1, 1, 1]),
        # Of the three likeliest, 0.4 / 0.9 is less than 0.5 and 0.7 / 0.9 is not.
        (dict(temperature=1.0, top_k=3, top_p=0.5), [0, 0, 1, 1]),
        # At temperature 0.5 the likeliest has 0.16 / 0.3 of the probability.
        (dict(temperature=0.5, top_p=0.5), [0, 0, 0, 1]),
        (dict(temperature=1e-30), [0, 0, 0, 1]),
        (dict(temperature=0.0), [0, 0, 0, 1]),
    ],
    ids=str,
)
def test_draws_follow_the_tempered_distribution_of_the_candidates(rule, kept):
    p = np.array([0.1, 0.2, 0.3, 0.4])
    keys = jax.random.split(jax.random.key(0), 20_000)
    logits = jnp.broadcast_to(jnp.log(p), (len(keys), 4))
    seen = np.bincount(jitted(Rule(1, **rule))(keys, logits), minlength=4) / len(keys)
    expected = kept * (p / p.max()) ** (1 / max(rule["temperature"], 1e-3))
    np.testing.assert_allclose(seen, expected / expected.sum(), atol=0.015)
    assert (seen[np.array(kept) == 0] == 0).all()


def test_what_is_outside_the_tokenizer_is_never_drawn():
    logits = jnp.broadcast_to(jnp.arange(10.0), (50, 10))
    keys = jax.random.split(jax.random.key(0), 50)
    for temperature in (0.0, 5.0):
        assert max(drawing(Rule(1, temperature), vocab_size=4)(keys, logits)) < 4
