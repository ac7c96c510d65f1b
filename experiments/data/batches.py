"""Batches that are fetched ahead and whose position can be saved, by Grain.

Grain gives what is hard to get right: a bounded queue, an exception that reaches the
consumer after the batches before it, a thread that ends, and a position that counts
what was *returned* and not what was fetched.
"""

from collections.abc import Callable
from typing import Any

import grain

from experiments.task import Batches

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
    return grain.experimental.ThreadPrefetchDatasetIterator(batches, prefetch)
