"""The trainer's numbers, and checks that they fit together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from experiments.run.checks import check_missing, check_settings
from experiments.run.folders import RunError


class Keep(NamedTuple):
    """When checkpoints are written and which are kept, as in conf/train.yaml."""

    every: int
    keep_last: int
    keep_best: int


class Traced(NamedTuple):
    """Which steps `profile=true` traces, as in conf/train.yaml."""

    start: int
    steps: int


class Settings(NamedTuple):
    """The numbers of a run, named and explained in conf/train.yaml."""

    name: str
    seed: int
    steps: int
    batch_size: int
    accumulate: int
    log_every: int
    eval_every: int
    checkpoint: Keep
    profile: bool
    trace: Traced
    peak_flops: float | None


def make_settings(values: Mapping[str, Any], *, place: Path | None = None) -> Settings:
    """Takes the trainer's numbers from a config and refuses those that do not fit together.

    Args:
      values: of a whole config, as plain values.
      place: the file that they were read from; None: the command line.

    Returns:
      The settings.

    Raises:
      RunError: says what was given, and what to change.
    """
    where = "" if place is None else f"{place}: "
    missing = [name for name in Settings._fields if name not in values]
    for name, fields in (("checkpoint", Keep._fields), ("trace", Traced._fields)):
        if isinstance(given := values.get(name), Mapping):
            missing += [f"{name}.{field}" for field in fields if field not in given]
    if missing and place is None:
        deleted = " ".join(f"~{one}" for one in missing)
        raise RunError(f"this command needs {', '.join(missing)}: leave {deleted} out")
    if missing:
        raise RunError(
            f"{where}the config has no {', '.join(missing)}: another version of this program "
            "wrote it, and that version can continue it"
        )
    ours = OmegaConf.create({name: values[name] for name in Settings._fields})
    check_missing(ours, place=place)
    check_settings(ours, place=place)
    settings = Settings(**{name: values[name] for name in Settings._fields})
    settings = settings._replace(
        checkpoint=Keep(**values["checkpoint"]), trace=Traced(**values["trace"])
    )
    if settings.profile:
        if sum(settings.trace) > settings.steps:
            raise RunError(
                f"{where}trace.start={settings.trace.start} and "
                f"trace.steps={settings.trace.steps} do not fit steps={settings.steps}: "
                "their sum may be no larger"
            )
    if settings.batch_size % settings.accumulate:
        raise RunError(
            f"{where}accumulate={settings.accumulate} does not divide "
            f"batch_size={settings.batch_size}: give a batch_size that is a multiple of it"
        )
    return settings
