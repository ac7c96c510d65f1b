"""Adapts a trained language model: `python -m experiments.finetune from=FOLDER transform=[lora]`.

A run's folder is as of `experiments.train`, which also goes on with one: `resume=FOLDER`.
"""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments import runs
from experiments.commandline import guarded
from experiments.resuming import resume_arguments
from experiments.sweeps import once, start
from experiments.train import job as train_job


def take_model(cfg: DictConfig) -> None:
    """Puts the model and the tokenizer of the run it starts from into a config.

    Args:
      cfg: composed, with `from`.

    Raises:
      RunError: no such run, or one without a model.
    """
    if cfg["from"] is None:
        return
    trained = runs.load_config(runs.find_run(cfg["from"]))
    if "model" not in trained:
        raise runs.RunError(
            f"from={cfg['from']!r} is not of a language model: give a run of "
            "`python -m experiments.train experiment=lm data=stdlib_base`"
        )
    with open_dict(cfg):
        cfg.model = trained.model
        cfg.data.tokenizer = OmegaConf.select(trained, "data.tokenizer")


def job(cfg: DictConfig) -> None:
    """One run; see `experiments.train.job`.

    Args:
      cfg: composed by Hydra.

    Raises:
      RunError: something to put right at the keyboard.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    goes_on = bool(cfg.resume) and (folder / runs.CONFIG).is_file()
    if not goes_on:  # a run that goes on does so with its own config
        take_model(cfg)
        chosen = " > ".join(cfg.get("transform") or {}) or "full"
        print(f"transforms, as the weight flows: {chosen}")
    train_job(cfg)


@hydra.main(version_base="1.3", config_path="conf", config_name="finetune")
def compose(cfg: DictConfig) -> float | None:
    """Hydra's entry; a sweeper that learns from its jobs needs the figure."""
    return guarded(lambda: once(cfg, job))


def main() -> None:
    """The command line."""
    start(compose, resume_arguments)


if __name__ == "__main__":
    main()
