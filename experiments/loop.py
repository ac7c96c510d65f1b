"""The training loop: dispatch step t, read the numbers of step t - 1, look up now and then.

Everything it needs is an argument; it knows no config. Reading one step late keeps
the device busy while Python books the last result.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from experiments.progress import Progress, Status
from experiments.runs import RunError
from experiments.speed import Speedometer
from jaxpara.types import Params, Step, TrainState


class Diverged(RunError):
    """The loss is not finite."""


class Row(NamedTuple):
    """What was measured since the last row.

    Attributes:
      step: steps done.
      seconds: since the start, compilation and evaluations included.
      loss: mean training loss in nats per token since the last row; NaN before the first step.
      tokens_per_second: since the last row, compilation and evaluations not counted.
      gradient_norm: of the last step, before clipping; None where the step gives none.
    """

    step: int
    seconds: float
    loss: float
    tokens_per_second: float
    gradient_norm: float | None


class Ending(NamedTuple):
    """How a run ended.

    Attributes:
      state: the last training state.
      interrupted: whether it was stopped by hand.
      seconds: of the whole loop.
      tokens_per_second: of training alone, from the second step on.
    """

    state: TrainState
    interrupted: bool
    seconds: float
    tokens_per_second: float


def run_loop(
    *,
    state: TrainState,
    step: Step,
    batches: Callable[[int], Any],
    steps: int,
    tokens_per_step: int,
    log_every: int,
    eval_every: int,
    write_row: Callable[[Row], None],
    look_up: Callable[[int, Params], None],
    progress: Progress,
    interrupted: Callable[[], bool],
) -> Ending:
    """Trains for a number of steps.

    Args:
      state: to begin with; its buffers are given away.
      step: one training step; its metrics hold `loss` in nats per token.
      batches: `step number -> batch`, a pure function.
      steps: how many.
      tokens_per_step: predicted tokens in a batch.
      log_every: steps between two rows.
      eval_every: steps between two evaluations; the first and the last step have one too.
      write_row: takes each row.
      look_up: evaluates parameters after so many steps; its time is not training time.
      progress: shows every step.
      interrupted: says whether to stop after this step.

    Returns:
      The ending.

    Raises:
      Diverged: the loss became NaN or infinite.
    """
    began = time.perf_counter()
    last_finite: tuple[int, float] | None = None
    losses: list[float] = []
    speed = Speedometer(tokens_per_step)

    def book(number: int, metrics: dict[str, jax.Array]) -> None:
        nonlocal last_finite
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            before = "no step before it had a finite one"
            if last_finite is not None:
                before = f"the last finite loss was {last_finite[1]:.4f} at step {last_finite[0]}"
            raise Diverged(
                f"the loss is {loss} at step {number} of {steps}; {before}. "
                "Try a lower optim.learning_rate, or more optim.warmup"
            )
        last_finite = (number, loss)
        losses.append(loss)
        speed.tick()
        progress.update(
            Status(
                step=number,
                steps=steps,
                loss=loss,
                bits_per_byte=loss / math.log(2),
                tokens_per_second=speed.lately(),
                seconds_left=speed.seconds_for(steps - number),
            )
        )
        if number % log_every == 0 or number == steps:
            norm = metrics.get("grad_norm")
            write_row(
                Row(
                    step=number,
                    seconds=time.perf_counter() - began,
                    loss=sum(losses) / len(losses),
                    tokens_per_second=speed.since_mark(),
                    gradient_norm=None if norm is None else float(norm),
                )
            )
            losses.clear()
            speed.mark()

    # Evaluating before the first step finds what does not fit before minutes are spent.
    look_up(0, state.params)
    pending: tuple[int, dict[str, jax.Array]] | None = None
    stop = False
    for number in range(1, steps + 1):
        state, metrics = step(state, batches(number - 1))
        if pending is not None:
            book(*pending)
        pending = (number, metrics)
        stop = interrupted()
        if stop or number % eval_every == 0 or number == steps:
            book(*pending)
            pending = None
            if stop:
                break
            with speed.paused():
                look_up(number, state.params)
    return Ending(state, stop, time.perf_counter() - began, speed.overall())
