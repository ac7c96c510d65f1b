"""Trained modules around frozen ones, as points of one design space. [unified_adapters]

    h' = h + s f(x)     parallel: beside the layer, from its input
    h' = h + s f(h)     sequential: behind it, from its output

with `h = layer(x)`. docs/methods/layers.md has the table. Adapters that are linear in a weight are
methods of `jaxpara.weights` instead (`lora`, `ia3`). A prefix is an option of `mixers.attention`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxpara.nn.layers import linear
from jaxpara.nn.making import made
from jaxpara.nn.mixers import Mixer
from jaxpara.sizes import flag, positive
from jaxpara.types import AnyArray, Model


def bottleneck(
    features: int,
    outputs: int,
    *,
    hidden: int = 16,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    biases: bool = False,
) -> Model:
    """`f(x) = activation(x W_down + b_down) W_up + b_up`, zero at the start.

    Args:
      features: size of the last axis of the input.
      outputs: size of the last axis of the output.
      hidden: size between.
      activation: elementwise; the identity makes it LoRA's product.
      biases: whether there are biases, as in both papers; they start at zero.

    Returns:
      `init(key) -> {"down": {"kernel"}, "up": {"kernel"}}`, with `bias` beside each kernel if there
      are biases, and `apply(params, x[..., features])`.

    Raises:
      ValueError: a size is not positive, or `biases` neither True nor False.

    References: [houlsby].
    """
    positive(features=features, outputs=outputs, hidden=hidden)
    biases = flag(biases=biases)
    down, up = linear(features, hidden), linear(hidden, outputs, scale=0.0)

    def init(key):
        k_down, k_up = jax.random.split(key)
        params = {"down": down.init(k_down), "up": up.init(k_up)}
        if biases:
            params["down"]["bias"] = jnp.zeros(hidden, jnp.float32)
            params["up"]["bias"] = jnp.zeros(outputs, jnp.float32)
        return params

    def affine(layer, params, x):
        y = layer.apply(params, x)
        return y + params["bias"].astype(y.dtype) if biases else y

    def apply(
        params: dict, x: Float[AnyArray, "*batch features"]
    ) -> Float[AnyArray, "*batch outputs"]:
        return affine(up, params["up"], activation(affine(down, params["down"], x)))

    return Model(init, apply)


def _both(layer: Model | Mixer, adapter: Model) -> Callable[..., dict[str, Any]]:
    def init(key):
        k_layer, k_adapter = jax.random.split(key)
        return {"layer": layer.init(k_layer), "adapter": adapter.init(k_adapter)}

    return init


def parallel_adapter(layer: Model, adapter: Model, *, scale: float = 1.0) -> Model:
    """`h + scale * f(x)` with `h = layer(x)`: an adapter beside a layer.

    Args:
      layer: from an array to an array; its parameters are usually frozen.
      adapter: f, from the layer's input to its output, e.g. `bottleneck(...)`.
      scale: the paper's scaled parallel adapter has 4.

    Returns:
      A model with parameters `{"layer", "adapter"}`. Put those of a trained layer in `"layer"`.

    References: [unified_adapters].
    """

    def apply(params: dict, x: Float[AnyArray, "..."]) -> Float[AnyArray, "..."]:
        return layer.apply(params["layer"], x) + scale * adapter.apply(params["adapter"], x)

    return Model(_both(layer, adapter), apply)


def sequential_adapter(layer: Model, adapter: Model, *, scale: float = 1.0) -> Model:
    """`h + scale * f(h)` with `h = layer(x)`: an adapter behind a layer.

    Args:
      layer: from an array to an array; its parameters are usually frozen.
      adapter: f, from the layer's output to the same size, e.g. `bottleneck(...)`.
      scale: of what is added.

    Returns:
      A model with parameters `{"layer", "adapter"}`. Put those of a trained layer in `"layer"`.

    References: [houlsby].
    """

    def apply(params: dict, x: Float[AnyArray, "..."]) -> Float[AnyArray, "..."]:
        h = layer.apply(params["layer"], x)
        return h + scale * adapter.apply(params["adapter"], h)

    return Model(_both(layer, adapter), apply)


def adapted_mlp(
    *, hidden: int = 16, scale: float = 4.0, reads: str = "input", biases: bool = False
) -> Callable[[Model, int], Model]:
    """A bottleneck beside or behind an MLP, for `decoder(mlp_adapter=...)`.

    The scaled parallel adapter of [unified_adapters] is the default. With `mixers.attention(
    prefix=...)` it is their MAM adapter: a prefix at the attention, an adapter at the MLP.

    Args:
      hidden: size of the bottleneck.
      scale: of what is added.
      reads: the MLP's "input", a parallel adapter, or its "output", a sequential one.
      biases: of the bottleneck.

    Returns:
      `(mlp, width) -> Model` with parameters `{"layer", "adapter"}`.

    Raises:
      ValueError: `reads` is neither, `hidden` is not positive, or `biases` is no boolean.

    References: [unified_adapters], [houlsby].
    """
    _check_reads(reads)
    positive(hidden=hidden)
    biases = flag(biases=biases)
    around = parallel_adapter if reads == "input" else sequential_adapter

    def make(mlp: Model, width: int) -> Model:
        return around(mlp, bottleneck(width, width, hidden=hidden, biases=biases), scale=scale)

    return make


def _check_reads(reads: str) -> None:
    if reads not in ("input", "output"):
        raise ValueError(f"reads={reads!r}: give 'input' for a parallel adapter, or 'output'")


def adapted_mixer(
    mixer: Callable[[int], Mixer],
    *,
    hidden: int = 16,
    scale: float = 1.0,
    reads: str = "input",
    biases: bool = False,
) -> Callable[[int], Mixer]:
    """A token mixer with a bottleneck of the same position beside or behind it, for `decoder`.

    Args:
      mixer: a function from the width to a `Mixer`.
      hidden: size of the bottleneck.
      scale: of what is added.
      reads: the mixer's "input", a parallel adapter, or its "output", a sequential one.
      biases: of the bottleneck.

    Returns:
      A function from the decoder's width to a `Mixer` with parameters `{"layer", "adapter"}`.

    Raises:
      ValueError: `reads` is neither, `hidden` is not positive, or `biases` is no boolean.

    References: [unified_adapters], [houlsby].
    """
    _check_reads(reads)
    positive(hidden=hidden)
    biases = flag(biases=biases)

    def make(width: int) -> Mixer:
        layer = made(mixer, width)
        features = width if reads == "input" else layer.outputs
        adapter = bottleneck(features, layer.outputs, hidden=hidden, biases=biases)

        def start(params, batch_size, max_length, dtype):
            return layer.start(params["layer"], batch_size, max_length, dtype)

        def run(params, state, x, reset):
            state, h = layer.run(params["layer"], state, x, reset)
            source = x if reads == "input" else h
            return state, h + scale * adapter.apply(params["adapter"], source)

        return Mixer(_both(layer, adapter), start, run, layer.outputs)

    return make
