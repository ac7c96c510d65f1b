"""The decode loop: reads prompts in pieces, then draws tokens in jitted blocks.

Both are `model.run`, on many tokens and on one. The memory is the model's state: constant for
recurrent mixers, the keys and values of `prompt + length` tokens for attention. Prompts of unequal
length share a batch: they are padded on the left, and a reset at their first token drops the
padding.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxpara.types import Model, Params

PIECE = 512  # tokens of a prompt read in one call: bounds the memory of its logits
Choose = Callable[[Array, Array], Array]


class Watch:
    """Seconds spent on `compile`, `prefill` and `decode`, and the tokens of the last two."""

    def __init__(self):
        self.seconds = {"compile": 0.0, "prefill": 0.0, "decode": 0.0}
        self.tokens = {"prefill": 0, "decode": 0}

    def timed(self, name: str, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Wraps a function: compiled for each shape it meets, it waits for its result.

        Args:
          name: the key that its time is added to.
          function: to jit; called with arrays only.
          **options: of `jax.jit`.

        Returns:
          The function.
        """
        jitted = jax.jit(function, **options)
        programs: dict[Any, Callable[..., Any]] = {}

        def call(*arguments):
            shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments))
            began = time.perf_counter()
            if shapes not in programs:
                programs[shapes] = jitted.lower(*arguments).compile()
            ready = time.perf_counter()
            result = jax.block_until_ready(programs[shapes](*arguments))
            self.seconds["compile"] += ready - began
            self.seconds[name] += time.perf_counter() - ready
            return result

        return call

    def report(self) -> str:
        """Formats one line.

        Returns:
          Tokens and tokens per second of reading and of drawing, and the seconds of compiling.
        """
        parts = [
            f"{name}: {count:,} tokens, {count / max(self.seconds[name], 1e-9):,.0f} tokens/s"
            for name, count in self.tokens.items()
        ]
        return "; ".join([*parts, f"compiling: {self.seconds['compile']:.1f} s"])


class Position(NamedTuple):
    """The position of decoding.

    Attributes:
      state: of the model, after all tokens so far.
      logits: of the next token.
      drawn: number of tokens drawn so far.
      sound: whether all logits used so far are numbers.
    """

    state: Any
    logits: Float[Array, "batch vocab"]
    drawn: Int[Array, ""]
    sound: Bool[Array, ""]


class Decoder(NamedTuple):
    """The two calls of decoding.

    Attributes:
      read: `(params, prompts, length) -> Position`, with room for `length` more tokens.
      draw: `(params, position, keys[batch], count) -> (Position, tokens[batch, count])`, with
        count at most `block`; it takes the buffers of the position.
      block: the most tokens that one call draws.
      watch: the times of the calls.
    """

    read: Callable[[Params, Sequence[Sequence[int]], int], Position]
    draw: Callable[[Params, Position, Array, int], tuple[Position, Int[np.ndarray, "batch count"]]]
    block: int
    watch: Watch


def decoder(model: Model, choose: Choose, *, block: int) -> Decoder:
    """Makes the decode loop of a model.

    Args:
      model: a sequence model; its `run` must take resets if prompts differ in length.
      choose: `(keys[batch], logits[batch, vocab]) -> tokens[batch]`. The key of a row's i-th token
        is `fold_in(keys[row], i)`, whatever else is in the batch.
      block: the most tokens drawn before Python sees them; at least 1.

    Returns:
      The loop. It compiles once for each batch size, room, and length of a piece.
    """
    assert model.start is not None and model.run is not None, "decoding needs a sequence model"
    start, run, watch = model.start, model.run, Watch()

    def read_piece(params, state, *piece):
        state, logits = run(params, state, *piece)
        return state, logits[:, -1].astype(jnp.float32)

    def draw_block(params, position, keys, count):
        def one(i, carry):
            (state, logits, drawn, sound), tokens = carry
            token = choose(jax.vmap(jax.random.fold_in, (0, None))(keys, drawn), logits)
            token = token.astype(jnp.int32)
            sound &= ~jnp.isnan(logits).any()
            state, logits = run(params, state, token[:, None])
            logits = logits[:, -1].astype(jnp.float32)
            return Position(state, logits, drawn + 1, sound), tokens.at[:, i].set(token)

        # The count is traced: a last, shorter block is the same program.
        tokens = jnp.zeros((keys.shape[0], block), jnp.int32)
        return lax.fori_loop(0, count, one, (position, tokens))

    fresh = jax.jit(start, static_argnums=(1, 2))
    read_piece = watch.timed("prefill", read_piece, donate_argnums=1)
    draw_block = watch.timed("decode", draw_block, donate_argnums=1)

    def read(params: Params, prompts: Sequence[Sequence[int]], length: int) -> Position:
        tokens, reset = left_padded(prompts)
        batch, longest = tokens.shape
        inputs = (tokens,) if reset is None else (tokens, reset)
        _check_memory(jax.eval_shape(lambda p: start(p, batch, longest + length), params), batch)
        state, logits = fresh(params, batch, longest + length), None
        # The remainder comes first, so that all further pieces have one shape.
        edges = [0, *range((longest - 1) % PIECE + 1, longest + 1, PIECE)]
        for first, end in zip(edges, edges[1:], strict=False):
            piece = (jnp.asarray(array[:, first:end]) for array in inputs)
            state, logits = read_piece(params, state, *piece)
        assert logits is not None
        return Position(state, logits, jnp.zeros((), jnp.int32), jnp.array(True))

    def draw(params: Params, position: Position, keys: Array, count: int):
        position, tokens = draw_block(params, position, keys, jnp.asarray(count, jnp.int32))
        if not position.sound:
            raise ValueError(
                f"the model gave NaN within the first {position.drawn} tokens after the prompt: "
                "its parameters are not finite, a token is outside its vocabulary, or the text "
                "is longer than its max_length; give a shorter length, or another run"
            )
        return position, np.asarray(tokens)[:, :count]

    return Decoder(read, draw, block, watch)


def left_padded(
    prompts: Sequence[Sequence[int]],
) -> tuple[Int[np.ndarray, "batch time"], Bool[np.ndarray, "batch time"] | None]:
    """Arranges prompts as rows of one array, each ending in the last column.

    Args:
      prompts: none of them empty.

    Returns:
      The tokens, zero before a prompt begins, and resets, true where it begins. No resets if all
      have one length; otherwise the time is a power of two, for few shapes to compile.
    """
    longest = max(map(len, prompts))
    if min(map(len, prompts)) == longest:
        return np.asarray(prompts, np.int32), None
    tokens = np.zeros((len(prompts), 1 << (longest - 1).bit_length()), np.int32)
    reset = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        tokens[row, -len(prompt) :] = prompt
        reset[row, -len(prompt)] = True
    return tokens, reset


def _check_memory(state: Any, batch: int) -> None:
    # The allocation would not fail: a system that overcommits kills the process later.
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    known = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if known is None and hasattr(os, "sysconf"):
        known = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if known is not None and needed > known:
        raise ValueError(
            f"the model's state takes {needed / 1e9:,.1f} GB for {batch} rows of this length, and "
            f"the device has {known / 1e9:,.1f} GB: give a smaller length or a smaller batch_size"
        )
