"""Opens a new run's folder; if the run is refused, nothing of the folder stays."""

import contextlib
import filecmp
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from experiments.run import checkpoints, claim, folders, frozen, outputs, records, trust
from experiments.run.folders import CONFIG, ENVIRONMENT, METRICS, SUMMARY, TOKENIZER, RunError
from experiments.run.plain_files import replacing, write_text

# What a run of `train` or `finetune` adds to, replaces or reads in its folder. Files of these names
# in a folder without a config are another run's, or somebody's.
ERROR = "error.txt"  # of a sweep's job that has failed
WRITTEN = (
    ERROR,
    METRICS,
    SUMMARY,
    checkpoints.FOLDER,
    checkpoints.DAMAGED,
    frozen.FOLDER,
    "adapters",
    ENVIRONMENT,
    TOKENIZER,
    "sample.txt",
    "solver.csv",
    "positions.csv",
    "profile.csv",
    "loss.png",
    "accuracy.png",
    "solver.png",
    "trace",
    "tensorboard",
    "wandb.txt",
)


def check_new(folder: Path, cfg: DictConfig, *, writes: Sequence[str] = WRITTEN) -> None:
    """Refuses a folder for a new run that holds a run or files that it would write, or is in one's.

    Other files may be there, such as those of a current directory, and what a start leaves that was
    killed before it wrote its config.

    Args:
      folder: of the new run; it may be missing.
      cfg: the composed config.
      writes: names that the run writes or reads.

    Raises:
      RunError: names the first that is there.
    """
    if (folder / CONFIG).exists():
        raise RunError(
            f"{folder} already holds a run, and each run needs its own folder: "
            "leave hydra.run.dir out, or give a folder that does not exist; "
            f"`python -m experiments.train resume={folder}` continues it"
        )
    outputs.check_not_kept(folder)
    tokenizer = _tokenizer(cfg)
    for name in writes:
        path = folder / name
        if name == TOKENIZER and path.is_file() and tokenizer is not None:
            if filecmp.cmp(path, tokenizer, shallow=False):  # a start that was killed copied it
                continue
        if path.exists() or path.is_symlink():
            raise RunError(
                f"{folder} holds {name} but no {CONFIG}, and a new run would write its own there:\n"
                "give another folder (hydra.run.dir=, in a sweep hydra.sweep.dir=),\n"
                f"or put back the {CONFIG} if it is of a run that has lost it"
            )


def _tokenizer(cfg: DictConfig) -> Path | None:
    path = OmegaConf.select(cfg, "data.tokenizer")
    return Path(path) if path is not None and Path(path).is_file() else None


def open_run(folder: Path, cfg: DictConfig, *, writes: Sequence[str] = WRITTEN) -> None:
    """Writes the config, tokenizer and environment of a run before it begins.

    `trust=` is not written: a folder cannot grant trust.

    Args:
      folder: made if missing.
      cfg: the composed config.
      writes: names that the run writes or reads.

    Raises:
      RunError: as `check_new`, or the config could not be read back.
    """
    check_new(folder, cfg, writes=writes)
    kept = OmegaConf.masked_copy(cfg, [key for key in cfg if key != trust.TRUST])
    folders.check_inert(OmegaConf.to_container(kept, resolve=True), "the config")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(cfg)
    if tokenizer is not None:
        with replacing(folder / TOKENIZER) as part:
            shutil.copyfile(tokenizer, part)
    write_text(folder / CONFIG, OmegaConf.to_yaml(kept, resolve=True))
    records.write(folder, cfg)
    folders.write_json(folder / ENVIRONMENT, folders.environment())


@contextmanager
def opened(folder: Path, cfg: DictConfig) -> Iterator[None]:
    """Opens a new run's folder and locks it; if the run is refused before it begins, nothing stays.

    A logger, for example, may refuse a run after its folder was written.

    Args:
      folder: made if missing. A folder that held anything before is not tidied: new files in it
        may be somebody else's, for example if `hydra.run.dir` is the current directory.
      cfg: composed, see `open_run`.

    Raises:
      RunError: as `claim.claimed` and `open_run`, and any that the block raises.
    """
    trust.check_links(folder, written=True)
    check_new(folder, cfg)  # before the lock, which is a file in it
    ours = not folder.is_dir() or not any(folder.iterdir())
    with claim.claimed(folder):
        try:
            open_run(folder, cfg)
            yield
        except (RunError, OSError, MemoryError, KeyboardInterrupt):
            if ours and not _begun(folder):
                with contextlib.suppress(OSError):
                    _undo(folder)
            raise


def _begun(folder: Path) -> bool:
    """Whether there is anything to lose: an ending, a figure or a checkpoint."""
    if (folder / SUMMARY).exists() or checkpoints.steps(folder):
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
        claim.unclaim(folder)
