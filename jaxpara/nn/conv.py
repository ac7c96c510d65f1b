"""The short causal convolution before a mixer, with its last inputs as state."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpara.nn.mixers import Mixer
from jaxpara.sizes import positive


def short_conv(width: int, *, taps: int = 4) -> Mixer:
    """A causal depthwise convolution: `y_t = sum_k w_k x_{t-k}`, `k = 0 .. taps - 1`.

    Args:
      width: number of channels, each with its own taps.
      taps: number of inputs that an output sees, itself included.

    Returns:
      A `Mixer` whose state is the last `taps - 1` inputs, zero at the start. Where a reset is
      true, the inputs before it count as zero.

    Raises:
      ValueError: if a size is not positive.

    References: [mamba].
    """
    positive(width=width, taps=taps)

    def init(key):
        return {"taps": jax.random.normal(key, (taps, width), jnp.float32) * taps**-0.5}

    def start(params, batch_size, max_length, dtype):
        del params, max_length
        return jnp.zeros((batch_size, taps - 1, width), dtype)

    def run(
        params: dict,
        state: Float[Array, "batch past width"],
        x: Float[Array, "batch time width"],
        reset: Bool[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch past width"], Float[Array, "batch time width"]]:
        time = x.shape[1]
        seen = jnp.concatenate([state.astype(x.dtype), x], axis=1)
        weights = params["taps"].astype(x.dtype)
        last = seen[:, time:]
        if reset is None:
            y = weights[0] * x
            for k in range(1, taps):
                y += weights[k] * seen[:, taps - 1 - k : taps - 1 - k + time]
            return last, y
        # The position of the latest reset up to each step; the state lies at -1, -2, ...
        positions = jnp.arange(time)
        first = jax.lax.cummax(jnp.where(reset, positions, -taps), axis=1)
        y = jnp.zeros_like(x)
        for k in range(taps):
            visible = (positions - k >= first)[..., None]
            y += weights[k] * jnp.where(visible, seen[:, taps - 1 - k : taps - 1 - k + time], 0)
        kept = jnp.arange(time - taps + 1, time) >= first[:, -1:]
        return jnp.where(kept[..., None], last, 0), y

    return Mixer(init, start, run, width)
