"""Timing on a device: compiled apart, warmed up, blocked, inputs rotated, median and quartiles.

A kernel of 20 microseconds is shorter than the call that starts it. So one compiled call holds the
operation several times, each on its own inputs and each after the one before: the start is paid
once, and inputs that would fit a cache are not there when their turn comes again.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CACHE_BYTES = 64 << 20  # above the 50 MB of an H100's L2
MOST_SETS = 16


class Timing(NamedTuple):
    """Milliseconds of one operation.

    Attributes:
      median: of the samples.
      low: first quartile.
      high: third quartile.
      samples: their number.
    """

    median: float
    low: float
    high: float
    samples: int


def sets_needed(set_bytes: int) -> int:
    """How many sets of inputs keep a cache from holding the one whose turn it is.

    Args:
      set_bytes: of one set, results included.

    Returns:
      At least 1, at most `MOST_SETS`.
    """
    return int(min(MOST_SETS, max(1, -(-4 * CACHE_BYTES // max(1, set_bytes)))))


def chained(
    function: Callable[..., Any], count: int, trim: Callable[[Any], Any] = lambda result: result
) -> Callable[..., list[Any]]:
    """The operation on several sets of arguments, one after the other.

    Args:
      function: of `(shared, first, *rest)`.
      count: number of sets.
      trim: of every result but the last; what it leaves out is not computed.

    Returns:
      A function of `(shared, sets)` that gives every result.
    """
    once = jax.jit(function)  # traced and lowered once, called `count` times

    def run(shared: Any, sets: Sequence[Sequence[Any]]) -> list[Any]:
        results: list[Any] = []
        for first, *rest in sets[:count]:
            if results:
                # Without it a graph of independent kernels may overlap them.
                first, _ = jax.lax.optimization_barrier((first, results[-1]))
                results[-1] = trim(results[-1])
            results.append(once(shared, first, *rest))
        return results

    return run


def measure(
    call: Callable[[], Any],
    *,
    repeats: int = 1,
    samples: int = 15,
    sample_s: float = 5e-3,
    budget_s: float = 1.5,
) -> Timing:
    """Times a call that returns before its work is done.

    Args:
      call: starts the work and returns arrays; compiled already.
      repeats: operations in a call.
      samples: how often to look at the clock; fewer, but at least 3, when the budget runs out.
      sample_s: seconds that a sample should take at least.
      budget_s: seconds for all of them.

    Returns:
      Milliseconds of one operation.
    """
    once = _seconds(call, 1)
    if once < budget_s / 5:  # the first one also warms up
        once = min(once, _seconds(call, 1))
    calls = max(1, min(1000, round(sample_s / max(once, 1e-7))))
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < samples and (len(taken) < 3 or time.perf_counter() - began < budget_s):
        taken.append(1e3 * _seconds(call, calls) / (calls * repeats))
    return Timing(*(float(np.quantile(taken, q)) for q in (0.5, 0.25, 0.75)), len(taken))


def _seconds(call: Callable[[], Any], calls: int) -> float:
    out = None
    began = time.perf_counter()
    for _ in range(calls):
        del out  # its memory serves the next call, which runs behind it on the device
        out = call()
    jax.block_until_ready(out)
    return time.perf_counter() - began


def copy_gb_s(array_bytes: int) -> float:
    """Measured bandwidth of a copy, bytes read and written together.

    Args:
      array_bytes: of the array that is copied; large against every cache.

    Returns:
      GB/s.
    """
    x = jnp.zeros(array_bytes // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1.0)
    jax.block_until_ready(add(x))
    return 2e-6 * x.nbytes / measure(lambda: add(x)).median


def call_us() -> float:
    """Microseconds of a call that does nothing: what every single call pays.

    Returns:
      The median.
    """
    x, add = jnp.zeros(()), jax.jit(lambda x: x + 1.0)
    jax.block_until_ready(add(x))
    return 1e3 * measure(lambda: add(x)).median
