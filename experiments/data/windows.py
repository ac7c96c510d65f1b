"""Windows of a byte string: random ones to train on, evenly spaced ones to be judged by.

A window has `length + 1` bytes, of which the last `length` are predicted. Batch
number `step` is a function of (seed, step) alone, so the position in the data is
one integer and a run can be taken up again at any step.
"""

import numpy as np
from jaxtyping import UInt8


def _check_long_enough(text: np.ndarray, length: int) -> None:
    if length < 1:
        raise ValueError(f"length={length} bytes to predict: give at least 1")
    if len(text) < length + 1:
        raise ValueError(
            f"a window of {length} + 1 bytes does not fit into {len(text)} bytes: "
            f"give more text or a length of at most {len(text) - 1}"
        )


def sample_batch(
    text: UInt8[np.ndarray, " bytes"], *, seed: int, step: int, batch_size: int, length: int
) -> UInt8[np.ndarray, "batch time"]:
    """Cuts uniformly random windows; the same arguments give the same windows anywhere.

    Args:
      text: bytes to cut from.
      seed: of the run.
      step: number of the batch; with `seed` it keys a counter-based generator.
      batch_size: windows in the batch.
      length: bytes to predict in each; a window holds one byte more.

    Returns:
      `[batch_size, length + 1]` bytes.

    Raises:
      ValueError: the text is shorter than one window.
    """
    _check_long_enough(text, length)
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = generator.integers(0, len(text) - length, size=batch_size)
    return text[starts[:, None] + np.arange(length + 1)]


def evenly_spaced(
    text: UInt8[np.ndarray, " bytes"], *, count: int, length: int
) -> UInt8[np.ndarray, "batch time"]:
    """Cuts windows at equal distances, the first at the first byte, the last ending at the last.

    Args:
      text: bytes to cut from.
      count: number of windows; they overlap where the text is short.
      length: bytes to predict in each; a window holds one byte more.

    Returns:
      `[count, length + 1]` bytes.

    Raises:
      ValueError: the text is shorter than one window, or `count` is not positive.
    """
    _check_long_enough(text, length)
    if count < 1:
        raise ValueError(f"count={count} windows: give at least 1")
    starts = np.linspace(0, len(text) - length - 1, count).astype(np.int64)
    return text[starts[:, None] + np.arange(length + 1)]
