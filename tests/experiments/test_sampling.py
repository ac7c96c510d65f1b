"""Sampling: what is drawn, that decoding equals re-running the prefix, batches, stops, prompts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data.tokens import Tokenizer
from experiments.text import decoding, sampling
from experiments.text.sampling import (
    Request,
    Rule,
    Sampler,
    complete,
    drawing,
    row_key,
    sample_text,
)
from jaxpara.nn import decoder, mixers
from jaxpara.recurrence import cells
from tests.experiments.saved_run import random_params

WIDTH, LENGTH = 16, 12
PLAIN = [b"def f(x):", b"a", b"import os  ", b"class A(B):     x"]
CELLS = ("para_gru", "para_lstm", "slstm", "min_gru")
HYBRID = [mixers.recurrent(cells.para_gru), mixers.attention(heads=2)]
MIXERS = {name: mixers.recurrent(getattr(cells, name)) for name in CELLS}
MIXERS |= {"attention": mixers.attention(), "hybrid": HYBRID}
# Printable characters only, fewer than the model has tokens: every drawn one can be seen.
ASCII = Tokenizer(
    vocab_size=95,
    encode=lambda text: np.frombuffer(text, np.uint8).astype(np.int32) - 32,
    decode=lambda ids: bytes(i + 32 for i in ids),
    separator=(0,),
)
LIKELIEST, DRAWN = Rule(LENGTH, 0.0), Rule(LENGTH, 1.3, top_k=50, top_p=0.95)


@functools.cache
def jitted(rule, vocab_size=None):
    return jax.jit(drawing(rule, vocab_size=vocab_size))


@jax.jit
def half_by_half(keys, logits):
    """Both rules in one program: the likeliest tokens in the first rows, drawn ones in the rest."""
    half = len(PLAIN)
    likeliest, drawn = (drawing(rule, vocab_size=95) for rule in (LIKELIEST, DRAWN))
    return jnp.concatenate(
        [likeliest(keys[:half], logits[:half]), drawn(keys[half:], logits[half:])]
    )


def make(mixer):
    layers = len(mixer) if isinstance(mixer, list) else 1
    model = decoder(256, WIDTH, layers, mixer=mixer)
    return model, random_params(model)


def rerun(model, params, texts, choose):
    """The oracle: all tokens so far are read anew for every token; no padding on the left, no
    state, no resets. The model is causal: what stands behind the last token plays no part.
    """
    prompts = list(map(ASCII.encode, texts))
    keys = jnp.stack([row_key(0, prompt, 0) for prompt in prompts])
    ends, rows = np.array(list(map(len, prompts))), np.arange(len(prompts))
    tokens = np.zeros((len(prompts), ends.max() + LENGTH), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    apply = jax.jit(model.apply)
    for i in range(LENGTH):
        logits = apply(params, jnp.asarray(tokens))[rows, ends + i - 1]
        tokens[rows, ends + i] = choose(jax.vmap(jax.random.fold_in, (0, None))(keys, i), logits)
    drawn = (tokens[row, end : end + LENGTH] for row, end in enumerate(ends))
    return [ASCII.decode(row.tolist()).decode() for row in drawn]


def stopped_at(texts, stop):
    """What is left of texts, and the stop string that is complete first."""
    ends = [[(t.index(s) + len(s), t.index(s), s) for s in stop if s in t] for t in texts]
    cut = [
        (t[: min(e)[1]], min(e)[2]) if e else (t, None) for t, e in zip(texts, ends, strict=True)
    ]
    assert sum(stopped is not None for _, stopped in cut) >= 2
    return cut


@pytest.fixture(scope="module", params=MIXERS, ids=str)
def mixed(request):
    """A sampler, its parameters, and what re-running the prefix makes of every prompt."""
    model, params = make(MIXERS[request.param])
    sampler = Sampler(decoding.decoder(model, half_by_half, block=5), ASCII, LIKELIEST)
    return sampler, params, rerun(model, params, 2 * PLAIN, half_by_half)


@pytest.mark.slow
def test_decoding_in_blocks_and_batches_equals_rerunning_the_prefix(mixed):
    sampler, params, expected = mixed
    requests = [Request(prompt) for prompt in 2 * PLAIN]
    together = complete(sampler, params, requests, seed=0, batch_size=len(requests))
    assert [c.text for c in together] == expected
    assert len(set(expected)) == len(expected), "the test must see differences"


def test_a_stop_string_ends_each_prompt_where_rerunning_the_prefix_meets_it(mixed):
    sampler, params, texts = mixed
    stop = (texts[0][3:5], texts[5][6])
    sampler = sampler._replace(rule=sampler.rule._replace(stop=stop))
    requests = [Request(prompt) for prompt in 2 * PLAIN]
    done = list(complete(sampler, params, requests, seed=0, batch_size=len(requests)))
    assert done == stopped_at(texts, stop)


@pytest.fixture(scope="module")
def tiny():
    return make(mixers.recurrent(cells.min_gru))


@pytest.fixture(scope="module")
def small(tiny):
    """A sampler that is compiled once for all tests that take it."""
    return sampling.sampler(tiny[0], DRAWN, tokenizer=ASCII, block=5)


@pytest.fixture(scope="module")
def drawn(tiny):
    """What a small model makes of the prompts by re-running the prefix."""
    return rerun(*tiny, PLAIN, jitted(DRAWN, 95))


@pytest.mark.parametrize("block, batch_size", [(5, 1), (1, 3)])
def test_a_prompt_gives_the_same_text_in_any_batch_and_block(tiny, small, drawn, block, batch_size):
    model, params = tiny
    sampler = small if block == 5 else sampling.sampler(model, DRAWN, tokenizer=ASCII, block=block)
    requests = [Request(prompt) for prompt in PLAIN]
    before = dict(sampler.decode.watch.tokens)
    done = complete(sampler, params, requests, seed=0, batch_size=batch_size)
    assert [c.text for c in done] == drawn
    # Three at a time leave one over: its batch is filled up, and the filling is not counted.
    counted = {name: count - before[name] for name, count in sampler.decode.watch.tokens.items()}
    assert counted == {"prefill": sum(map(len, PLAIN)), "decode": LENGTH * len(PLAIN)}


def test_no_more_is_drawn_once_every_prompt_has_met_its_stop_string(tiny, small, drawn):
    rule = DRAWN._replace(length=10_000, stop=(drawn[0][4],))
    before = small.decode.watch.tokens["decode"]
    request = [Request(PLAIN[0])]
    [done] = complete(small._replace(rule=rule), tiny[1], request, seed=0, batch_size=1)
    assert done.stopped == drawn[0][4]
    assert small.decode.watch.tokens["decode"] - before == 5 * (
        drawn[0].index(drawn[0][4]) // 5 + 1
    )


def test_a_long_prompt_is_read_in_pieces(tiny, small, monkeypatch):
    prompt = bytes(range(97, 97 + 23))
    expected = rerun(*tiny, [prompt], jitted(DRAWN, 95))
    monkeypatch.setattr(decoding, "PIECE", 4)
    [done] = complete(small, tiny[1], [Request(prompt)], seed=0, batch_size=1)
    assert [done.text] == expected


def test_the_draw_loop_is_compiled_once_for_all_batches_and_blocks(tiny):
    model, params = tiny
    traced = []

    def run(params, state, tokens, *reset):
        traced.append(tokens.shape)
        return model.run(params, state, tokens, *reset)

    # Of the 12 tokens the last block has fewer; of the three prompts the last batch.
    sampler = sampling.sampler(model._replace(run=run), LIKELIEST, tokenizer=ASCII, block=5)
    for seed in (0, 1):
        requests = [Request(b"abc"), Request(b"a"), Request(b"xyz")]
        list(complete(sampler, params, requests, seed=seed, batch_size=2))
    assert [shape for shape in traced if shape[1] == 1] == [(2, 1)]


def test_text_is_a_function_of_the_seed_the_prompt_and_the_number_of_the_sample(tiny, small):
    def texts(seed, *requests):
        done = complete(small, tiny[1], requests, seed=seed, batch_size=1)
        return [c.text for c in done]

    first, second = texts(0, Request(b"a", 0), Request(b"a", 1))
    assert first != second
    assert texts(0, Request(b"c", 0), Request(b"a", 1))[1] == second
    assert texts(1, Request(b"a", 0))[0] != first
    model, params = tiny
    text = sample_text(model, params, prompt="a", seed=0, tokenizer=ASCII, **DRAWN._asdict())
    assert text == "a" + first


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
