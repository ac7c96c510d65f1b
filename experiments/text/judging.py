"""Bits per byte on fixed windows, a batch at a time."""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import numpy as np

from jaxpara.train import evaluate
from jaxpara.types import Model, Params


def reading(model: Model, batch: Mapping[str, jax.Array]) -> Model:
    """Wraps a model so that it restarts where the documents of a packed batch begin.

    Args:
      model: a sequence model.
      batch: `tokens`, and `reset` if documents are packed.

    Returns:
      The model; the same one if nothing is packed.
    """
    if "reset" not in batch:
        return model
    return model._replace(apply=functools.partial(model.apply, reset=batch["reset"]))


def bits_per_byte(
    model: Model,
    held_out: Mapping[str, np.ndarray],
    *,
    batch_size: int,
    bytes_per_token: float = 1.0,
) -> Callable[[Params], float]:
    """Makes a function that scores parameters on fixed windows.

    It is `-1/N sum log2 p(token | the tokens before it in its window)` over the N bytes of the
    tokens; every window begins at the model's start.

    Args:
      model: a sequence model.
      held_out: `tokens` `[windows, time + 1]`, and `reset` if documents are packed.
      batch_size: windows at a time; a smaller last batch compiles once more.
      bytes_per_token: of the held-out text.

    Returns:
      `params -> bits per byte`.
    """
    count = len(held_out["tokens"])

    @jax.jit
    def sums(params: Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return evaluate(reading(model, batch))(params, batch["tokens"])

    def score(params: Params) -> float:
        nats, predicted = 0.0, 0
        for first in range(0, count, batch_size):
            rows = slice(first, first + batch_size)
            totals = sums(params, {name: leaf[rows] for name, leaf in held_out.items()})
            nats += float(totals["nats"])
            predicted += int(totals["tokens"])
        return nats / predicted / math.log(2) / bytes_per_token

    return score
