"""The one sequence model of jaxpara: a decoder whose token mixer is a choice.

A block is `u = norm(x)`, `x += out(mixer(conv(u)) * silu(gate(u)))`,
`x += swiglu(norm(x))` [prenorm]. Decoders with different mixers differ only in the mixer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from jaxpara.matmul import matmul
from jaxpara.nn.conv import short_conv
from jaxpara.nn.layers import embedding, linear, rms_norm, swiglu
from jaxpara.nn.making import made, need_mixer
from jaxpara.nn.mixers import Mixer
from jaxpara.sizes import flag, positive
from jaxpara.types import AnyArray, Model

MakeMixer = Callable[[int], Mixer]
AdaptMlp = Callable[[Model, int], Model]


def block(
    width: int,
    mixer: MakeMixer,
    *,
    mlp_hidden: int,
    mlp_adapter: AdaptMlp | None = None,
    conv_taps: int = 4,
    depth: int = 1,
) -> Mixer:
    """One residual block: short convolution, mixer, gated residual, then a SwiGLU MLP.

    Args:
      width: size of the residual stream.
      mixer: a function from the width to a `Mixer`.
      mlp_hidden: hidden size of the MLP.
      mlp_adapter: see `decoder`.
      conv_taps: number of inputs that the convolution sees.
      depth: number of blocks in the stack; the two matrices that write to the stream start
        smaller by `sqrt(2 * depth)`, so that the stream's variance does not grow with depth.

    Returns:
      A `Mixer` from width to width, whose state is `{"conv", "mixer"}`.

    Raises:
      TypeError: `mixer` is no such function.
      ValueError: if a size is not positive.

    References: [prenorm], [swiglu].
    """
    positive(width=width, mlp_hidden=mlp_hidden, conv_taps=conv_taps, depth=depth)
    norm, conv, mix = rms_norm(width), short_conv(width, taps=conv_taps), made(mixer, width)
    small = (2 * depth) ** -0.5
    gate, out = linear(width, mix.outputs), linear(mix.outputs, width, scale=small)
    mlp = swiglu(width, mlp_hidden, scale=small)
    mlp = mlp if mlp_adapter is None else mlp_adapter(mlp, width)

    def init(key):
        keys = jax.random.split(key, 7)
        return {
            "norm": norm.init(keys[0]),
            "conv": conv.init(keys[1]),
            "mixer": mix.init(keys[2]),
            "gate": gate.init(keys[3]),
            "out": out.init(keys[4]),
            "mlp_norm": norm.init(keys[5]),
            "mlp": mlp.init(keys[6]),
        }

    def start(params, batch_size, max_length, dtype):
        return {
            "conv": conv.start(params["conv"], batch_size, max_length, dtype),
            "mixer": mix.start(params["mixer"], batch_size, max_length, dtype),
        }

    def run(params, state, x, reset):
        u = norm.apply(params["norm"], x)
        conv_state, v = conv.run(params["conv"], state["conv"], u, reset)
        mixer_state, v = mix.run(params["mixer"], state["mixer"], v, reset)
        x = x + out.apply(params["out"], v * jax.nn.silu(gate.apply(params["gate"], u)))
        x = x + mlp.apply(params["mlp"], norm.apply(params["mlp_norm"], x))
        return {"conv": conv_state, "mixer": mixer_state}, x

    return Mixer(init, start, run, width)


def decoder(
    vocab_size: int,
    width: int,
    layers: int,
    *,
    mixer: MakeMixer | Sequence[MakeMixer],
    mlp_hidden: int | None = None,
    mlp_adapter: AdaptMlp | None = None,
    conv_taps: int = 4,
    tied: bool = False,
    compute_dtype: Any = jnp.float32,
    remat: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    unroll: int | bool = 4,
) -> Model:
    """A causal language model: embedding, a scan over blocks, norm, logits.

    Args:
      vocab_size: number of tokens.
      width: size of the residual stream.
      layers: number of blocks.
      mixer: a function `width -> Mixer`, as `mixers.recurrent` and `mixers.attention` return;
        or a pattern, a sequence of them that is repeated over depth.
      mlp_hidden: hidden size of the MLPs; None takes 8/3 of the width, down to a multiple of
        16 where the width allows it.
      mlp_adapter: a function from the MLP and the width to the MLP with an adapter, such as
        `adapted_mlp()`; None adds no adapter.
      conv_taps: number of inputs that the short convolutions see.
      tied: the embedding is also the output matrix.
      compute_dtype: of activations and matmuls; parameters, recurrences, norms and logits are
        float32.
      remat: wraps the body of the scan over blocks, e.g. `jax.checkpoint`, to store less.
      unroll: of the scan over blocks, as in `lax.scan`; the default unrolls a shallow model
        fully, which trains 1.6 times faster on a CPU than a loop over three blocks.

    Returns:
      A sequence `Model`. `apply(params, tokens[batch, time], reset=None)` gives logits
      `[batch, time, vocab_size]`; `start(params, batch_size, max_length)` a state;
      `run(params, state, tokens, reset=None)` the state after `tokens`, and logits. Where
      `reset[batch, time]` is true a document starts and does not see what came before.

    Raises:
      TypeError: a mixer is no such function.
      ValueError: if a size is not positive, `tied` is neither True nor False, or `layers` is not a
        multiple of the pattern's length; from the functions, if tokens are not integers
        `[batch, time]`, or the parameters embed another vocabulary.
    """
    positive(vocab_size=vocab_size, width=width, layers=layers, conv_taps=conv_taps)
    tied = flag(tied=tied)
    given: Any = mixer
    if isinstance(given, Mixer | str) or not isinstance(given, Sequence):
        need_mixer(given)
    pattern = (mixer,) if callable(mixer) else tuple(mixer)
    for each in pattern:
        need_mixer(each)
    if not pattern or layers % len(pattern):
        raise ValueError(
            f"layers={layers} is not a multiple of the {len(pattern)} mixers of the pattern: "
            "give one mixer, or a pattern that fits"
        )
    periods = layers // len(pattern)
    if mlp_hidden is None:
        mlp_hidden = max(8 * width // 3 // 16 * 16, 16)
    blocks = tuple(
        block(
            width,
            m,
            mlp_hidden=mlp_hidden,
            mlp_adapter=mlp_adapter,
            conv_taps=conv_taps,
            depth=layers,
        )
        for m in pattern
    )
    embed, norm = embedding(vocab_size, width, scale=width**-0.5), rms_norm(width)
    head = linear(width, vocab_size)

    def init(key):
        k_embed, k_head, k_blocks = jax.random.split(key, 3)
        k_pattern = jax.random.split(k_blocks, len(blocks))
        params = {
            "embedding": embed.init(k_embed),
            "blocks": tuple(
                jax.vmap(b.init)(jax.random.split(k, periods))
                for b, k in zip(blocks, k_pattern, strict=True)
            ),
            "norm": norm.init(k_head),
        }
        return params if tied else {**params, "head": head.init(k_head)}

    def start(params, batch_size: int, max_length: int):
        return tuple(
            jax.vmap(lambda p, b=b: b.start(p, batch_size, max_length, compute_dtype))(stacked)
            for b, stacked in zip(blocks, params["blocks"], strict=True)
        )

    def run(
        params: dict,
        state: Any,
        tokens: Integer[AnyArray, "batch time"],
        reset: Bool[Array, "batch time"] | None = None,
    ) -> tuple[Any, Float[Array, "batch time vocab"]]:
        if tokens.ndim != 2:
            raise ValueError(f"tokens have shape {tokens.shape}; give [batch, time]")

        def period(x, xs):
            stacked, states = xs
            new = []
            for b, p, s in zip(blocks, stacked, states, strict=True):
                s, x = b.run(p, s, x, reset)
                new.append(s)
            return x, tuple(new)

        x = embed.apply(params["embedding"], tokens).astype(compute_dtype)
        body = period if remat is None else remat(period)
        x, state = jax.lax.scan(body, x, (params["blocks"], state), unroll=unroll)
        x = norm.apply(params["norm"], x)
        kernel = params["embedding"]["table"].T if tied else params["head"]["kernel"]
        logits = matmul(
            x, kernel.astype(x.dtype), preferred_element_type=jnp.promote_types(x.dtype, "float32")
        )
        return state, logits

    def apply(
        params: dict,
        tokens: Integer[AnyArray, "batch time"],
        reset: Bool[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch time vocab"]:
        if tokens.ndim != 2:
            raise ValueError(f"tokens have shape {tokens.shape}; give [batch, time]")
        return run(params, start(params, *tokens.shape), tokens, reset)[1]

    return Model(init, apply, start, run)
