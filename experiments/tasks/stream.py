"""Batches that are a pure function of their number, as an iterator with a position."""

from collections.abc import Callable
from typing import Any


class Stream:
    """Batch 0, 1, 2, ... of a function; its position is the number of the next one.

    It has Grain's protocol, see `experiments.task.Batches`.
    """

    def __init__(self, draw: Callable[[int], Any]):
        """Starts before batch 0.

        Args:
          draw: `number -> batch`, pure.
        """
        self._draw = draw
        self._next = 0

    def __next__(self) -> Any:
        batch = self._draw(self._next)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch returned."""
        return {"next": self._next}

    def set_state(self, state: dict[str, Any], /) -> None:
        """Goes on from a saved position."""
        self._next = int(state["next"])
