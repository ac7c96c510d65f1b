"""Where a run's numbers go: a logger is `write(step, values)` and `close()`.

`metrics.csv` is always written. TensorBoard and W&B are used when chosen (`logger=tensorboard`,
`logger=wandb`, `logger=[tensorboard,wandb]`); their packages are imported only then. Only process 0
writes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.run import metrics
from experiments.run.folders import RunError
from experiments.run.plain_files import read_text, write_text


class Logger(NamedTuple):
    """A sink of numbers.

    Attributes:
      write: `(step, values by name) -> None`; steps do not decrease.
      close: `() -> None`, after the last write.
    """

    write: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


class Place(NamedTuple):
    """What a sink is opened with.

    Attributes:
      folder: of the run.
      name: of the run.
      config: resolved, plain values.
      step: of the checkpoint from which the run continues; 0 for a new run.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    step: int = 0


Open = Callable[[Place], Logger]


def _package(name: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ValueError(
            f"logger={extra} needs the package {name}: pip install '.[{extra}]', "
            "or leave it out: metrics.csv is written in any case"
        ) from error


def csv(columns: Sequence[str], *, file: str = "metrics.csv") -> Open:
    """A table in the run's folder; every row is on disk before training continues.

    Args:
      columns: besides `step`, which is the first. A value with another name gets a new column
        after these.
      file: its name. An existing table is continued.

    Returns:
      A function that opens it.
    """
    columns = ("step", *(name for name in columns if name != "step"))

    def open_(place: Place) -> Logger:
        path = place.folder / file
        if not path.exists():
            metrics.start(path, columns)

        def write(step: int, values: Mapping[str, float]) -> None:
            metrics.append(path, {**values, "step": step})

        return Logger(write, lambda: None)

    return open_


def tensorboard() -> Open:
    """TensorBoard's event files, for `tensorboard --logdir RUN`; needs no TensorFlow.

    Returns:
      A function that opens it. Steps after the checkpoint that a run resumes from are purged.

    Raises:
      ValueError: the package is not installed.
    """
    writer = _package("tensorboardX", "tensorboard").SummaryWriter

    def open_(place: Place) -> Logger:
        purge = place.step + 1 if place.step else None
        events = writer(logdir=str(place.folder / "tensorboard"), purge_step=purge)

        def write(step: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                events.add_scalar(name, value, step)

        return Logger(write, events.close)

    return open_


def wandb(*, project: str = "jaxpara", mode: str = "online", tags: Sequence[str] = ()) -> Open:
    """Weights & Biases, with the run's whole config.

    Args:
      project: in the account that `wandb login` chose.
      mode: "online"; or "offline", which needs no network: `wandb sync RUN/wandb/offline-run-*`
        sends it later.
      tags: of the run.

    Returns:
      A function that opens it. A resumed run continues the W&B run named in `wandb.txt`.

    Raises:
      ValueError: the package is not installed, or the mode is unknown. Opening raises a RunError
        with W&B's own message, for example that nobody is logged in.
    """
    if mode not in ("online", "offline"):
        raise ValueError(f"mode={mode!r}: give 'online' or 'offline'")
    package = _package("wandb", "wandb")

    def open_(place: Place) -> Logger:
        known = place.folder / "wandb.txt"
        try:
            run = package.init(
                project=project,
                name=place.name,
                id=read_text(known).strip() if known.is_file() else None,
                resume="allow",
                mode=mode,
                tags=list(tags),
                config=dict(place.config),
                dir=str(place.folder),
            )
        except package.errors.Error as error:
            raise RunError(
                f"W&B: {error}; logger.wandb.mode=offline needs neither an account nor a network"
            ) from error
        write_text(known, f"{run.id}\n")

        def write(step: int, values: Mapping[str, float]) -> None:
            run.log(dict(values), step=step)

        return Logger(write, run.finish)

    return open_


def open_all(opens: Sequence[Open], place: Place) -> list[Logger]:
    """Opens every sink of a run, on process 0.

    Args:
      opens: that of `csv` and those that the group `logger` chose.
      place: the run.

    Returns:
      Loggers; none on other processes.
    """
    found: list[Logger] = []
    try:
        for open_ in opens if jax.process_index() == 0 else ():
            found.append(open_(place))
    except BaseException:
        close_all(found)
        raise
    return found


def close_all(used: Iterable[Any]) -> None:
    """Closes what a run has used; one that cannot be closed hides no result and no other error.

    Args:
      used: loggers and batches; what has no `close` needs none.
    """
    for one in used:
        try:
            getattr(one, "close", lambda: None)()
        except Exception as error:
            said = str(error) or type(error).__name__
            print(f"{type(one).__module__} could not be closed, its last lines may be lost: {said}")


def write_all(loggers: Sequence[Logger], step: int, values: Mapping[str, float | None]) -> None:
    """Writes one row everywhere.

    Args:
      loggers: from `open_all`.
      step: of the row.
      values: by name; None means not measured and is left out.
    """
    measured = {name: value for name, value in values.items() if value is not None}
    for logger in loggers:
        logger.write(step, measured)
