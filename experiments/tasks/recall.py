"""Multi-query associative recall [zoology]: pairs are shown first, then asked for."""

import numpy as np

from experiments.tasks.problem import Examples, Problem


def recall(*, pairs: int = 8, keys: int = 32, values: int = 32) -> Problem:
    """`k v k v ... k v  q q q ...`: the answer to a key is the value shown with it.

    Every position after the pairs asks for one of the keys shown, drawn at random.

    Args:
      pairs: shown, with different keys.
      keys: to choose from.
      values: to choose from; their tokens come after those of the keys.

    Returns:
      The problem.

    Raises:
      ValueError: more pairs than keys, or none.
    """
    if not 1 <= pairs <= keys:
        raise ValueError(f"pairs={pairs} with keys={keys}: give 1 to {keys} pairs, or more keys")

    def draw(generator, batch_size, length):
        shown = generator.random((batch_size, keys)).argsort(axis=1)[:, :pairs]
        taken = keys + generator.integers(values, size=(batch_size, pairs))
        asked = generator.integers(pairs, size=(batch_size, length - 2 * pairs))
        head = np.stack([shown, taken], axis=2).reshape(batch_size, 2 * pairs)
        tokens = np.concatenate([head, np.take_along_axis(shown, asked, axis=1)], axis=1)
        targets = np.concatenate([head, np.take_along_axis(taken, asked, axis=1)], axis=1)
        mask = np.broadcast_to(np.arange(length) >= 2 * pairs, tokens.shape)
        return Examples(tokens.astype(np.int32), targets.astype(np.int32), mask)

    return Problem(f"recall of {pairs} pairs", keys + values, 2 * pairs + 1, draw)
