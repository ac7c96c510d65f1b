"""Words over groups: the answer at every position is the product of all letters so far.

Parity is the group of two elements; modular sums are the cyclic groups. S3 is the smallest group
that does not commute, A5 the smallest that is not solvable. The word problem of A5 is as hard as
anything that can be done with constant memory [barrington], and out of reach of attention and
positive linear recurrences of fixed depth [illusion].
"""

import numpy as np

from experiments.tasks import groups
from experiments.tasks.problem import Examples, Problem


def modular_sum(*, modulus: int = 3) -> Problem:
    """Running sums modulo a number.

    Args:
      modulus: letters and answers are below it; 2 is parity.

    Returns:
      The problem.

    Raises:
      ValueError: a modulus below 2.
    """
    if modulus < 2:
        raise ValueError(f"modulus={modulus} leaves nothing to track: give at least 2")

    def draw(generator, batch_size, length):
        tokens = generator.integers(modulus, size=(batch_size, length), dtype=np.int32)
        targets = np.cumsum(tokens, axis=1, dtype=np.int64) % modulus
        return Examples(tokens, targets.astype(np.int32), np.ones(tokens.shape, bool))

    return Problem("parity" if modulus == 2 else f"sum modulo {modulus}", modulus, 1, draw)


def parity() -> Problem:
    """Whether the number of ones so far is odd.

    Returns:
      The problem.
    """
    return modular_sum(modulus=2)


def group_word(*, group: str, letters: str = "all") -> Problem:
    """Running products in a group that does not commute.

    Args:
      group: "S3", "S4", "S5" or "A5".
      letters: "all" elements, or only the two "generators".

    Returns:
      The problem; answers are elements either way.

    Raises:
      ValueError: another group or set of letters.
    """
    which = groups.named(group)
    sets = {"all": np.arange(len(which.elements)), "generators": np.array(which.generators)}
    if letters not in sets:
        raise ValueError(f"letters={letters!r}; give one of {', '.join(sets)}")
    alphabet = sets[letters].astype(np.int32)

    def draw(generator, batch_size, length):
        tokens = generator.choice(alphabet, size=(batch_size, length))
        targets = np.empty_like(tokens)
        state = np.zeros(batch_size, np.int32)
        for t in range(length):
            state = which.table[state, tokens[:, t]]
            targets[:, t] = state
        return Examples(tokens, targets, np.ones(tokens.shape, bool))

    name = which.name if letters == "all" else f"{which.name}, two letters"
    return Problem(name, len(which.elements), 1, draw)
