"""Batches from a stream of documents that does not fit into memory.

The stream is packed as `packing` packs a tape: end to end, cut into rows of `length + 1`
tokens of which neighbours share one. Its end is unknown, so rows are shuffled within blocks of
steps. A position is the document in which the block begins, the token in it, and the step within
the block. It is small and exact.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np

from experiments.data.corpus import Batch
from experiments.data.tokens import Tokenizer, as_stored


class Documents(Protocol):
    """An endless iterator over documents whose position can be saved.

    As with batches, the state describes the position after the last document returned.
    """

    def __next__(self) -> bytes: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any], /) -> None: ...


class _Block(NamedTuple):
    """Tokens of a block of steps, one more than they predict, and where documents begin in them."""

    ids: np.ndarray
    begins: np.ndarray
    order: np.ndarray  # of its rows
    following: dict[str, Any]  # where the next block begins


class StreamBatches:
    """Packed batches of a stream; Grain's protocol.

    Args:
      documents: to train on.
      tokenizer: encodes them.
      seed: of the order of the rows.
      rows: in a batch.
      length: tokens to predict in a row.
      block: steps whose rows are shuffled together.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        *,
        seed: int,
        rows: int,
        length: int,
        block: int,
    ):
        for name, value in {"rows": rows, "length": length, "block": block}.items():
            if value < 1:
                raise ValueError(f"{name}={value}: give at least 1")
        self._documents = documents
        self._tokenizer = tokenizer
        self._seed, self._rows, self._length, self._steps = seed, rows, length, block
        self._begin = {"document": documents.get_state(), "token": 0}
        self._number, self._step = 0, 0
        self._block: _Block | None = None
        # A block begins in the document in which the one before it ended.
        self._shared: np.ndarray | None = None
        self._closed = False

    def __iter__(self) -> "StreamBatches":
        return self

    def __next__(self) -> Batch:
        if self._block is not None and self._step == self._steps:
            self._begin = self._block.following
            self._number, self._step, self._block = self._number + 1, 0, None
        if self._block is None:
            self._block = self._read()
        block, first = self._block, self._step * self._rows
        rows = block.order[first : first + self._rows]
        at = rows[:, None] * self._length + np.arange(self._length + 1)
        self._step += 1
        return {"tokens": block.ids[at].astype(np.int32), "reset": block.begins[at[:, :-1]]}

    def get_state(self) -> dict[str, Any]:
        """The position after the last returned batch."""
        if self._block is not None and self._step == self._steps:
            return {"begin": self._block.following, "block": self._number + 1, "step": 0}
        return {"begin": self._begin, "block": self._number, "step": self._step}

    def set_state(self, state: dict[str, Any], /) -> None:
        """Moves to a position from `get_state`."""
        self._begin, self._number, self._step = state["begin"], state["block"], state["step"]
        self._documents.set_state(self._begin["document"])
        self._block = self._shared = None

    def close(self) -> None:
        """Stops reading, also in the middle of a block and from another thread."""
        self._closed = True

    def _read(self) -> _Block:
        rows = self._steps * self._rows
        needed = rows * self._length + 1
        parts, begins, have, skipped = [], np.zeros(needed, bool), 0, self._begin["token"]
        before = self._begin["document"]
        while have < needed:
            if self._closed:
                raise RuntimeError("these batches are closed: make new ones")
            if self._shared is None:
                before = self._documents.get_state()
                self._shared = self._encode(next(self._documents))
            if not skipped:
                begins[have] = True
            parts.append(self._shared[skipped:])
            have += len(parts[-1])
            if have < needed:
                self._shared, skipped = None, 0
        # The last token is predicted here and read by the next block.
        token = skipped + len(parts[-1]) - (have - needed) - 1
        generator = np.random.Generator(np.random.Philox(key=[self._seed, self._number]))
        return _Block(
            np.concatenate(parts)[:needed],
            begins,
            generator.permutation(rows),
            {"document": before, "token": token},
        )

    def _encode(self, document: bytes) -> np.ndarray:
        parts = (self._tokenizer.encode(document), self._tokenizer.separator)
        return np.concatenate([as_stored(part, self._tokenizer) for part in parts])
