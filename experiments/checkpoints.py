"""Checkpoints on disk, by Orbax: what a run needs to go on, and parameters for everything else.

`folder/checkpoints/STEP/` holds `params`, `rest` (optimiser, step, key) and `run` (position
in the data, what the loop remembers, and the figures of that step if it was evaluated). A
step's folder gets its name once it is whole, so what a killed run left half written is
never taken for a checkpoint. Parameters that are not trained are written once, to
`folder/frozen/`, and are in no checkpoint.
"""

import logging
import math
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import args as items
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from experiments.runs import RunError
from jaxpara import combine, split
from jaxpara.types import Params, TrainState

FOLDER, FROZEN = "checkpoints", "frozen"

Save = Callable[[TrainState, dict[str, Any], dict[str, float] | None], None]


def resume_command(folder: Path) -> str:
    """The command that continues a run.

    Args:
      folder: the run's folder.

    Returns:
      One line for a shell.
    """
    shown = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)
    return shlex.join(["python", "-m", "experiments.train", f"resume={shown}"])


def _rest(state: TrainState) -> dict[str, Any]:
    """Optimiser, step and key as plain arrays: the key as its data."""
    return {
        "opt_state": state.opt_state,
        "step": state.step,
        "key": jax.random.key_data(state.key),
    }


def _score(run: dict[str, Any]) -> float:
    """Higher is better; a step without a finite figure is never the best."""
    column, mode = run["best"]
    value = (run["figures"] or {}).get(column, math.nan)
    return value * (1 if mode == "max" else -1) if math.isfinite(value) else -math.inf


def _read(path: Path, **what: Any) -> Any:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        return reader.restore(path.absolute(), items.Composite(**what))


def _write_frozen(folder: Path, frozen: Params) -> None:
    paths = [jax.tree_util.keystr(keys) for keys, _ in jax.tree.leaves_with_path(frozen)]
    if paths:
        what = items.Composite(
            params=items.StandardSave(frozen), leaves=items.JsonSave({"paths": paths})
        )
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
            writer.save((folder / FROZEN).absolute(), what, force=True)


def _apart(folder: Path, like: Params) -> tuple[Params, Params | None]:
    """What of some parameters is in the checkpoints, and what in `frozen/`, if there is one."""
    if not (folder / FROZEN).is_dir():
        return like, None
    known = set(_read(folder / FROZEN, leaves=items.JsonRestore())["leaves"]["paths"])
    paths = jax.tree_util.tree_map_with_path(lambda keys, _: jax.tree_util.keystr(keys), like)
    if missing := known - set(jax.tree.leaves(paths)):
        raise ValueError(f"{folder / FROZEN} has {sorted(missing)[0]}, and the model has not")
    return split(like, jax.tree.map(lambda path: path not in known, paths))


def _together(folder: Path, trained: Params, frozen: Params | None) -> Params:
    """Undoes `_apart`, for shapes of what is frozen."""
    if frozen is None:
        return trained
    return combine(
        trained,
        _read(folder / FROZEN, params=items.StandardRestore(_target(frozen)))["params"],
    )


def _reason(error: Exception) -> str:
    """What the operating system said, where a library has wrapped it in paths."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Orbax logs a failure from each of its threads; what matters is raised, and said once.

    Those threads may speak long after the error was raised: after one, it stays quiet.
    """
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


@contextmanager
def saver(
    folder: Path,
    *,
    keep_last: int,
    keep_best: int,
    best: tuple[str, Literal["min", "max"]],
    trainable: Callable[[Params], Any] | None = None,
) -> Iterator[Save]:
    """Opens a run's checkpoints for writing; on leaving, all that was begun is on disk.

    Args:
      folder: the run's folder. What was half written there is removed.
      keep_last: checkpoints kept, counted from the last.
      keep_best: checkpoints kept besides, those with the best figures.
      best: the figure that decides, and whether "min" or "max" is best.
      trainable: `params -> booleans`, where not all of them are trained.

    Yields:
      `save(state, run, figures)`: returns as soon as the state is copied and writes in the
      background. `run` is JSON-able; the figures are those of this step, or None.

    Raises:
      RunError: a checkpoint could not be written; said at the next one or on leaving.
    """
    begun = 0

    def failed(error: Exception) -> RunError:
        whole = steps(folder)
        kept = f"that of step {whole[-1]} is whole" if whole else "there is no earlier one"
        return RunError(
            f"the checkpoint of step {begun} could not be written to {folder / FOLDER}: "
            f"{_reason(error)}; {kept}. Make room there, then go on with\n"
            f"  {resume_command(folder)}"
        )

    manager = ocp.CheckpointManager(
        (folder / FOLDER).absolute(),
        options=ocp.CheckpointManagerOptions(
            save_root_metadata=False,
            cleanup_tmp_directories=True,
            best_fn=_score,  # or Orbax would not keep the metrics that the policy reads
            preservation_policy=AnyPreservationPolicy(
                [LatestN(keep_last), BestN(get_metric_fn=_score, n=keep_best)]
            ),
        ),
    )

    def save(state: TrainState, run: dict[str, Any], figures: dict[str, float] | None) -> None:
        nonlocal begun
        kind = str(jax.random.key_impl(state.key))
        record = {**run, "key_impl": kind, "best": list(best), "figures": figures}
        params = state.params
        try:
            manager.wait_until_finished()
            begun = int(state.step)
            if trainable is not None:
                params, frozen = split(params, trainable(params))
                if not steps(folder) or not (folder / FROZEN).is_dir():
                    _write_frozen(folder, frozen)
            manager.save(
                begun,
                args=items.Composite(
                    params=items.StandardSave(params),
                    rest=items.StandardSave(_rest(state)),
                    run=items.JsonSave(record),
                ),
                metrics={"best": record["best"], "figures": figures},
            )
        except Exception as error:
            raise failed(error) from error

    with quiet():
        try:
            yield save
        except BaseException:
            try:
                manager.close()
            except Exception as error:
                print(f"while stopping: {failed(error)}")
            raise
        try:
            manager.close()  # waits
        except Exception as error:
            raise failed(error) from error


def steps(folder: Path) -> list[int]:
    """The checkpoints of a run that are whole.

    Args:
      folder: the run's folder.

    Returns:
      Their steps, in order; empty where there are none.
    """
    # Orbax writes to STEP.orbax-checkpoint-tmp and renames it when everything is on disk.
    return sorted(int(path.name) for path in (folder / FOLDER).glob("*") if path.name.isdigit())


def path_of(folder: Path, step: int) -> Path:
    """Where a checkpoint is.

    Args:
      folder: the run's folder.
      step: one of `steps`.

    Returns:
      Its folder.
    """
    return folder / FOLDER / str(step)


def best_step(folder: Path) -> int | None:
    """The checkpoint with the best figure among those that are there.

    Args:
      folder: the run's folder.

    Returns:
      Its step; None where none was evaluated.
    """
    scores = {
        step: _score(_read(path_of(folder, step), run=items.JsonRestore())["run"])
        for step in steps(folder)
    }
    best = max(scores, key=lambda step: scores[step], default=None)
    return None if best is None or scores[best] == -math.inf else best


def _target(like: Any) -> Any:
    """Shapes, dtypes and places to restore to; what has no place goes to the first device."""
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or first
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, like)


def restore(folder: Path, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Reads a checkpoint back, onto any devices.

    Args:
      folder: the run's folder.
      step: one of `steps`.
      like: shapes and dtypes, for example of `jax.eval_shape`; its leaves may carry shardings,
        which need not be those that were saved.

    Returns:
      The state, and what `save` was given as `run`.

    Raises:
      ValueError: what is on disk has another structure or other shapes.
    """
    rest = jax.eval_shape(_rest, like)
    placed = rest | {"opt_state": like.opt_state, "step": like.step}
    trained, frozen = _apart(folder, like.params)
    read = _read(
        path_of(folder, step),
        params=items.StandardRestore(_target(trained)),
        rest=items.StandardRestore(_target(placed)),
        run=items.JsonRestore(),
    )
    rest, run = read["rest"], read["run"]
    key = jax.random.wrap_key_data(rest["key"], impl=run.pop("key_impl"))
    params = _together(folder, read["params"], frozen)
    return TrainState(params, rest["opt_state"], rest["step"], key), run


def load_params(folder: Path, like: Params, *, which: Literal["best", "last"] = "best") -> Params:
    """Reads the parameters of a run.

    Args:
      folder: the run's folder.
      like: shapes and dtypes, for example `jax.eval_shape(model.init, key)`; leaves without a
        sharding go to the first device.
      which: "best" by the run's own figure, else the last; or "last".

    Returns:
      The parameters.

    Raises:
      RunError: the run has no checkpoint.
      ValueError: what is on disk has another structure or other shapes.
    """
    whole = steps(folder)
    if not whole:
        raise RunError(
            f"{folder} holds no checkpoint: the run did not come to its first one, or is not a "
            "training run. Give run=FOLDER of another, or a smaller checkpoint.every"
        )
    best = best_step(folder) if which == "best" else None
    step = whole[-1] if best is None else best
    trained, frozen = _apart(folder, like)
    read = _read(path_of(folder, step), params=items.StandardRestore(_target(trained)))["params"]
    return _together(folder, read, frozen)
