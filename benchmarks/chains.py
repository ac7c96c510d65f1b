"""Times operations of microseconds on a device: several in one call, on rotated inputs.

A kernel of 20 microseconds is shorter than the call that starts it. One compiled call therefore
holds the operation several times, one after the other, each on its own inputs. The start is paid
once, and inputs that would fit a cache have left it when their turn comes again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.contest.timing import Prepared, Timing, measure

CACHE_BYTES = 64 << 20  # above the 50 MB of an H100's L2
MOST_SETS = 16


def sets_needed(set_bytes: int) -> int:
    """Computes how many sets of inputs keep the next one out of a cache.

    Args:
      set_bytes: of one set, results included.

    Returns:
      At least 1, at most `MOST_SETS`.
    """
    return int(min(MOST_SETS, max(1, -(-4 * CACHE_BYTES // max(1, set_bytes)))))


def chained(
    function: Callable[..., Any], count: int, trim: Callable[[Any], Any] = lambda result: result
) -> Callable[..., list[Any]]:
    """Chains the operation on several sets of arguments, one after the other.

    Args:
      function: of `(shared, first, *rest)`.
      count: number of sets.
      trim: applied to every result but the last; parts that it drops are not computed.

    Returns:
      A function of `(shared, sets)` that returns every result.
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


def milliseconds(call: Callable[[], Any], *, repeats: int = 1) -> Timing:
    """Times a call that may return before its work is done.

    Args:
      call: starts the work and returns arrays; compiled already.
      repeats: operations in a call.

    Returns:
      Milliseconds of one operation.
    """
    call_s = measure({"": Prepared(call, 0.0)}, least=3, sample_s=5e-3, budget_s=1.5)[""]
    scale = 1e3 / repeats
    return call_s._replace(
        median=scale * call_s.median, low=scale * call_s.low, high=scale * call_s.high
    )


def copy_gb_s(array_bytes: int) -> float:
    """Measures the bandwidth of a copy, bytes read and written together.

    Args:
      array_bytes: of the copied array; much larger than every cache.

    Returns:
      GB/s.
    """
    x = jnp.zeros(array_bytes // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1.0)
    jax.block_until_ready(add(x))
    return 2e-6 * x.nbytes / milliseconds(lambda: add(x)).median


def call_us() -> float:
    """Measures the microseconds of an empty call: the overhead of every call.

    Returns:
      The median.
    """
    x, add = jnp.zeros(()), jax.jit(lambda x: x + 1.0)
    jax.block_until_ready(add(x))
    return 1e3 * milliseconds(lambda: add(x)).median
