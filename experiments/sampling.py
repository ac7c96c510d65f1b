"""Text from a sequence model: one prefill, then one token at a time.

Decoding is `model.run` on one token, so it costs constant memory for recurrent
mixers and follows from the same function that was trained.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxpara.types import Key, Model, Params


def check_generation(prompt: bytes, *, length: int, temperature: float, top_k: int | None) -> None:
    """Refuses what cannot be generated.

    Args:
      prompt: must hold a byte.
      length: must be at least 1.
      temperature: must not be negative.
      top_k: must be at least 1, or None.

    Raises:
      ValueError: with what to give instead.
    """
    if not prompt:
        raise ValueError(
            "the prompt is empty, and the model needs one byte to start from: "
            "give prompt='def ' or, for a new line, prompt=$'\\n'"
        )
    if length < 1:
        raise ValueError(f"length={length} bytes to draw: give at least 1")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is negative: give 0 (likeliest) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: give at least 1, or null to keep all tokens")


def draw(
    key: Key,
    logits: Float[Array, "batch tokens"],
    *,
    temperature: float,
    top_k: int | None,
) -> Int[Array, " batch"]:
    """Draws one token from `softmax(logits / temperature)` over the `top_k` likeliest.

    Args:
      key: random key.
      logits: unnormalised log-probabilities.
      temperature: 0 takes the likeliest token.
      top_k: candidates kept; None keeps all.

    Returns:
      Token numbers.
    """
    logits = logits.astype(jnp.float32)
    if temperature == 0:
        return jnp.argmax(logits, -1)
    if top_k is not None:
        least = lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature, -1)


def generate(
    model: Model,
    params: Params,
    prompt: bytes,
    *,
    length: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> Iterator[int]:
    """Continues a prompt, byte by byte, as an iterator.

    Args:
      model: a sequence model over bytes.
      params: its parameters.
      prompt: read in one call before the first byte is drawn.
      length: bytes to draw.
      temperature: see `draw`.
      top_k: see `draw`.
      seed: the same seed gives the same text.

    Returns:
      An iterator over the drawn bytes.

    Raises:
      ValueError: see `check_generation`.
    """
    check_generation(prompt, length=length, temperature=temperature, top_k=top_k)
    assert model.start is not None and model.run is not None, "generate needs a sequence model"
    run, key = model.run, jax.random.key(seed)

    @jax.jit
    def step(params: Params, state: Any, tokens: Array, key: Key) -> tuple[Any, Array]:
        state, logits = run(params, state, tokens)
        return state, draw(key, logits[:, -1], temperature=temperature, top_k=top_k)

    def stream(state: Any) -> Iterator[int]:
        tokens = jnp.asarray(np.frombuffer(prompt, np.uint8)[None], jnp.int32)
        for i in range(length):
            state, token = step(params, state, tokens, jax.random.fold_in(key, i))
            tokens = token[:, None].astype(jnp.int32)
            yield int(token[0])

    return stream(model.start(params, 1, len(prompt) + length))


def encode(prompt: str) -> bytes:
    """A prompt from the command line as the bytes that were typed, UTF-8 or not.

    Args:
      prompt: as Python decoded it.

    Returns:
      The bytes.
    """
    return prompt.encode(errors="surrogateescape")


def sample_text(
    model: Model,
    params: Params,
    *,
    prompt: str,
    length: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> str:
    """A prompt and its continuation as text; bytes that are no UTF-8 show as U+FFFD.

    Args:
      model: a sequence model over bytes.
      params: its parameters.
      prompt: where to begin.
      length: bytes to draw.
      temperature: see `draw`.
      top_k: see `draw`.
      seed: the same seed gives the same text.

    Returns:
      The text.
    """
    start = encode(prompt)
    drawn = generate(
        model,
        params,
        start,
        length=length,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )
    return (start + bytes(drawn)).decode(errors="replace")
