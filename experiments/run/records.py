"""Hydra's record of a run, written when the run opens: a refused command leaves nothing.

Hydra itself would write it before it calls us, over the record of an existing run, and for refused
commands too (`hydra.output_subdir` in conf/run_folder.yaml turns that off).
"""

import contextlib
import os
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments.run.plain_files import write_text

FOLDER = ".hydra"
FILES = ("config.yaml", "hydra.yaml", "overrides.yaml")


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


def discard(folder: Path) -> None:
    """Removes a folder in which no run was opened, and empty folders above it.

    Args:
      folder: empty, or with only a record; any other is left alone. Above it, only folders below
        the current directory are removed: others, even empty ones, may be somebody's.
    """
    with contextlib.suppress(OSError):
        inside = [path.name for path in folder.iterdir()]
        record = folder / FOLDER
        if inside == [FOLDER] and all(_is_ours(path) for path in record.iterdir()):
            for path in record.iterdir():
                path.unlink()
            record.rmdir()
        here, folder = Path.cwd(), Path(os.path.abspath(folder))  # without ".."
        if not here.is_relative_to(folder):
            folder.rmdir()
        for above in folder.parents:
            if here in above.parents:
                above.rmdir()


def _is_ours(path: Path) -> bool:
    return path.name in FILES and not path.is_symlink()
