"""Tokens per second of training only: compilation and evaluations stop the watch."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Speedometer:
    """Counts steps against a clock that can be paused.

    The first step compiles; it starts the watch and is not counted.

    Args:
      tokens_per_step: tokens that one step predicts.
      clock: seconds, increasing.
      before: steps counted and their seconds before an interruption; `overall` includes them.
    """

    def __init__(
        self,
        tokens_per_step: int,
        clock: Callable[[], float] = time.perf_counter,
        before: tuple[int, float] = (0, 0.0),
    ):
        self._tokens = tokens_per_step
        self._before = before
        self._clock = clock
        self._away = 0.0
        self._ticks: list[float] = []
        self._mark = 0

    def _now(self) -> float:
        return self._clock() - self._away

    def tick(self) -> None:
        """Counts one finished step."""
        self._ticks.append(self._now())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside the context does not count."""
        left = self._clock()
        try:
            yield
        finally:
            self._away += self._clock() - left

    def mark(self) -> None:
        """Starts a new interval for `since_mark`."""
        self._mark = max(len(self._ticks) - 1, 0)

    def _between(self, first: int) -> float:
        steps = len(self._ticks) - 1 - first
        if steps < 1:
            return 0.0
        return self._tokens * steps / max(self._ticks[-1] - self._ticks[first], 1e-9)

    def lately(self) -> float:
        """Speed over the last twenty steps; 0 until two are done.

        Returns:
          Tokens per second.
        """
        return self._between(max(len(self._ticks) - 21, 0))

    def seconds_for(self, steps: int) -> float:
        """Time for a number of steps at the speed of `lately`; infinite until that is known.

        Args:
          steps: how many.

        Returns:
          Seconds.
        """
        speed = self.lately()
        return steps * self._tokens / speed if speed else math.inf

    def since_mark(self) -> float:
        """Speed since `mark`; 0 until two steps are done.

        Returns:
          Tokens per second.
        """
        return self._between(self._mark)

    def timed(self) -> tuple[int, float]:
        """The value of `before` for a run that continues.

        Returns:
          Steps counted so far and the seconds they took.
        """
        steps, seconds = self._before
        if len(self._ticks) > 1:
            steps, seconds = (
                steps + len(self._ticks) - 1,
                seconds + self._ticks[-1] - self._ticks[0],
            )
        return steps, seconds

    def overall(self) -> float:
        """Speed since the first step, before an interruption too; 0 until two are done.

        Returns:
          Tokens per second.
        """
        steps, seconds = self.timed()
        return self._tokens * steps / max(seconds, 1e-9)
