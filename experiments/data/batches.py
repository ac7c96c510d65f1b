"""Batches that are prefetched and whose position can be saved, by Grain.

Grain provides a bounded queue, an exception that reaches the consumer after the batches before
it, a thread that ends, and a position that counts *returned* batches, not fetched ones.
"""

from collections.abc import Callable, Mapping
from typing import Any

import grain

from experiments.run.folders import RunError
from experiments.run.task import Batches

# Endless for Grain, which needs a length: no run has that many steps.
ENDLESS = 2**62


class _Steps:
    """A pure function of the step as a random-access source for Grain."""

    def __init__(self, batch: Callable[[int], Any]):
        self._batch = batch

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, step: int) -> Any:
        return self._batch(step)


def _check(prefetch: int) -> None:
    if prefetch < 0:
        raise ValueError(f"prefetch={prefetch} batches: give 0 (none) or more")


def by_step(batch: Callable[[int], Any], *, prefetch: int = 2) -> Batches:
    """Makes batches that are a function of their number; the position is that number.

    Args:
      batch: `number -> batch`, pure. Called from another thread where `prefetch` is positive.
      prefetch: batches made ahead in one thread; 0 makes each on request.

    Returns:
      The iterator; `close()` ends its thread.

    Raises:
      ValueError: `prefetch` is negative.
    """
    _check(prefetch)
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(_Steps(batch)).to_iter_dataset(options))


class _Ahead(grain.experimental.ThreadPrefetchDatasetIterator):
    """Closes the source before Grain, which waits for the batch in progress."""

    def __init__(self, batches: Batches, prefetch: int):
        super().__init__(batches, prefetch)
        self._source = batches

    def close(self) -> None:
        getattr(self._source, "close", lambda: None)()
        super().close()


def ahead(batches: Batches, *, prefetch: int = 2) -> Batches:
    """Prefetches any batches.

    Args:
      batches: used from another thread from now on.
      prefetch: batches fetched ahead in one thread; 0 fetches each on request.

    Returns:
      The iterator; `close()` ends its thread. Its state is that of `batches` after the last
      returned batch.

    Raises:
      ValueError: `prefetch` is negative.
    """
    _check(prefetch)
    return _Ahead(batches, prefetch)


class _OnlyFor:
    """Batches whose position identifies their data."""

    def __init__(self, batches: Batches, about: Mapping[str, Any]):
        self._batches, self._about = batches, dict(about)

    def __iter__(self) -> "_OnlyFor":
        return self

    def __next__(self) -> Any:
        try:
            return next(self._batches)
        except (ValueError, OSError, EOFError) as error:  # of a file that is being streamed
            raise RunError(f"the data cannot be read: {error}") from error

    def get_state(self) -> dict[str, Any]:
        return {"position": self._batches.get_state(), "in": dict(self._about)}

    def set_state(self, state: dict[str, Any], /) -> None:
        saved = state["in"]
        changed = [
            f"{name} was {saved.get(name)!r} and is {value!r}"
            for name, value in self._about.items()
            if saved.get(name) != value
        ]
        if changed:
            raise RunError(
                f"the position in the data was saved for other data: {'; '.join(changed)}. "
                "Restore it to continue the run, or start a new one"
            )
        self._batches.set_state(state["position"])

    def close(self) -> None:
        getattr(self._batches, "close", lambda: None)()


def only_for(batches: Batches, about: Mapping[str, Any]) -> Batches:
    """Wraps batches so that they refuse a position in other data.

    Args:
      batches: the batches.
      about: what the order of the batches depends on, JSON-able; saved with each position.

    Returns:
      The iterator. Its `set_state` raises `RunError` if a value is not the saved one.
    """
    return _OnlyFor(batches, about)
