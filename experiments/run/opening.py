"""Opens a new run's folder; if the run is refused, nothing of the folder stays."""

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig

from experiments.run import checkpoints, claim, folders, records
from experiments.run.folders import METRICS, RunError


@contextmanager
def opened(folder: Path, cfg: DictConfig) -> Iterator[None]:
    """Opens a new run's folder and locks it; if the run is refused before it begins, nothing stays.

    A logger, for example, may refuse a run after its folder was written.

    Args:
      folder: made if missing. A folder that held anything before is not tidied: new files in it
        may be somebody else's, for example if `hydra.run.dir` is the current directory.
      cfg: composed, see `folders.open_run`.

    Raises:
      RunError: as `claim.claimed` and `folders.open_run`, and any that the block raises.
    """
    ours = not folder.is_dir() or not any(folder.iterdir())
    with claim.claimed(folder):
        try:
            folders.open_run(folder, cfg)
            yield
        except (RunError, OSError, MemoryError, KeyboardInterrupt):
            if ours and not _begun(folder):
                with contextlib.suppress(OSError):
                    _undo(folder)
            raise


def _begun(folder: Path) -> bool:
    """Whether there is anything to lose: an ending, a figure or a checkpoint."""
    if (folder / folders.SUMMARY).exists() or checkpoints.steps(folder):
        return True
    table = folder / METRICS
    return table.is_file() and len(table.read_text(encoding="utf-8").splitlines()) > 1


def _undo(folder: Path) -> None:
    locks = {folder / claim.LOCK, folder / claim.HOLDER}
    for path in set(folder.iterdir()) - locks:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    # The lock goes last, while it is held: the next process makes a new one.
    if set(folder.iterdir()) - locks <= {folder / records.FOLDER}:
        for path in locks:
            path.unlink(missing_ok=True)
