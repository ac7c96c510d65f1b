"""The rule of `jp.auto`: a map of measurements, looked up at the nearest point.

`choice_<platform>_jax<version>.json` holds, for block size, length, size of the state and width
of the inputs, how much faster than `lax.scan` (forward and backward, with its own derivative) each
path was; `python -m experiments.fit_choice` measures it again on another machine.
"""

import functools
import importlib.resources
import json
import math
import re
from typing import Any

from jaxpara import compat
from jaxpara.recurrence.solve.records import FUSED, SEQUENTIAL, SHOOTING
from jaxpara.recurrence.system import Solver

# What a point of the map can name, besides plain `lax.scan`.
PATHS = {"implicit": SEQUENTIAL, "shooting": SHOOTING, "fused": FUSED}

# A path is taken if it gained at least this much: smaller gains are within noise.
_WORTH = 1.1

# Without a map: on an accelerator every step of lax.scan costs a launch of its own, so
# a recurrence with small blocks is solved in parallel as soon as it is long, and in one
# kernel where a kernel takes its step, unless it is as short as when a model decodes.
_LONG = 256
_SHORT = 8
_SMALL_BLOCK = 8


def pick(
    platform: str,
    *,
    steps: int,
    elements: int,
    block: int,
    inputs: float = 1,
    kernel: bool = False,
) -> tuple[Solver | None, str]:
    """The path for a call, and why.

    Args:
      platform: "cpu", "gpu" or "tpu".
      steps: length of the recurrence.
      elements: floating elements of the carry, batch included.
      block: largest block of the Jacobian.
      inputs: width of the widest input, in widths of the widest leaf of the carry; at least 1.
      kernel: whether a kernel takes the step.

    Returns:
      A solver, or None for plain `lax.scan`; and the reason, in words.
    """
    measured = _map(platform)
    if measured is None:
        if platform != "cpu" and kernel and steps >= _SHORT:
            return PATHS["fused"], f"one kernel on a {platform} (a guess: not measured)"
        if platform != "cpu" and steps >= _LONG and block <= _SMALL_BLOCK:
            return PATHS["shooting"], f"{steps} steps on a {platform} (a guess: not measured)"
        return PATHS["implicit"], f"the default on a {platform} (a guess: not measured)"
    distance = functools.partial(
        _distance, steps=steps, elements=elements, block=block, inputs=inputs
    )
    # Of points as near, the least gain: a batch of 8 x 32 and one of 1 x 256 have one place.
    point = min(measured["points"], key=lambda p: (distance(p), _best(p, kernel)[1]))
    name, gain = _best(point, kernel)
    where = (
        f"{gain:.3g} times as fast as lax.scan with its own derivative, measured at "
        f"block {point['block']}, {point['steps']} steps, {point['elements']} elements and inputs "
        f"{point['inputs']:g} times as wide as the state, on {measured['device']} "
        f"with JAX {measured['jax']}"
    )
    if gain < _WORTH:
        return None, f"{PATHS[name].name} is only {where}"
    return PATHS[name], where


def _best(point: dict[str, Any], kernel: bool) -> tuple[str, float]:
    """Its fastest path and the gain; without the kernel where that does not take the step."""
    gains = {name: gain for name, gain in point["speedup"].items() if kernel or name != "fused"}
    return max(gains.items(), key=lambda item: item[1])


def _distance(
    point: dict[str, Any], *, steps: int, elements: int, block: int, inputs: float
) -> float:
    """Distance in doublings; what changes the kind of work counts most.

    That is the block size, and whether a step cuts its gates out of one wide input: the gradient
    of a cut is padded to the whole input.
    """
    return (
        abs(math.log2(point["steps"] / max(1, steps)))
        + abs(math.log2(point["elements"] / max(1, elements)))
        + 4 * abs(math.log2(point["block"] / max(1, block)))
        + 4 * abs(math.log2(point["inputs"] / inputs))
    )


@functools.cache
def _map(platform: str) -> dict[str, Any] | None:
    """The map of the newest JAX that is not newer than this one, else of the oldest."""
    pattern = re.compile(rf"choice_{platform}_jax(\d+)\.(\d+)\.json")
    maps = {}
    for file in importlib.resources.files("jaxpara.recurrence").iterdir():
        if named := pattern.fullmatch(file.name):
            maps[int(named[1]), int(named[2])] = file
    if not maps:
        return None
    older = [version for version in maps if version <= compat.RELEASE]
    file = maps[max(older) if older else min(maps)]
    return json.loads(file.read_text(encoding="utf-8"))
