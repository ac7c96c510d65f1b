"""Trains a task: `python -m experiments.train experiment=lm`."""

import contextlib
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments.run import checkpoints, folders, trust
from experiments.run.claim import claimed
from experiments.run.folder_arguments import PLACES, quote_folders
from experiments.run.memory import check_step
from experiments.run.opening import opened
from experiments.run.resuming import check_overrides, move_data, resume_arguments
from experiments.run.settings import make_settings
from experiments.run.stopping import pass_on
from experiments.run.trainer import train
from experiments.shell.build import build
from experiments.shell.commandline import guarded, quote_text
from experiments.shell.foreign import content_of
from experiments.sweep.sweeps import once, start

FOLDERS = (*PLACES, trust.TRUST)


def job(cfg: DictConfig) -> None:
    """Does one run from its config, or continues from its folder's last checkpoint.

    Args:
      cfg: composed by Hydra.

    Raises:
      RunError: the user must change something; says what.
      SystemExit: 128 plus the signal's number after a signal to stop, with everything saved.
    """
    with contextlib.ExitStack() as held:
        _job(cfg, Path(HydraConfig.get().runtime.output_dir), held)


def _job(cfg: DictConfig, folder: Path, held: contextlib.ExitStack) -> None:
    """`job` in a folder, which it locks as soon as it writes there."""
    resume = bool(cfg.resume) and (folder / folders.CONFIG).is_file()
    moved, stored = False, cfg
    if resume:
        trust.check_place(folder, written=True)
        held.enter_context(claimed(folder))
        stored = folders.load_config(folder)
        overrides = list(HydraConfig.get().overrides.task)
        check_overrides(overrides, cfg=cfg, stored=stored, folder=folder)
        if folders.status(folder) == "finished":
            print(f"the run is finished, there is nothing left to do: {folder}")
            return
        given, cfg = cfg, trust.open_config(folder)
        if checkpoints.steps(folder) and OmegaConf.select(cfg, "task.base") is not None:
            cfg.task.base = None  # its parameters are in the checkpoint, and it may be gone
        moved = move_data(stored, given) and move_data(cfg, given)
        trust.check_paths(cfg, folder)
    with content_of(folder) if resume else contextlib.nullcontext():
        values = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(values, dict)
        settings = make_settings(values, place=folder / folders.CONFIG if resume else None)
        parts = build(cfg)
        check_step(parts.task, parts.optimizer, accumulate=settings.accumulate)
    if not resume:
        folders.check_inert(values, "the config")
        held.enter_context(opened(folder, cfg))
    result = train(
        parts.task,
        optimizer=parts.optimizer,
        projection=parts.projection,
        settings=settings,
        folder=folder,
        sinks=parts.sinks,
        config=values,
        resume=resume,
        continues=lambda: folders.reopen_run(folder, stored if moved else None),
    )
    if result.signal is not None:
        print(
            f"interrupted after step {result.step} of {settings.steps}; "
            f"everything is saved in {folder}. Continue with\n"
            f"  {checkpoints.resume_command(folder)}",
            flush=True,
        )
        pass_on(result.signal)
        raise SystemExit(128 + result.signal)
    print(f"everything is in {folder}")


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def compose(cfg: DictConfig) -> float | None:
    """Hydra's entry; returns the figure for sweepers that optimise it."""
    return guarded(lambda: once(cfg, job), cfg)


def main() -> None:
    """The command line: quotes prompts, turns `resume=FOLDER` into a folder, starts sweeps."""

    def prepare(arguments: list[str]) -> list[str]:
        arguments = quote_folders(resume_arguments(arguments), keys=FOLDERS)
        return quote_text(arguments, keys=("sample.prompt",))

    start(compose, prepare)


if __name__ == "__main__":
    main()
