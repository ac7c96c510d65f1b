"""Batches that are fetched ahead and whose position can be saved, by Grain.

Grain gives what is hard to get right: a bounded queue, an exception that reaches the
consumer after the batches before it, a thread that ends, and a position that counts
what was *returned* and not what was fetched.
"""

from collections.abc import Callable, Mapping
from typing import Any

import grain

from experiments.run.folders import RunError
from experiments.run.task import Batches

# "Without end" for Grain, which wants a length: no run has that many steps.
ENDLESS = 2**62


class _Steps:
    """A pure function of the step as the random-access source that Grain reads."""

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
    """Batches that are a function of their number; the position is that number.

    Args:
      batch: `number -> batch`, pure. Called from another thread where `prefetch` is positive.
      prefetch: batches made ahead in one thread; 0 makes each when it is asked for.

    Returns:
      The iterator; `close()` ends its thread.

    Raises:
      ValueError: `prefetch` is negative.
    """
    _check(prefetch)
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(_Steps(batch)).to_iter_dataset(options))


class _Ahead(grain.experimental.ThreadPrefetchDatasetIterator):
    """Grain waits for the batch in the making; what makes it is told first that nobody wants it."""

    def __init__(self, batches: Batches, prefetch: int):
        super().__init__(batches, prefetch)
        self._source = batches

    def close(self) -> None:
        getattr(self._source, "close", lambda: None)()
        super().close()


def ahead(batches: Batches, *, prefetch: int = 2) -> Batches:
    """Any batches, fetched ahead.

    Args:
      batches: used from another thread from now on.
      prefetch: batches fetched ahead in one thread; 0 fetches each when it is asked for.

    Returns:
      The iterator; `close()` ends its thread. Its state is that of `batches` after the
      batch that was returned last.

    Raises:
      ValueError: `prefetch` is negative.
    """
    _check(prefetch)
    return _Ahead(batches, prefetch)


class _OnlyFor:
    """Batches whose position says what it is a position in."""

    def __init__(self, batches: Batches, about: Mapping[str, Any]):
        self._batches, self._about = batches, dict(about)

    def __iter__(self) -> "_OnlyFor":
        return self

    def __next__(self) -> Any:
        try:
            return next(self._batches)
        except (ValueError, OSError, EOFError) as error:  # of a file that is read as we go
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
    """Batches that refuse a position in other data, where it would mean other batches.

    Args:
      batches: whose positions are marked.
      about: what the order of the batches depends on, JSON-able; saved with each position.

    Returns:
      The iterator. Its `set_state` raises `RunError` where a value is not the saved one.
    """
    return _OnlyFor(batches, about)
