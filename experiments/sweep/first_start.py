"""The settings with which a sweep's job was first started: another job is not its repetition."""

import json
import os
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.run import folders, records
from experiments.run.plain_files import printable, read_text, write_text
from experiments.run.resuming import FREE, difference


def settings_of(cfg: DictConfig) -> str:
    """The settings of a job in YAML.

    Args:
      cfg: as Hydra composed it: checks may make text of numbers, and a run takes its base's model.

    Returns:
      What references stand for, such as a variable of the environment; the references themselves
      if one leads nowhere, which the job will report.
    """
    kept = OmegaConf.masked_copy(cfg, [key for key in cfg if key not in FREE])
    try:
        return OmegaConf.to_yaml(kept, resolve=True)
    except OmegaConfBaseException:
        return OmegaConf.to_yaml(kept)


def write(folder: Path, settings: str) -> None:
    """Writes the settings with which a job was first started.

    Args:
      folder: of its run.
      settings: from `settings_of`.
    """
    (folder / records.FOLDER).mkdir(parents=True, exist_ok=True)
    write_text(folder / records.FOLDER / records.JOB, f"# {json.dumps(os.getcwd())}\n{settings}")


def check_same(settings: str, folder: Path, *, named: bool = False) -> None:
    """Refuses a folder with a run of other settings, before anything is written there.

    Args:
      settings: of the job, from `settings_of`.
      folder: of the job, with a run or not.
      named: whether its name has the digest of the settings, which then need no record.

    Raises:
      RunError: names the first setting that differs, or says that the record is missing or damaged.
    """
    if not (folder / folders.CONFIG).is_file():
        return
    path = folder / records.FOLDER / records.JOB
    alone = f"continue it alone with resume={folder}, or give another hydra.sweep.dir"
    if not path.exists() and named:
        return
    if not path.is_file():
        raise folders.RunError(
            f"{folder} holds a run that no sweep has started, or has lost {path.name}:\n{alone}"
        )
    try:
        first, _, known = read_text(path).partition("\n")
    except (OSError, ValueError) as error:
        raise folders.RunError(f"{path} is damaged ({error}):\n{alone}") from error
    # An older version wrote references; what they stood for is in the digest.
    if known != settings and not (named and "${" in known):
        then, now = folders.read_yaml(path), OmegaConf.create(settings)
        if not isinstance(then, DictConfig) or not set(then) & set(now):
            raise folders.RunError(f"{path} is damaged (it holds no settings):\n{alone}")
        differs = difference(*(OmegaConf.to_container(one) for one in (then, now)))
        if differs is not None:
            raise folders.RunError(
                f"{folder} holds a run with {differs}:\ngive another hydra.sweep.dir, or leave "
                "hydra.sweep.subdir out: then jobs of other settings have other folders"
            )
    place = first.removeprefix("# ")
    if place != json.dumps(os.getcwd()) and folders.status(folder) == "finished":
        there = printable(place.strip('"'))
        print(f"{folder} was trained in {there}: relative paths led elsewhere there")
