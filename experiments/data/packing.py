"""Documents packed end to end into rows, in another order in every epoch.

The documents of an epoch are shuffled and laid end to end. This tape is cut into rows of
`length + 1` tokens. Neighbouring rows share one token, so every token is predicted. The rows are
shuffled again and dealt to the batches. Row `k` of the whole run is a function of only (seed, k):
the position is one integer, whatever the number of processes.

The last row of an epoch is filled from the beginning of the tape. No token is left out, and
fewer than `length` are read twice.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from experiments.data.corpus import Batch, Sampler
from experiments.data.tokens import Tokens
from experiments.data.windows import check_long_enough, evenly_spaced


class Tape(NamedTuple):
    """Documents laid end to end.

    Attributes:
      documents: their numbers, in the order of the tape.
      begins: where each begins on the tape.
      ends: where each ends, separator included.
    """

    documents: Int[np.ndarray, " documents"]
    begins: Int[np.ndarray, " documents"]
    ends: Int[np.ndarray, " documents"]


def lay(tokens: Tokens, documents: Int[np.ndarray, " documents"]) -> Tape:
    """Lays documents end to end.

    Args:
      tokens: of all documents.
      documents: their numbers, in order.

    Returns:
      The tape.
    """
    lengths = np.diff(tokens.starts)[documents]
    ends = np.cumsum(lengths)
    return Tape(documents, ends - lengths, ends)


def cut_rows(tokens: Tokens, tape: Tape, rows: Int[np.ndarray, " batch"], length: int) -> Batch:
    """Cuts rows from a tape that restarts at its end.

    Args:
      tokens: of all documents.
      tape: the tape.
      rows: numbers of the rows; row `r` begins at `r * length`.
      length: tokens to predict in each.

    Returns:
      `{"tokens": int32 [batch, length + 1], "reset": bool [batch, length]}`.
    """
    at = (rows[:, None] * length + np.arange(length + 1)) % tape.ends[-1]
    which = np.searchsorted(tape.ends, at, side="right")
    inside = at - tape.begins[which]
    cut = tokens.ids[tokens.starts[tape.documents[which]] + inside]
    return {"tokens": cut.astype(np.int32), "reset": inside[:, :-1] == 0}


def row_count(tokens: Tokens, length: int) -> int:
    """Counts the rows of an epoch.

    Args:
      tokens: all of them.
      length: tokens to predict in a row.

    Returns:
      The number of rows that hold every token.
    """
    return -(-int(tokens.starts[-1]) // length)


def _batches(tokens: Tokens, *, seed: int, batch_size: int, length: int) -> Callable[[int], Batch]:
    check_long_enough(tokens.ids[: tokens.end], length)
    rows = row_count(tokens, length)

    @lru_cache(maxsize=2)  # a batch may span two epochs
    def order(epoch: int) -> tuple[Tape, np.ndarray]:
        generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        tape = lay(tokens, generator.permutation(len(tokens.starts) - 1))
        return tape, generator.permutation(rows)

    def batch(step: int) -> Batch:
        epochs, places = np.divmod(step * batch_size + np.arange(batch_size), rows)
        parts = []
        for epoch in range(epochs[0], epochs[-1] + 1):
            tape, dealt = order(epoch)
            parts.append(cut_rows(tokens, tape, dealt[places[epochs == epoch]], length))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return batch


def _held_out(tokens: Tokens, *, count: int, length: int) -> Batch:
    begins = np.zeros(len(tokens.ids), bool)
    begins[tokens.starts[:-1]] = True
    cut = evenly_spaced(np.arange(tokens.end), count=count, length=length)
    return {"tokens": tokens.ids[cut].astype(np.int32), "reset": begins[cut[:, :-1]]}


# Every token once an epoch, and documents that do not see each other.
PACKED = Sampler(_batches, _held_out)
