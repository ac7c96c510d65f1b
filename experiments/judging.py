"""Bits per byte on fixed windows, a batch at a time."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from jaxpara.train import evaluate
from jaxpara.types import Model, Params


def bits_per_byte(
    model: Model, windows: UInt8[np.ndarray, "windows time"], *, batch_size: int
) -> Callable[[Params], float]:
    """Makes a function that scores parameters on fixed windows.

    `-1/N sum log2 p(byte | the bytes before it in its window)`, every window from
    the model's start.

    Args:
      model: a sequence model over bytes.
      windows: each one byte longer than what is predicted.
      batch_size: windows at a time; a last smaller batch compiles once more.

    Returns:
      `params -> bits per byte`.
    """
    sums = jax.jit(evaluate(model))

    def score(params: Params) -> float:
        nats, predicted = 0.0, 0
        for first in range(0, len(windows), batch_size):
            batch = jnp.asarray(windows[first : first + batch_size], jnp.int32)
            totals = sums(params, batch)
            nats += float(totals["nats"])
            predicted += int(totals["tokens"])
        return nats / predicted / math.log(2)

    return score
