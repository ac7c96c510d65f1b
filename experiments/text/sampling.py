"""Samples text from a sequence model: how tokens are drawn, with which keys, where the text ends.

A continuation is a function of the parameters, the seed, the prompt and the number of the sample.
It does not depend on the other prompts of its batch, up to the rounding of the logits.

`experiments` is not installed. Import it in the root of the checkout, or with it on `PYTHONPATH`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from experiments.data.tokens import BYTES, Tokenizer
from experiments.text.decoding import Choose, Decoder, decoder
from experiments.text.transcript import Transcript
from jaxpara.types import Key, Model, Params


class Rule(NamedTuple):
    """How a continuation is drawn.

    Attributes:
      length: the most tokens to draw.
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_k: how many of the likeliest candidates are kept; None keeps all.
      top_p: of those, the fewest with this share of their probability are kept; None keeps all.
      stop: strings that end the continuation and are not part of it.
    """

    length: int
    temperature: float
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()


def check_rule(rule: Rule) -> None:
    """Refuses a rule by which nothing can be drawn.

    Args:
      rule: the rule.

    Raises:
      ValueError: says what to give instead.
    """
    if rule.length < 1:
        raise ValueError(f"length={rule.length} tokens to draw: give at least 1")
    if not 0 <= rule.temperature < float("inf"):
        raise ValueError(
            f"temperature={rule.temperature} is negative or not finite: "
            "give 0 (the likeliest token) or more"
        )
    if rule.top_k is not None and rule.top_k < 1:
        raise ValueError(f"top_k={rule.top_k}: give at least 1, or null to keep all tokens")
    if rule.top_p is not None and not 0 < rule.top_p <= 1:
        raise ValueError(
            f"top_p={rule.top_p} is a share of the probability: give a number above 0 and at "
            "most 1, or null to keep all tokens"
        )
    if isinstance(rule.stop, str) or not all(isinstance(s, str) and s for s in rule.stop):
        raise ValueError(f"stop={rule.stop!r}: give a list of strings, none of them empty")


def check_generation(prompt: bytes, **rule: Any) -> None:
    """Refuses a prompt or a rule that cannot be used.

    Args:
      prompt: must hold at least one byte.
      **rule: of a `Rule`.

    Raises:
      ValueError: says what to give instead.
    """
    if not prompt:
        raise ValueError(
            "the prompt is empty, and the model needs one token to start from: "
            "give prompt='def ' or, for a new line, prompt=$'\\n'"
        )
    check_rule(Rule(**rule))


def encode(prompt: str) -> bytes:
    """Converts a prompt from the command line to the typed bytes, UTF-8 or not.

    Args:
      prompt: as Python decoded it.

    Returns:
      The bytes.
    """
    return prompt.encode(errors="surrogateescape")


def kept(
    logits: Float[Array, "batch tokens"], *, top_k: int | None, top_p: float | None
) -> Float[Array, "batch tokens"]:
    """Sets all logits but the candidates' to -inf: first all but `top_k`, then all but the nucleus.

    Args:
      logits: unnormalised log-probabilities.
      top_k: see `Rule`.
      top_p: see `Rule`; at least one candidate remains.

    Returns:
      The logits; equal ones are treated alike.

    References: [nucleus].
    """
    if top_k is None and top_p in (None, 1):
        return logits
    count = logits.shape[-1]
    best = lax.top_k(logits, min(top_k or count, count))[0]
    if top_p is not None and top_p < 1:
        probability = jax.nn.softmax(best)
        before = jnp.cumsum(probability, -1) - probability
        best = jnp.where(before < top_p, best, jnp.inf)
    return jnp.where(logits < best.min(-1, keepdims=True), -jnp.inf, logits)


def drawing(rule: Rule, *, vocab_size: int | None = None) -> Choose:
    """Makes a function that draws from `softmax(logits / temperature)` over the candidates.

    Args:
      rule: its `length` and `stop` are not used here.
      vocab_size: tokens from this number on are never drawn; None: all may be.

    Returns:
      `(keys[batch], logits[batch, tokens]) -> tokens[batch]`; a row depends on its own key only.
    """

    def draw(keys: Key, logits: Float[Array, "batch tokens"]) -> Int[Array, " batch"]:
        logits = logits[:, :vocab_size]
        if rule.temperature == 0:
            return jnp.argmax(logits, -1)
        # Relative to the likeliest, so that no temperature makes all of them overflow.
        logits = (logits - logits.max(-1, keepdims=True)) / rule.temperature
        logits = kept(logits, top_k=rule.top_k, top_p=rule.top_p)
        return jax.vmap(jax.random.categorical)(keys, logits)

    return draw


def row_key(seed: int, prompt: Sequence[int], sample: int) -> Key:
    """Makes the key of one continuation; that of its i-th token is `fold_in(key, i)`.

    Args:
      seed: of the call.
      prompt: its tokens; other prompts draw other numbers, in any order.
      sample: number of the continuation among those of its prompt.

    Returns:
      The key.
    """
    text = np.asarray(prompt, "<i4").tobytes()
    name = int.from_bytes(hashlib.blake2s(text, digest_size=4).digest())
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), name), sample)


class Request(NamedTuple):
    """A prompt to continue.

    Attributes:
      prompt: text as bytes.
      sample: its number among the continuations of one prompt.
    """

    prompt: bytes
    sample: int = 0


class Continuation(NamedTuple):
    """The continuation of a prompt.

    Attributes:
      text: without the prompt and the stop string.
      stopped: the stop string that ended it; None if `length` did.
    """

    text: str
    stopped: str | None


class Sampler(NamedTuple):
    """A model that continues text.

    Attributes:
      decode: the loop, with the times that it took.
      tokenizer: turns text into tokens and back.
      rule: how it draws.
    """

    decode: Decoder
    tokenizer: Tokenizer
    rule: Rule


def sampler(model: Model, rule: Rule, *, tokenizer: Tokenizer = BYTES, block: int = 32) -> Sampler:
    """Makes a sampler.

    Args:
      model: a sequence model over the tokenizer's tokens.
      rule: how to draw.
      tokenizer: of the text that the model was trained on.
      block: tokens drawn before the text is checked.

    Returns:
      The sampler. It compiles once for each shape it meets, so keep it.

    Raises:
      ValueError: see `check_rule`.
    """
    check_rule(rule)
    if block < 1:
        raise ValueError(f"block={block} tokens at a time: give at least 1")
    # A model may have more rows than the tokenizer has tokens, for speed.
    choose = drawing(rule, vocab_size=tokenizer.vocab_size)
    return Sampler(decoder(model, choose, block=block), tokenizer, rule)


def follow(
    sampler: Sampler, params: Params, requests: Sequence[Request], *, seed: int, rows: int = 0
) -> tuple[list[Transcript], Iterator[list[str]]]:
    """Continues some prompts together.

    Args:
      sampler: from `sampler`.
      params: of its model.
      requests: at least one; all are drawn together.
      seed: the same seed gives the same text.
      rows: the batch is padded to this number, to reuse a compiled shape.

    Returns:
      The transcripts, which fill while the iterator is consumed; and an iterator over the text of
      each request that became certain: first the prompts, then pieces of the continuations.

    Raises:
      ValueError: a prompt is empty; from the iterator, if the model's logits are not numbers.
    """
    decode, tokenizer, rule = sampler
    for request in requests:
        check_generation(request.prompt, **rule._asdict())
    prompts = [tokenizer.encode(request.prompt) for request in requests]
    transcripts = [Transcript(tokenizer, prompt, rule.stop) for prompt in prompts]
    filled = [*range(len(requests)), *[len(requests) - 1] * (rows - len(requests))]
    keys = jnp.stack([row_key(seed, prompts[i], requests[i].sample) for i in filled])

    def pieces() -> Iterator[list[str]]:
        yield [transcript.prompt for transcript in transcripts]
        position = decode.read(params, [prompts[i] for i in filled], rule.length)
        decode.watch.tokens["prefill"] += sum(map(len, prompts))
        for drawn in range(0, rule.length, decode.block):
            going = sum(transcript.stopped is None for transcript in transcripts)
            if not going:
                break
            count = min(decode.block, rule.length - drawn)
            position, tokens = decode.draw(params, position, keys, count)
            decode.watch.tokens["decode"] += count * going
            yield [t.add(row) for t, row in zip(transcripts, tokens, strict=False)]
        yield [transcript.end() for transcript in transcripts]

    return transcripts, pieces()


def complete(
    sampler: Sampler, params: Params, requests: Sequence[Request], *, seed: int, batch_size: int
) -> Iterator[Continuation]:
    """Continues any number of prompts, a batch at a time.

    Args:
      sampler: from `sampler`.
      params: of its model.
      requests: what to continue.
      seed: the same seed gives the same text.
      batch_size: requests at a time.

    Returns:
      An iterator over the continuations, in the order of the requests.

    Raises:
      ValueError: see `follow`; `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} prompts at a time: give at least 1")
    rows = min(batch_size, len(requests))
    for first in range(0, len(requests), rows or 1):
        batch = requests[first : first + rows]
        transcripts, pieces = follow(sampler, params, batch, seed=seed, rows=rows)
        for _ in pieces:
            pass
        for transcript in transcripts:
            yield Continuation(transcript.continuation, transcript.stopped)


def sample_text(
    model: Model,
    params: Params,
    *,
    prompt: str,
    seed: int,
    tokenizer: Tokenizer = BYTES,
    **rule: Any,
) -> str:
    """Continues one prompt; bytes that are not UTF-8 show as U+FFFD.

    Args:
      model: a sequence model over the tokenizer's tokens.
      params: its parameters.
      prompt: to continue.
      seed: the same seed gives the same text.
      tokenizer: of the text that the model was trained on.
      **rule: of a `Rule`.

    Returns:
      The text.
    """
    once = sampler(model, Rule(**rule), tokenizer=tokenizer)
    _, pieces = follow(once, params, [Request(encode(prompt))], seed=seed)
    return "".join(piece for [piece] in pieces)
