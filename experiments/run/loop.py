"""The training loop: dispatch step t, read the numbers of step t - 1, evaluate and save when due.

Everything it needs is an argument; it knows no config and no file. Reading one step late
keeps the device busy while Python handles the last result.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.run.folders import RunError
from experiments.run.progress import Progress, Status
from experiments.run.speed import Speedometer
from experiments.run.task import Batches
from jaxpara.types import Params, Step, TrainState

# Metrics of a step that have their own field in a row.
OWN = ("loss", "grad_norm")


class Diverged(RunError):
    """The loss is not finite."""


class Row(NamedTuple):
    """The measurements since the last row.

    Attributes:
      step: steps done.
      seconds: since the start, compilation and evaluations included.
      loss: mean training loss in nats per token since the last row.
      tokens_per_second: since the last row, compilation and evaluations not counted.
      gradient_norm: of the last step, before clipping; None if the step gives none.
      others: means of the other scalars among the step's metrics, by name.
    """

    step: int
    seconds: float
    loss: float
    tokens_per_second: float
    gradient_norm: float | None
    others: Mapping[str, float]


class Memory(NamedTuple):
    """The state of the loop besides the training state; a run that continues starts from it.

    Attributes:
      losses: of the steps since the last row.
      seconds: since the start of the run.
      timed: the number of timed steps, and the seconds they took together.
      enough: whether the task is solved, so that no further step is due.
      others: the other metrics of the steps since the last row, by name.
    """

    losses: Sequence[float] = ()
    seconds: float = 0.0
    timed: tuple[int, float] = (0, 0.0)
    enough: bool = False
    others: Mapping[str, Sequence[float]] = MappingProxyType({})


class Pace(NamedTuple):
    """How many steps a run takes, and when to log, evaluate and save.

    Attributes:
      steps: how many in all.
      tokens_per_step: predicted tokens in a batch.
      log_every: steps between two rows.
      eval_every: steps between two evaluations; a new run is also evaluated before its first
        step, and every run after its last.
      save_every: steps between two checkpoints; the last step is saved too.
      bytes_per_token: of text, to show bits per byte; None shows only the loss.
    """

    steps: int
    tokens_per_step: int
    log_every: int
    eval_every: int
    save_every: int
    bytes_per_token: float | None = None


class Hooks(NamedTuple):
    """The functions that the loop calls.

    Attributes:
      write_row: takes each row.
      look_up: evaluates parameters after a number of steps; its time is not training time.
      save: takes the state after a step, the loop's memory, and the figures of that step if it
        was evaluated. The state must be copied before it returns.
      seconds: since the start of the run, including the time before an interruption.
      progress: shows every step.
      stopped: says whether to stop after this step.
      solved: says whether the figures of an evaluation solve the task.
    """

    write_row: Callable[[Row], None]
    look_up: Callable[[int, Params], dict[str, float]]
    save: Callable[[TrainState, Memory, dict[str, float] | None], None]
    seconds: Callable[[], float]
    progress: Progress
    stopped: Callable[[], Any]
    solved: Callable[[dict[str, float]], bool] | None = None


class Ending(NamedTuple):
    """How a run ended.

    Attributes:
      state: the last training state.
      stopped: whether it was stopped from outside.
      seconds: since the start of the run.
      tokens_per_second: of training only, without compilation and evaluations.
    """

    state: TrainState
    stopped: bool
    seconds: float
    tokens_per_second: float


def run_loop(
    state: TrainState,
    step: Step,
    batches: Batches,
    pace: Pace,
    hooks: Hooks,
    *,
    begin: int = 0,
    memory: Memory = Memory(),  # noqa: B008 (immutable)
) -> Ending:
    """Trains up to a number of steps.

    Args:
      state: to start from; its buffers are donated.
      step: one training step; its metrics hold `loss` in nats per token, and further values for
        the rows.
      batches: from the position that belongs to the state.
      pace: the numbers of steps.
      hooks: the functions to call.
      begin: steps done already; `state`, `batches` and `memory` are from that point.
      memory: as `hooks.save` was given it then.

    Returns:
      The ending.

    Raises:
      Diverged: the loss is not finite, or the gradient of a state to be evaluated or saved.
    """
    last_finite: tuple[int, float] | None = None
    steps = pace.steps
    losses = list(memory.losses)
    others = {name: list(values) for name, values in memory.others.items()}
    speed = Speedometer(pace.tokens_per_step, before=memory.timed)

    def refuse(what: str, number: int) -> Diverged:
        before = "no earlier step had a finite one"
        if last_finite is not None:
            before = f"the last finite loss was {last_finite[1]:.4f} at step {last_finite[0]}"
        return Diverged(
            f"{what} at step {number} of {steps}; {before}. "
            "Try a lower optim.learning_rate, or more optim.warmup"
        )

    def book(number: int, metrics: dict[str, jax.Array]) -> None:
        nonlocal last_finite
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            raise refuse(f"the loss is {loss}", number)
        last_finite = (number, loss)
        losses.append(loss)
        for name, value in metrics.items():
            if name not in OWN and jnp.ndim(value) == 0:
                others.setdefault(name, []).append(float(value))
        speed.tick()
        bits = pace.bytes_per_token and loss / math.log(2) / pace.bytes_per_token
        hooks.progress.update(
            Status(
                step=number,
                steps=steps,
                loss=loss,
                bits_per_byte=bits,
                tokens_per_second=speed.lately(),
                seconds_left=speed.seconds_for(steps - number),
            )
        )
        if number % pace.log_every == 0 or number == steps:
            norm = metrics.get("grad_norm")
            hooks.write_row(
                Row(
                    step=number,
                    seconds=hooks.seconds(),
                    loss=sum(losses) / len(losses),
                    tokens_per_second=speed.since_mark(),
                    gradient_norm=None if norm is None else float(norm),
                    others={name: sum(v) / len(v) for name, v in others.items()},
                )
            )
            losses.clear()
            others.clear()
            speed.mark()

    # Evaluating before the first step finds settings that do not fit before minutes are spent.
    if begin == 0:
        hooks.look_up(0, state.params)
    pending: tuple[int, dict[str, jax.Array]] | None = None
    stop = False
    for number in range(begin + 1, 0 if memory.enough else steps + 1):
        try:
            batch = next(batches)
        except StopIteration:  # batches have no end, but a saved position may be anybody's
            raise RunError(
                f"there is no batch for step {number}: the position in the data is past its end. "
                "Start a new run"
            ) from None
        state, metrics = step(state, batch)
        if pending is not None:
            book(*pending)
        pending = (number, metrics)
        stop = bool(hooks.stopped())
        evaluated = number % pace.eval_every == 0 or number == steps
        saved = stop or number % pace.save_every == 0 or number == steps
        if not (evaluated or saved):
            continue
        book(*pending)
        pending = None
        norm = float(metrics.get("grad_norm", 0.0))
        if not math.isfinite(norm):  # the loss was finite, its gradient is not
            raise refuse(f"the gradient's norm is {norm}", number)
        with speed.paused():
            # Measurements due at this step are made before a stop too; a continued run would lack
            # them.
            figures = hooks.look_up(number, state.params) if evaluated else None
            enough = bool(figures is not None and hooks.solved and hooks.solved(figures))
            if saved or enough:
                rest = {name: tuple(values) for name, values in others.items()}
                kept = Memory(tuple(losses), hooks.seconds(), speed.timed(), enough, rest)
                hooks.save(state, kept, figures)
        if stop or enough:
            break
    return Ending(state, stop, hooks.seconds(), speed.overall())
