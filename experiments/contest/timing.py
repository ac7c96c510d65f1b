"""Reliable timing: compiled first, warmed up, interleaved, blocked, with its spread.

All rivals of a comparison run in the same process, in turn, in an order that changes every round.
Disturbances of the machine then affect all of them, and ratios of medians are meaningful.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Prepared(NamedTuple):
    """A call without arguments.

    Attributes:
      call: runs once and returns the result; the timing waits for the device.
      compile_s: seconds of tracing and compiling, not included in any timing.
    """

    call: Callable[[], Any]
    compile_s: float


class Timing(NamedTuple):
    """Seconds for one call.

    Attributes:
      median: of the rounds.
      low: first quartile.
      high: third quartile.
      rounds: number of rounds.
      compile_s: seconds to trace and compile, not included.
    """

    median: float
    low: float
    high: float
    rounds: int
    compile_s: float


def prepare(function: Callable[..., Any], *arguments: Any) -> Prepared:
    """Compiles a JAX function for its arguments.

    Args:
      function: traced and compiled by `jax.jit`.
      arguments: its arguments; they stay on the device.

    Returns:
      The compiled call, and how long compiling took.
    """
    arguments = jax.block_until_ready(jax.device_put(arguments))
    compiled = jax.jit(function)

    def call():
        return jax.block_until_ready(compiled(*arguments))

    first, second = _clock(call, 1), _clock(call, 1)
    return Prepared(call, max(first - second, 0.0))


def measure(
    calls: Mapping[str, Prepared],
    *,
    rounds: int = 15,
    least: int = 5,
    sample_s: float = 2e-3,
    budget_s: float = 10.0,
    seed: int = 0,
) -> dict[str, Timing]:
    """Times every call in every round.

    A sample repeats a call until it takes about `sample_s`, so that the clock and the
    scheduler matter little, and waits for the device once, at its end.

    Args:
      calls: name -> call, as from `prepare`.
      rounds: how often each is sampled.
      least: the fewest rounds when the budget runs out.
      sample_s: the least seconds of a sample.
      budget_s: seconds for all calls together, after the warm-up.
      seed: of the order within the rounds.

    Returns:
      name -> its timing.

    Raises:
      ValueError: fewer than 3 rounds, which give no spread.
    """
    if rounds < 3:
        raise ValueError(f"rounds={rounds} gives no spread; expected 3 or more.")
    repeats = {}
    for name, prepared in calls.items():
        # The first is the warm-up: allocations, first touch, lazy initialisation.
        once = _clock(prepared.call, 1)
        if once < budget_s / 5:
            once = min(_clock(prepared.call, 1) for _ in range(2))
        repeats[name] = max(1, min(1000, round(sample_s / max(once, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), np.random.default_rng(seed)
    began = time.perf_counter()
    for n in range(rounds):
        if n >= min(least, rounds) and time.perf_counter() - began > budget_s:
            break
        shuffle.shuffle(order)
        for name in order:
            samples[name].append(_clock(calls[name].call, repeats[name]))
    return {
        name: Timing(
            *(float(np.quantile(seconds, q)) for q in (0.5, 0.25, 0.75)),
            rounds=len(seconds),
            compile_s=calls[name].compile_s,
        )
        for name, seconds in samples.items()
    }


def _clock(call: Callable[[], Any], repeats: int) -> float:
    out = None
    began = time.perf_counter()
    for _ in range(repeats):
        del out  # its memory is for the next call, which runs after it on a device
        out = call()
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / repeats


def prepare_copy(total_bytes: int) -> Prepared:
    """Makes a call that moves a number of bytes: half are read, half are written.

    Timed beside the rivals, it is their floor: on this device, code that reads its inputs and
    writes its results once cannot be faster at this size.

    Args:
      total_bytes: read and written together.

    Returns:
      The compiled call.
    """
    count = max(total_bytes // 8, 1)
    return prepare(lambda x: x + 1.0, jnp.zeros(count, jnp.float32))


def largest_error(got: Any, wanted: Any, *, relative: bool = False) -> float:
    """Computes the largest deviation of two trees of arrays; infinite for a NaN on one side only.

    Args:
      got: a tree of arrays.
      wanted: the expected tree.
      relative: divide each leaf's error by the leaf's largest entry (or by 1e-6).

    Returns:
      The maximum over leaves; 0 for trees without entries.
    """
    worst = 0.0
    pairs: Sequence[tuple[Any, Any]] = list(
        zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    )
    for a, b in pairs:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if a.size == 0:
            continue
        # inf - inf is nan, and so are equal NaNs: equal entries of any kind are no error
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        with np.errstate(invalid="ignore"):
            gap = np.where(same, 0.0, np.abs(a - b))
        gap = np.where(np.isnan(gap), np.inf, gap)
        size = np.max(np.abs(b[np.isfinite(b)]), initial=1e-6) if relative else 1.0
        worst = max(worst, float(np.max(gap) / size))
    return worst
