"""A new run's folder: opened and begun, or nothing of it stays."""

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig

from experiments.run import checkpoints, claim, folders, records
from experiments.run.folders import RunError

METRICS = "metrics.csv"


@contextmanager
def opened(folder: Path, cfg: DictConfig) -> Iterator[None]:
    """Opens a new run's folder and holds it; of a run refused before it begins nothing stays.

    A logger, for example, may refuse a run whose folder is written already.

    Args:
      folder: made if missing; what it held before stays in any case.
      cfg: composed, see `folders.open_run`.

    Raises:
      RunError: as `claim.claimed` and `folders.open_run`, and what the block raises.
    """
    before = set(folder.iterdir()) if folder.is_dir() else set()
    with claim.claimed(folder):
        try:
            folders.open_run(folder, cfg)
            yield
        except (RunError, OSError, MemoryError):
            if not _begun(folder):
                with contextlib.suppress(OSError):
                    _undo(folder, before)
            raise


def _begun(folder: Path) -> bool:
    """Whether there is anything to lose: an ending, a figure or a checkpoint."""
    if (folder / folders.SUMMARY).exists() or checkpoints.steps(folder):
        return True
    table = folder / METRICS
    return table.is_file() and len(table.read_text().splitlines()) > 1


def _undo(folder: Path, before: set[Path]) -> None:
    locks = {folder / claim.LOCK, folder / claim.HOLDER}
    for path in set(folder.iterdir()) - before - locks:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    # The lock last, while it is held: whoever comes next begins with a lock of their own.
    if set(folder.iterdir()) - locks <= {folder / records.FOLDER}:
        for path in locks:
            path.unlink(missing_ok=True)
