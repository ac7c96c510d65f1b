"""k-hop induction [khop]: go to what followed the token's last occurrence, k times over."""

import numpy as np

from experiments.tasks.problem import Examples, Problem


def induction(*, hops: int = 2, alphabet: int = 8) -> Problem:
    """Goes from i to the latest `j <= i` with `x[j-1] = x[i]`, `hops` times; the answer is `x[j]`.

    With one hop it is what an induction head computes. Positions from which the chain leaves the
    sequence have no answer.

    Args:
      hops: at least 1.
      alphabet: number of tokens.

    Returns:
      The problem.

    Raises:
      ValueError: no hops, or fewer than two tokens.
    """
    if hops < 1 or alphabet < 2:
        raise ValueError(f"hops={hops}, alphabet={alphabet}: give at least 1 hop and 2 tokens")

    def draw(generator, batch_size, length):
        tokens = generator.integers(alphabet, size=(batch_size, length), dtype=np.int32)
        rows = np.arange(batch_size)
        nowhere = length  # one past the end, and its own successor
        after = np.full((batch_size, alphabet), nowhere)  # position of the latest follower
        jump = np.full((batch_size, length + 1), nowhere)
        for t in range(length):
            if t:
                after[rows, tokens[:, t - 1]] = t
            jump[:, t] = after[rows, tokens[:, t]]
        place = np.broadcast_to(np.arange(length), tokens.shape)
        for _ in range(hops):
            place = np.take_along_axis(jump, place, axis=1)
        padded = np.concatenate([tokens, np.zeros((batch_size, 1), np.int32)], axis=1)
        return Examples(tokens, np.take_along_axis(padded, place, axis=1), place < nowhere)

    return Problem(f"{hops}-hop induction", alphabet, 2, draw)
