"""Layers as pure functions: each factory returns a `Model` of `init` and `apply`.

Parameters are float32 dicts with descriptive names; `kernel` is `[in, out]`. A layer computes
in the dtype of its input, so that one cast after the embedding decides the precision of all.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxpara.matmul import matmul
from jaxpara.sizes import positive
from jaxpara.types import AnyArray, Model


def linear(features: int, outputs: int, *, scale: float = 1.0) -> Model:
    """A matrix without bias: `y = x W`.

    Args:
      features: size of the last axis of the input.
      outputs: size of the last axis of the output.
      scale: entries start normal with standard deviation `scale / sqrt(features)`.

    Returns:
      `init(key) -> {"kernel"}` and `apply(params, x[..., features]) -> y[..., outputs]`.

    Raises:
      ValueError: if a size is not positive.
    """
    positive(features=features, outputs=outputs)

    def init(key):
        kernel = jax.random.normal(key, (features, outputs), jnp.float32)
        return {"kernel": kernel * (scale * features**-0.5)}

    def apply(
        params: dict, x: Float[AnyArray, "*batch features"]
    ) -> Float[AnyArray, "*batch outputs"]:
        return matmul(x, params["kernel"].astype(x.dtype))

    return Model(init, apply)


def embedding(vocab_size: int, width: int, *, scale: float = 1.0) -> Model:
    """A table of vectors: `y = E[token]`. A token outside the vocabulary gives NaN.

    Args:
      vocab_size: number of rows.
      width: size of a vector.
      scale: entries start normal with this standard deviation.

    Returns:
      `init(key) -> {"table"}` and `apply(params, tokens[...]) -> y[..., width]`, float32.

    Raises:
      ValueError: if a size is not positive; from `apply`, if tokens are not integers or the table
        has other rows.
    """
    positive(vocab_size=vocab_size, width=width)

    def init(key):
        return {"table": scale * jax.random.normal(key, (vocab_size, width), jnp.float32)}

    def apply(params: dict, tokens: Integer[AnyArray, "*batch"]) -> Float[Array, "*batch width"]:
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens have dtype {tokens.dtype}; give integers below {vocab_size}")
        rows = params["table"].shape[0]
        if rows != vocab_size:
            raise ValueError(
                f"the parameters embed {rows} tokens, the model was made for "
                f"vocab_size={vocab_size}: make it with vocab_size={rows} or load other parameters"
            )
        # Out of range is NaN and not the nearest row: a wrong vocabulary must not pass unseen.
        return (
            params["table"]
            .at[tokens]
            .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        )

    return Model(init, apply)


def rms_norm(width: int, *, epsilon: float = 1e-6) -> Model:
    """`y = x / sqrt(mean(x^2) + epsilon) * scale`, the mean in float32.

    Args:
      width: size of the normalised last axis.
      epsilon: keeps a zero vector finite.

    Returns:
      `init(key) -> {"scale"}` and `apply(params, x[..., width])` of the shape and dtype of x.

    Raises:
      ValueError: if the width is not positive.

    References: [rmsnorm].
    """
    positive(width=width)

    def init(key):
        del key
        return {"scale": jnp.ones(width, jnp.float32)}

    def apply(params: dict, x: Float[AnyArray, "*batch width"]) -> Float[Array, "*batch width"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        size = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + epsilon)
        return (wide * size * params["scale"]).astype(x.dtype)

    return Model(init, apply)


def swiglu(width: int, hidden: int, *, scale: float = 1.0) -> Model:
    """The gated MLP `y = (silu(x W_gate) * (x W_up)) W_down`.

    Args:
      width: size of the last axis of input and output.
      hidden: size between.
      scale: factor on the initial `W_down`, for depth.

    Returns:
      `init(key) -> {"up": {"kernel"}, "down": {"kernel"}}`, where `up` holds gate and up
      matrices side by side, and `apply(params, x[..., width])`.

    Raises:
      ValueError: if a size is not positive.

    References: [swiglu].
    """
    positive(width=width, hidden=hidden)
    up, down = linear(width, 2 * hidden), linear(hidden, width, scale=scale)

    def init(key):
        k_up, k_down = jax.random.split(key)
        return {"up": up.init(k_up), "down": down.init(k_down)}

    def apply(params: dict, x: Float[AnyArray, "*batch width"]) -> Float[Array, "*batch width"]:
        gate, value = jnp.split(up.apply(params["up"], x), 2, axis=-1)
        return down.apply(params["down"], jax.nn.silu(gate) * value)

    return Model(init, apply)
