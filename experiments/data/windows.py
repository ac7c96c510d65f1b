"""Windows of a text: random ones for training, evenly spaced ones for evaluation.

A window has `length + 1` tokens, of which the last `length` are predicted. Batch
number `step` is a function of only (seed, step), so the position in the data is
one integer, and a run can continue from any step.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Integer

from experiments.data.corpus import Batch, Sampler
from experiments.data.tokens import Tokens


def check_long_enough(text: Integer[np.ndarray, " tokens"], length: int) -> None:
    """Refuses a text that is shorter than one window.

    Args:
      text: tokens to cut from.
      length: tokens to predict in a window.

    Raises:
      ValueError: says what to give instead.
    """
    if length < 1:
        raise ValueError(f"length={length} tokens to predict: give at least 1")
    if len(text) < length + 1:
        raise ValueError(
            f"a window of {length} + 1 tokens does not fit into {len(text)} tokens: "
            "give more text, or a window=, length= or evaluation.length= of at most "
            f"{len(text) - 1}"
        )


def sample_batch(
    text: Integer[np.ndarray, " tokens"], *, seed: int, step: int, batch_size: int, length: int
) -> Integer[np.ndarray, "batch time"]:
    """Cuts uniformly random windows; the same arguments give the same windows anywhere.

    Args:
      text: tokens to cut from.
      seed: of the run.
      step: number of the batch; with `seed` it keys a counter-based generator.
      batch_size: windows in the batch.
      length: tokens to predict in each; a window holds one token more.

    Returns:
      `[batch_size, length + 1]` tokens.

    Raises:
      ValueError: the text is shorter than one window.
    """
    check_long_enough(text, length)
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = generator.integers(0, len(text) - length, size=batch_size)
    return text[starts[:, None] + np.arange(length + 1)]


def evenly_spaced(
    text: Integer[np.ndarray, " tokens"], *, count: int, length: int
) -> Integer[np.ndarray, "batch time"]:
    """Cuts evenly spaced windows, from the first token to the last.

    Args:
      text: tokens to cut from.
      count: number of windows; they overlap where the text is short.
      length: tokens to predict in each; a window holds one token more.

    Returns:
      `[count, length + 1]` tokens.

    Raises:
      ValueError: the text is shorter than one window, or `count` is not positive.
    """
    check_long_enough(text, length)
    if count < 1:
        raise ValueError(f"count={count} windows: give at least 1")
    starts = np.linspace(0, len(text) - length - 1, count).astype(np.int64)
    return text[starts[:, None] + np.arange(length + 1)]


def _batches(tokens: Tokens, *, seed: int, batch_size: int, length: int) -> Callable[[int], Batch]:
    text = tokens.ids[: tokens.end]
    check_long_enough(text, length)

    def batch(step: int) -> Batch:
        cut = sample_batch(text, seed=seed, step=step, batch_size=batch_size, length=length)
        return {"tokens": cut.astype(np.int32)}

    return batch


def _held_out(tokens: Tokens, *, count: int, length: int) -> Batch:
    cut = evenly_spaced(tokens.ids[: tokens.end], count=count, length=length)
    return {"tokens": cut.astype(np.int32)}


# Windows anywhere in the joined documents: no epochs, no resets, no state.
RANDOM = Sampler(_batches, _held_out)
