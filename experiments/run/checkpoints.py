"""Checkpoints on disk, by Orbax: what a run needs to continue, and parameters for other programs.

`folder/checkpoints/STEP/` holds `params`, `rest` (optimiser, step, key) and `run` (position
in the data, memory of the loop, and the figures of that step if it was evaluated). A step's
folder gets its name when it is complete, so a half-written one of a killed run is never taken
for a checkpoint. Parameters that are not trained are written once, to
`folder/frozen/`, and are in no checkpoint. Digests of all arrays and files are checked on reading.
"""

import contextlib
import functools
import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from omegaconf import OmegaConf
from orbax.checkpoint import args as items
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from experiments.run import frozen as frozen_part
from experiments.run import saved_values, seals, trust
from experiments.run.disk import by_plain_name, quiet, read_items, reason, remedy, target
from experiments.run.folders import CONFIG, RunError, load_config
from experiments.run.resuming import check_same
from experiments.run.seals import Damaged
from jaxpara import split
from jaxpara.types import Params, TrainState

FOLDER, DAMAGED = "checkpoints", "damaged"
STEP = re.compile("0|[1-9][0-9]*")

Save = Callable[[TrainState, dict[str, Any], dict[str, float] | None], None]


def resume_command(folder: Path) -> str:
    """Returns the command that continues a run; it trusts the paths that the run read before.

    Args:
      folder: the run's folder.

    Returns:
      One line for a shell.
    """
    shown = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)
    command = shlex.join(["python", "-m", "experiments.train", f"resume={shown}"])
    others = trust.outside(folder, but=("base",) if steps(folder) else ())
    return f"{command} {trust.argument(others)}" if others else command


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


def _readable_runs(folder: Path, tell: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields intact steps, newest first, with the values that they were saved with."""
    for step in steps(folder)[::-1]:
        try:
            with _still_there(path := path_of(folder, step)):
                seals.check(path, ["run"])
                run = saved_values.read(path)
        except Damaged as error:
            if tell:
                seals.say(f"{error}; it is passed over")
            continue
        yield step, run


@contextmanager
def _still_there(path: Path) -> Iterator[None]:
    """Explains a read error if a training process has removed the checkpoint meanwhile."""
    try:
        yield
    except (OSError, ValueError, Damaged) as error:
        if path.is_dir():
            raise
        raise Damaged(
            f"{path} is gone: the run is training, and keeps only its last ones"
        ) from error


@contextmanager
def saver(
    folder: Path,
    *,
    keep_last: int,
    keep_best: int,
    best: tuple[str, Literal["min", "max"]],
    trainable: Callable[[Params], Any] | None = None,
    begin: int | None = None,
) -> Iterator[Save]:
    """Opens a run's checkpoints for writing; on exit every checkpoint is on disk.

    Args:
      folder: the run's folder. Half-written checkpoints in it are removed, damaged ones are set
        aside.
      keep_last: how many of the last checkpoints are kept.
      keep_best: how many of those with the best figures are kept besides.
      best: the figure that decides, and whether "min" or "max" is best.
      trainable: `params -> booleans`, if not all of them are trained.
      begin: the step from which the run continues; later checkpoints are set aside too.

    Yields:
      `save(state, run, figures)`: returns as soon as the state is copied and writes in the
      background. `run` is JSON-able; the figures are those of this step, or None.

    Raises:
      RunError: a checkpoint could not be written; raised at the next one or on exit.
    """
    begun, of_frozen = 0, functools.cache(lambda: frozen_part.identity(folder))
    folder.mkdir(parents=True, exist_ok=True)
    set_aside(folder, after=begin)

    def failed(error: Exception) -> RunError:
        whole = steps(folder)
        kept = f"that of step {whole[-1]} is intact" if whole else "there is no earlier one"
        said = reason(error)
        return RunError(
            f"the checkpoint of step {begun} could not be written to {folder / FOLDER}: "
            f"{said}; {kept}. {remedy(said)}, then continue with\n"
            f"  {resume_command(folder)}"
        )

    def seal_before_it_gets_its_name() -> None:
        for path in (folder / FOLDER).iterdir():
            if path.name.startswith(f"{begun}.") and path.is_dir():
                seals.seal(path, late=False)

    def seal_what_came_late() -> None:
        for path in map(functools.partial(path_of, folder), steps(folder)):
            if not seals.is_sealed(path):
                with contextlib.suppress(OSError):  # it is complete without
                    seals.seal(path)

    options = ocp.CheckpointManagerOptions(
        save_root_metadata=False,
        cleanup_tmp_directories=True,
        best_fn=_score,  # otherwise Orbax would not keep the metrics that the policy reads
        preservation_policy=AnyPreservationPolicy(
            [LatestN(keep_last), BestN(get_metric_fn=_score, n=keep_best)]
        ),
        async_options=ocp.AsyncOptions(post_finalization_callback=seal_before_it_gets_its_name),
    )

    def save(state: TrainState, run: dict[str, Any], figures: dict[str, float] | None) -> None:
        nonlocal begun
        kind = str(jax.random.key_impl(state.key))
        record = {**run, "key_impl": kind, "best": list(best), "figures": figures}
        params, rest = state.params, _rest(state)
        try:
            manager.wait_until_finished()
            seal_what_came_late()
            begun = int(state.step)
            if trainable is not None:
                params, frozen = split(params, trainable(params))
                if not steps(folder) or not (folder / frozen_part.FOLDER).is_dir():
                    frozen_part.write(folder, frozen)
            record["frozen"] = of_frozen()
            record["digests"] = {
                "params": seals.of_arrays(params),
                "rest": seals.of_arrays(rest),
            }
            record = json.loads(json.dumps(record))
            manager.save(
                begun,
                args=items.Composite(
                    params=items.StandardSave(params),
                    rest=items.StandardSave(rest),
                    run=items.JsonSave({**record, "digest": seals.of_text(record)}),
                ),
                metrics={"best": record["best"], "figures": figures},
            )
        except Exception as error:
            raise failed(error) from error

    with quiet(), by_plain_name(folder) as place:
        manager = ocp.CheckpointManager(place / FOLDER, options=options)
        try:
            yield save
        except BaseException as first:
            try:
                manager.close()
            except Exception as error:
                if not isinstance(first, RunError):  # which has reported it already
                    print(f"while stopping: {failed(error)}")
            raise
        try:
            manager.close()  # waits
        except Exception as error:
            raise failed(error) from error
        seal_what_came_late()


def set_aside(folder: Path, *, after: int | None = None) -> None:
    """Moves checkpoints from which a run cannot continue to `damaged/`, and says so.

    Args:
      folder: the run's folder.
      after: a step; later checkpoints are moved too, intact or not.
    """
    for step in steps(folder):
        path = path_of(folder, step)
        try:
            seals.check(path)
            if after is None or step <= after:
                continue
            why = f"{path} is later than step {after}, from which the run continues"
        except Damaged as error:
            why = str(error)
        aside = folder / DAMAGED / str(step)
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)
        aside.parent.mkdir(exist_ok=True)
        path.rename(aside)
        seals.say(f"{why}; checkpoint {step} is moved to {aside}")


def steps(folder: Path) -> list[int]:
    """Lists the complete checkpoints of a run.

    Args:
      folder: the run's folder.

    Returns:
      Their steps, in order; empty where there are none.
    """
    # Orbax writes to STEP.orbax-checkpoint-tmp and renames it when everything is on disk.
    found = [path.name for path in (folder / FOLDER).glob("*")]
    return sorted(int(name) for name in found if STEP.fullmatch(name))


def path_of(folder: Path, step: int) -> Path:
    """Where a checkpoint is.

    Args:
      folder: the run's folder.
      step: one of `steps`.

    Returns:
      Its folder.
    """
    return folder / FOLDER / str(step)


def best_step(folder: Path, *, tell: bool = False) -> int | None:
    """Finds the checkpoint with the best figure among those that can be read.

    Args:
      folder: the run's folder.
      tell: say which cannot.

    Returns:
      Its step; None where none was evaluated.
    """
    scores = {step: _score(run) for step, run in _readable_runs(folder, tell)}
    best = max(sorted(scores), key=lambda step: scores[step], default=None)
    return None if best is None or scores[best] == -math.inf else best


def data_of(folder: Path) -> dict[str, Any]:
    """Describes the data of the saved position: digests of the text, seed, sizes.

    Args:
      folder: the run's folder.

    Returns:
      As given to `only_for`; empty where no checkpoint says it.
    """
    for _, run in _readable_runs(folder):
        position = run.get("data")
        about = position.get("in") if isinstance(position, dict) else None
        return about if isinstance(about, dict) else {}
    return {}


def restore(folder: Path, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Reads a checkpoint back, onto any devices.

    Args:
      folder: the run's folder.
      step: one of `steps`.
      like: shapes and dtypes, for example of `jax.eval_shape`; its leaves may carry shardings,
        which may differ from the saved ones.

    Returns:
      The state, and what `save` was given as `run`.

    Raises:
      Damaged: its content is not what was saved.
      Unlike: the data on disk has another structure or other shapes.
    """
    placed = jax.eval_shape(_rest, like) | {"opt_state": like.opt_state, "step": like.step}
    trained, frozen = frozen_part.apart(folder, like.params)
    path = path_of(folder, step)
    seals.check(path)
    run = saved_values.read(path)
    frozen_part.check_belongs(folder, run, str(path))
    run.pop("frozen", None)
    read = read_items(
        path,
        params=items.StandardRestore(target(trained)),
        rest=items.StandardRestore(target(placed)),
    )
    digests = run.pop("digests")
    for part in ("params", "rest"):
        seals.check_arrays(read[part], digests[part], str(path / part))
    rest = read["rest"]
    if int(rest["step"]) != step:
        raise Damaged(f"{path} is damaged: its state is of step {rest['step']}")
    kind = run.pop("key_impl")
    try:
        key = jax.random.wrap_key_data(rest["key"], impl=kind)
    except (ValueError, TypeError) as error:
        raise Damaged(f"{path / 'run'} is damaged: its key is not of key_impl {kind!r}") from error
    params = frozen_part.together(folder, read["params"], frozen)
    return TrainState(params, rest["opt_state"], rest["step"], key), run


def restore_newest(folder: Path, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Reads the newest intact checkpoint back; says so if newer ones are damaged.

    Args:
      folder: the run's folder; it has a checkpoint.
      like: as for `restore`.

    Returns:
      As `restore`.

    Raises:
      Damaged: none is intact.
      Unlike: the data on disk has another structure or other shapes.
    """
    return seals.first_whole(steps(folder)[::-1], lambda step: restore(folder, step, like))


def load_params(folder: Path, like: Params, *, which: Literal["best", "last"] = "best") -> Params:
    """Reads the parameters of a run.

    Args:
      folder: the run's folder.
      like: shapes and dtypes, for example `jax.eval_shape(model.init, key)`; leaves without a
        sharding go to the first device.
      which: "best" by the run's own figure, or the last if there is none; or "last". If that
        checkpoint is damaged, the newest intact one is read, and a line says so.

    Returns:
      The parameters.

    Raises:
      RunError: the run has no checkpoint, or none that is intact.
      Unlike: the data on disk has another structure or other shapes.
    """
    order = steps(folder)[::-1]
    if not order:
        raise RunError(
            f"{folder} holds no checkpoint: the run ended before its first one, or is not a "
            "training run. Give run=FOLDER of another, or a smaller checkpoint.every"
        )

    def read(step: int) -> Params:
        path = path_of(folder, step)
        trained, frozen = frozen_part.apart(folder, like)
        with _still_there(path):
            seals.check(path, ["run", "params"])
            run = saved_values.read(path)
            frozen_part.check_belongs(folder, run, str(path))
            if (folder / CONFIG).is_file():
                config: Any = OmegaConf.to_container(load_config(folder))
                check_same(run.get("settings"), config, str(path))
            found = read_items(path, params=items.StandardRestore(target(trained)))["params"]
        seals.check_arrays(found, run["digests"]["params"], str(path / "params"))
        return frozen_part.together(folder, found, frozen)

    best = best_step(folder, tell=True) if which == "best" else None
    return seals.first_whole(order if best is None else [best, *order], read)
