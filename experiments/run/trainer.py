"""One training run of any task: from objects and numbers to a full folder."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import optax

from experiments.run import (
    checkpoints,
    claim,
    disk,
    figures,
    folders,
    loggers,
    metrics,
    profiling,
    saved_values,
    seals,
    step_cost,
)
from experiments.run.loop import Diverged, Ending, Hooks, Memory, Pace, Row, run_loop
from experiments.run.progress import Progress, progress
from experiments.run.resuming import check_same, compared, cut_table
from experiments.run.settings import Settings
from experiments.run.stopping import stop_signal
from experiments.run.task import Task
from jaxpara.train import init_state, make_step
from jaxpara.types import Params, Step, TrainState

COST_COLUMNS = ("memory_bytes", "model_flops_per_second")


class Result(NamedTuple):
    """How a run ended.

    Attributes:
      status: "finished", or "interrupted" by a signal.
      signal: the signal's number, or None.
      step: steps done.
    """

    status: Literal["finished", "interrupted"]
    signal: int | None
    step: int


def metric_columns(task: Task) -> tuple[str, ...]:
    """The columns of a task's `metrics.csv`.

    Args:
      task: the task.

    Returns:
      Names, in order.
    """
    bits = () if task.bytes_per_token is None else ("train_bits_per_byte",)
    first = ("step", "tokens", "seconds", "train_loss_nats", *bits)
    return (*first, *task.columns, "tokens_per_second", "gradient_norm", *COST_COLUMNS)


def train(
    task: Task,
    *,
    optimizer: optax.GradientTransformation,
    projection: Callable[[Params], Params] | None,
    settings: Settings,
    folder: Path,
    sinks: Sequence[loggers.Open] = (),
    config: Mapping[str, Any],
    resume: bool = False,
    continues: Callable[[], None] = lambda: None,
) -> Result:
    """Trains, evaluates, saves and finishes; everything is written to the folder.

    Args:
      task: what is trained.
      optimizer: of optax.
      projection: applied to the parameters after each step, or None.
      settings: numbers.
      folder: of the run, opened by `opening.open_run`.
      sinks: of numbers, besides `metrics.csv`.
      config: resolved, for the sinks that keep it.
      resume: continue from the folder's last checkpoint, if there is one.
      continues: called when it is certain that the run can continue.

    Returns:
      The result; `summary.json` has more.

    Raises:
      Diverged: the loss is not finite; the measurements are in the folder.
      RunError: the disk is full, or the folder cannot be written to.
    """
    began = time.perf_counter()

    def seconds() -> float:
        return time.perf_counter() - began

    settled = compared(config)
    some = {} if task.trainable is None else {"trainable": task.trainable}
    initial = jax.jit(lambda key: init_state(task.model, optimizer, key, **some))
    key = jax.random.key(settings.seed)
    if resume and checkpoints.steps(folder):
        like = jax.eval_shape(initial, key)
        state, memory, known = _restored(task, folder, like, config, settings.steps)
        began -= memory.seconds
    else:
        state, memory, known = initial(key), Memory(), {}
    begin = int(state.step)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    summary: dict[str, Any] = {
        "name": settings.name,
        "status": "failed",
        "judged_by": list(task.best),
        **task.summary,
        **known,
        "parameters": count,
    }
    if resume:
        continues()
        _say_what_is_missing(folder, begin)
        _cut_tables(task, folder, begin)
    columns = metric_columns(task)
    place = loggers.Place(folder, settings.name, config, begin)
    outlets = loggers.open_all([loggers.csv(columns), *sinks], place)
    step = make_step(
        task.loss, optimizer, accumulate=settings.accumulate, project=projection, **some
    )
    costs: list[step_cost.StepCost] = []  # of the step, once it is compiled
    step = step_cost.measured(jax.jit(step, donate_argnums=0), task.loss, costs.append)
    with _ending(folder, summary, (*outlets, task.batches), seconds):
        with (
            progress(label=settings.name) as line,
            stop_signal() as stopped,
            checkpoints.saver(
                folder,
                keep_last=settings.checkpoint.keep_last,
                keep_best=settings.checkpoint.keep_best,
                best=task.best,
                trainable=task.trainable,
                begin=begin,
            ) as save,
            _profiled(settings, step, task, folder, costs, line.say) as (step, batches),
        ):
            line.say(
                f"{settings.name}: {count:,} parameters; {task.about}; "
                f"{jax.devices()[0].device_kind}; {folder}"
            )
            if resume:
                line.say(f"continues after step {begin} of {settings.steps}")

            def keep(state: TrainState, memory: Memory, values: dict[str, float] | None) -> None:
                claim.check_ours(folder)
                remembered = {**memory._asdict(), "others": dict(memory.others)}
                run = {"data": task.batches.get_state(), "memory": remembered}
                save(state, {**run, "settings": settled}, values)

            aside = functools.partial(jax.profiler.annotate_function, name=profiling.ASIDE)
            pace = Pace(
                steps=settings.steps,
                tokens_per_step=task.tokens_per_step,
                log_every=settings.log_every,
                eval_every=settings.eval_every,
                save_every=settings.checkpoint.every,
                bytes_per_token=task.bytes_per_token,
            )
            hooks = Hooks(
                write_row=_row_writer(task, outlets, costs),
                look_up=aside(_look_up(task, folder, outlets, summary, line, seconds)),
                save=aside(keep),
                seconds=seconds,
                progress=line,
                stopped=stopped,
                solved=task.solved,
            )
            ending = run_loop(state, step, batches, pace, hooks, begin=begin, memory=memory)
            number = stopped() if ending.stopped else None
        summary.update(_results(ending, folder))
        summary.update(
            step_cost.figures(
                costs[0] if costs else None,
                tokens_per_step=task.tokens_per_step,
                tokens_per_second=ending.tokens_per_second,
                peak=settings.peak_flops,
            )
        )
        if number is None:
            task.finish(folder, ending.state.params, summary)
            summary["status"] = "finished"
        else:
            summary["status"] = "interrupted"
        return Result(summary["status"], number, summary["steps"])


@contextlib.contextmanager
def _ending(
    folder: Path, summary: dict[str, Any], used: Sequence[Any], seconds: Callable[[], float]
) -> Iterator[None]:
    """Writes down how a run ends, whatever ends it, and says how it continues."""
    try:
        yield
    except Diverged as error:
        summary["status"] = "diverged"
        summary["diverged"] = text = f"{error}. {_last_checkpoint(folder)}"
        raise Diverged(text) from None
    except KeyboardInterrupt:  # outside the loop, or a second one
        summary["status"] = "interrupted"
        print(
            f"interrupted. {_last_checkpoint(folder)}. Continue with\n"
            f"  {checkpoints.resume_command(folder)}",
            flush=True,
        )
        raise KeyboardInterrupt("the run has said so") from None
    except OSError as error:
        claim.check_ours(folder)
        if error.errno not in disk.UNWRITABLE:
            raise
        raise folders.RunError(
            f"{error}. {_last_checkpoint(folder)}. {disk.remedy(str(error))}, then continue with\n"
            f"  {checkpoints.resume_command(folder)}"
        ) from error
    finally:
        loggers.close_all(used)
        summary["seconds"] = seconds()
        written = _close(folder, summary)
    if not written:
        raise folders.RunError(f"{folder} has no {folders.SUMMARY} of this run, see above")


def _restored(
    task: Task, folder: Path, like: TrainState, config: Mapping[str, Any], steps: int
) -> tuple[TrainState, Memory, dict[str, float]]:
    """Reads the newest checkpoint and moves the batches to its position.

    Returns:
      The state, what the loop remembers, and the figures of the last evaluation.
    """
    state, run = checkpoints.restore_newest(folder, like)
    step = int(state.step)
    where = str(checkpoints.path_of(folder, step))
    check_same(run.get("settings"), config, where)
    if step > steps:
        raise seals.Damaged(f"{where} is of a later step than the last of {steps}")
    _go_to(task, run, where)
    return state, Memory(**run["memory"]), run["figures"] or {}


def _go_to(task: Task, run: Mapping[str, Any], where: str) -> None:
    """Moves the batches to a saved position."""
    saved_values.check(run, where, need=saved_values.CONTINUED)
    try:
        task.batches.set_state(run["data"])
    except folders.RunError:
        raise
    except Exception as error:  # of any source of data, on values that are none of its own
        raise seals.Damaged(
            f"{where} is damaged: its `data` is no position in this task's data "
            f"({type(error).__name__}: {error}); start a new run"
        ) from error


def _last_checkpoint(folder: Path) -> str:
    whole = checkpoints.steps(folder)
    if not whole:
        return "There is no checkpoint yet"
    return f"The last checkpoint is {checkpoints.path_of(folder, whole[-1])}"


def _say_what_is_missing(folder: Path, begin: int) -> None:
    if not begin:
        seals.say(f"{folder} has no checkpoint: its run begins again, and its tables too")
    elif not (table := folder / folders.METRICS).is_file():
        seals.say(f"{table} is missing: its rows up to step {begin} are lost")


def _cut_tables(task: Task, folder: Path, begin: int) -> None:
    for name in ("metrics", *task.tables):
        # A run without a checkpoint restarts: the evaluation before its first step is cut too.
        cut_table(folder / f"{name}.csv", last=begin or -1)


def _close(folder: Path, summary: dict[str, Any]) -> bool:
    """Writes the result and the figures; neither may hide an earlier error, nor the result.

    Returns:
      Whether the result is written.
    """
    if jax.process_index() != 0:
        return True
    try:
        claim.check_ours(folder)
        folders.close_run(folder, summary)
    except (OSError, folders.RunError) as error:
        print(f"the summary and the figures of {folder} could not be written: {error}")
        return False
    try:
        figures.draw_run(folder)
    except Exception as error:  # the numbers are there, and can be drawn again
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(f"the figures of {folder} could not be drawn ({told[:200]})")
    return True


def _profiled(
    settings: Settings,
    step: Step,
    task: Task,
    folder: Path,
    costs: Sequence[step_cost.StepCost],
    say: Callable[[str], None],
):
    """Returns step and batches, traced on process 0 if profiling was asked for."""
    if not settings.profile or jax.process_index() != 0:
        return contextlib.nullcontext((step, task.batches))
    return profiling.profiled(
        step,
        task.batches,
        folder=folder,
        **settings.trace._asdict(),
        text=lambda: costs[0].text(),
        say=say,
    )


def _row_writer(task: Task, outlets: Sequence[loggers.Logger], costs: Sequence[step_cost.StepCost]):
    def write(row: Row) -> None:
        flops = costs[0].model_flops / task.tokens_per_step * row.tokens_per_second
        values = {
            **row.others,
            "tokens": row.step * task.tokens_per_step,
            "seconds": round(row.seconds, 2),
            "train_loss_nats": row.loss,
            "tokens_per_second": round(row.tokens_per_second),
            "gradient_norm": row.gradient_norm,
            "memory_bytes": step_cost.peak_memory(),
            "model_flops_per_second": round(flops),
        }
        if task.bytes_per_token is not None:
            values["train_bits_per_byte"] = row.loss / math.log(2) / task.bytes_per_token
        loggers.write_all(outlets, row.step, values)

    return write


def _look_up(
    task: Task,
    folder: Path,
    outlets: Sequence[loggers.Logger],
    summary: dict[str, Any],
    line: Progress,
    seconds: Callable[[], float],
):
    """Writes and announces the task's figures and tables."""
    for name, table in task.tables.items():
        path = folder / f"{name}.csv"
        if not path.exists():
            metrics.start(path, ("step", "tokens", *table.columns))

    def look_up(step: int, params: Params) -> dict[str, float]:
        values = task.evaluate(step, params)
        where = {"step": step, "tokens": step * task.tokens_per_step}
        row = {"tokens": where["tokens"], "seconds": round(seconds(), 2), **values}
        loggers.write_all(outlets, step, row)
        summary.update(values)
        said = [task.describe(values)]
        for name, table in task.tables.items():
            rows = table.rows(params)
            for row in rows:
                metrics.append(folder / f"{name}.csv", {**where, **row})
            said.append(table.describe(rows))
        line.say(f"step {step}: {'; '.join(said)}")
        return values

    return look_up


def _results(ending: Ending, folder: Path) -> dict[str, Any]:
    return {
        "steps": int(ending.state.step),
        "best_step": checkpoints.best_step(folder),
        "training_seconds": ending.seconds,
        "tokens_per_second": ending.tokens_per_second,
    }
