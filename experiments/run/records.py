"""Hydra's record of a run, written when the run opens: a refused command leaves nothing.

Hydra itself would write it before it calls us, over the record of an existing run, and for refused
commands too (`hydra.output_subdir` in conf/run_folder.yaml turns that off).
"""

import contextlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.run.plain_files import write_text

FOLDER = ".hydra"
FILES = ("config.yaml", "hydra.yaml", "overrides.yaml")
JOB = "job.yaml"  # the settings with which a sweep's job was first started


class Notes(Callback):
    """Notes which folders a command makes: `hydra.callbacks.notes` in the config."""

    made: Collection[Path] = ()  # by this command, its record among them; a user's own stay

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra makes the run's folder after this."""
        del kwargs
        Notes.made = ()
        with contextlib.suppress(OmegaConfBaseException, OSError):  # Hydra reports it
            Notes.made = missing(Path(config.hydra.run.dir) / FOLDER)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra makes the sweep's folder after this."""
        del kwargs
        Notes.made = ()
        with contextlib.suppress(OmegaConfBaseException, OSError):
            Notes.made = missing(Path(config.hydra.sweep.dir))


def missing(folder: Path) -> list[Path]:
    """Lists a folder and those above it that are not there yet.

    Args:
      folder: of a run, or its record.

    Returns:
      Absolute paths.
    """
    whole = Path(os.path.abspath(folder))  # without ".."
    return [path for path in (whole, *whole.parents) if not path.exists()]


def write(folder: Path, cfg: DictConfig) -> None:
    """Writes how a run was started; nothing if Hydra did not start it.

    Args:
      folder: of the run.
      cfg: composed, its references as they are.
    """
    if not HydraConfig.initialized():
        return
    known = HydraConfig.instance().cfg
    assert known is not None
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for name, node in zip(FILES, (cfg, known, known.hydra.overrides.task), strict=True):
        write_text(folder / FOLDER / name, OmegaConf.to_yaml(node))


def discard(folder: Path, *, made: Collection[Path] | None = None) -> None:
    """Removes a folder in which no run was opened, and empty folders above it.

    Args:
      folder: empty, or with only a record; any other is left alone.
      made: the folders that may be removed, the record `.hydra` among them, see `missing`; None:
        those that this command has made. Others, even empty ones, are somebody's.
    """
    ours = Notes.made if made is None else {Path(os.path.abspath(path)) for path in made}
    with contextlib.suppress(OSError):
        whole = Path(os.path.abspath(folder))
        record = whole / FOLDER
        if record in ours and [path.name for path in folder.iterdir()] == [FOLDER]:
            if all(_is_ours(path) for path in record.iterdir()):
                for path in record.iterdir():
                    path.unlink()
                record.rmdir()
        for path in (whole, *whole.parents):
            if path in ours:
                path.rmdir()


def _is_ours(path: Path) -> bool:
    return path.name in (*FILES, JOB) and not path.is_symlink()
