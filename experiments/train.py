"""Trains a task: `python -m experiments.train experiment=lm`."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments import checkpoints, runs
from experiments.build import build
from experiments.checks import check_settings
from experiments.commandline import guarded, quote_text
from experiments.memory import check_step
from experiments.resuming import check_overrides, resume_arguments
from experiments.settings import make_settings
from experiments.stopping import pass_on
from experiments.sweeps import once, start
from experiments.trainer import train


def job(cfg: DictConfig) -> None:
    """One run, from its config, or on from where its folder's last checkpoint stands.

    Args:
      cfg: composed by Hydra.

    Raises:
      RunError: something to put right at the keyboard.
      SystemExit: 128 plus the signal's number after a signal to stop, with everything saved.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    resume = bool(cfg.resume) and (folder / runs.CONFIG).is_file()
    if resume:
        stored = runs.load_config(folder)
        overrides = list(HydraConfig.get().overrides.task)
        check_overrides(overrides, cfg=cfg, stored=stored, folder=folder)
        if runs.status(folder) == "finished":
            print(f"the run is finished, nothing is left to do: {folder}")
            return
        check_settings(stored, "train")
        cfg = stored
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    settings = make_settings(values)
    parts = build(cfg)
    check_step(parts.task, parts.optimizer, accumulate=settings.accumulate)
    if resume:
        runs.reopen_run(folder)
    else:
        runs.open_run(folder, cfg)
    result = train(
        parts.task,
        optimizer=parts.optimizer,
        projection=parts.projection,
        settings=settings,
        folder=folder,
        sinks=parts.sinks,
        config=values,
        resume=resume,
    )
    if result.signal is not None:
        print(
            f"interrupted after step {result.step} of {settings.steps}; "
            f"everything is saved in {folder}. Go on with\n"
            f"  {checkpoints.resume_command(folder)}",
            flush=True,
        )
        pass_on(result.signal)
        raise SystemExit(128 + result.signal)
    print(f"everything is in {folder}")


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def compose(cfg: DictConfig) -> float | None:
    """Hydra's entry; a sweeper that learns from its jobs needs the figure."""
    return guarded(lambda: once(cfg, job), cfg)


def main() -> None:
    """The command line: prompts as typed, `resume=FOLDER` as a folder, sweeps in theirs."""

    def prepare(arguments: list[str]) -> list[str]:
        return quote_text(resume_arguments(arguments), keys=("sample.prompt",))

    start(compose, prepare)


if __name__ == "__main__":
    main()
