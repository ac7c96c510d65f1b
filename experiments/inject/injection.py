"""Runs to inject faults into, and judgements of the outcome; for `experiments.faults`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.run import checkpoints, folders, seals
from jaxpara.types import TrainState

OPTIMIZER = optax.adam(0.1)
LONGEST = 3  # the most lines of a message


class Event(NamedTuple):
    """The outcome of one fault.

    Attributes:
      what: the fault.
      end: "refused", "survived" or "wrong".
      said: the message, or what was wrong.
    """

    what: str
    end: str
    said: str


def flip(path: Path, rng: np.random.Generator) -> None:
    """Flips one bit of a file.

    Args:
      path: of a file that is not empty.
      rng: chooses the bit.
    """
    content = bytearray(path.read_bytes())
    bit = int(rng.integers(8 * len(content)))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def judge(what: str, action: Callable[[], Any], right: Callable[[Any], bool]) -> Event:
    """Runs a program with a fault and judges the outcome.

    Args:
      what: the fault.
      action: the program.
      right: whether its result is as without the fault; always false if the fault must be
        refused.

    Returns:
      The event.
    """
    try:
        found = action()
    except folders.RunError as error:
        lines = str(error).count("\n") + 1
        return Event(what, "refused" if lines <= LONGEST else "wrong", str(error))
    except Exception as error:  # nobody should see a traceback
        return Event(what, "wrong", f"{type(error).__name__}: {error}")
    return Event(what, "survived", "") if right(found) else Event(what, "wrong", "accepted")


def state_after(step: int) -> TrainState:
    """Makes the training state of a step.

    Args:
      step: any step.

    Returns:
      The state: every number depends on the step.
    """
    rng = np.random.default_rng(step)
    params = {
        "kernel": jnp.asarray(rng.normal(size=(16, 24)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=24), jnp.bfloat16),
    }
    return TrainState(params, OPTIMIZER.init(params), jnp.int32(step), jax.random.key(step))


def save_steps(folder: Path, steps: int) -> None:
    """Writes a checkpoint after each step.

    Args:
      folder: of the run.
      steps: how many.
    """
    with checkpoints.saver(folder, keep_last=9, keep_best=0, best=("loss", "min")) as save:
        for step in range(1, steps + 1):
            save(state_after(step), {"data": {"position": step}}, None)


def is_right(found: tuple[TrainState, dict[str, Any]]) -> bool:
    """Whether a state is what was saved, bit for bit.

    Args:
      found: from `checkpoints.restore_newest`.

    Returns:
      True if it is.
    """
    state, run = found
    step = int(state.step)
    wanted = state_after(step)
    pairs = zip(
        *(seals.of_arrays(s._replace(key=jax.random.key_data(s.key))).items()
          for s in (state, wanted)),
        strict=True,
    )  # fmt: skip
    return all(a == b for a, b in pairs) and run["data"] == {"position": step}


def restore(folder: Path) -> tuple[TrainState, dict[str, Any]]:
    """Reads the newest intact checkpoint.

    Args:
      folder: of the run.

    Returns:
      As `checkpoints.restore_newest`.
    """
    return checkpoints.restore_newest(folder, jax.eval_shape(lambda: state_after(0)))
