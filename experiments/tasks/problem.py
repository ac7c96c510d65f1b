"""Synthetic problems, with examples that never cross from one split to the other.

A hash of its tokens assigns a sequence to the held-out eighth or to training, so no sequence of one
split is ever in the other, whatever seeds drew them.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_HELD_OUT = 8  # one sequence in 8 is held out
_TRIES = 200


class Examples(NamedTuple):
    """Sequences and their answers.

    Attributes:
      tokens: int32 `[batch, length]`.
      targets: int32 `[batch, length]`, the answer at each position.
      mask: bool `[batch, length]`, where there is one.
    """

    tokens: np.ndarray
    targets: np.ndarray
    mask: np.ndarray


class Problem(NamedTuple):
    """A family of sequences with answers.

    Attributes:
      name: for figures and tables.
      vocab_size: tokens and answers are below it.
      shortest: the shortest length that has an answer.
      draw: `(generator, batch_size, length) -> Examples`.
    """

    name: str
    vocab_size: int
    shortest: int
    draw: Callable[[np.random.Generator, int, int], Examples]


def sample(
    problem: Problem,
    *,
    seed: int,
    step: int,
    batch_size: int,
    length: int,
    held_out: bool = False,
) -> Examples:
    """Draws examples as a pure function of seed and step.

    Args:
      problem: what to draw.
      seed: of the run.
      step: number of the batch.
      batch_size: sequences.
      length: tokens in each.
      held_out: draw from the eighth of all sequences that training never sees.

    Returns:
      The examples.

    Raises:
      ValueError: the length is too short for the problem, or a split is nearly empty at it.
    """
    if length < problem.shortest:
        raise ValueError(
            f"length={length} is too short for {problem.name}: give at least {problem.shortest}"
        )
    generator = np.random.default_rng([seed, step, int(held_out)])
    kept: list[Examples] = []
    missing = batch_size
    for _ in range(_TRIES):
        count = missing * (_HELD_OUT if held_out else 1) + _HELD_OUT
        drawn = problem.draw(generator, count, length)
        mine = (_hash(drawn.tokens) % np.uint64(_HELD_OUT) == 0) == held_out
        kept.append(Examples(*(leaf[mine][:missing] for leaf in drawn)))
        missing -= len(kept[-1].tokens)
        if not missing:
            return Examples(*(np.concatenate(leaves) for leaves in zip(*kept, strict=True)))
    raise ValueError(
        f"length={length}: {problem.name} has too few sequences of this length to hold some out; "
        "give a longer one"
    )


def _hash(tokens: np.ndarray) -> np.ndarray:
    """Hashes each row to a 64-bit number (FNV-1a, then the finaliser of splitmix64)."""
    state = np.full(len(tokens), 0xCBF29CE484222325, np.uint64)
    for column in tokens.T.astype(np.uint64):
        state = (state ^ (column + np.uint64(1))) * np.uint64(0x100000001B3)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    return state ^ (state >> np.uint64(31))
