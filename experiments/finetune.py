"""Adapts a trained language model: `python -m experiments.finetune from=FOLDER transform=[lora]`.

A run's folder is like that of `experiments.train`, which also continues it: `resume=FOLDER`.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import jax
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments.adapt.shared_numbers import unused
from experiments.run import folders, opening, trust
from experiments.run.folder_arguments import PLACES, quote_folders
from experiments.run.plain_files import replacing
from experiments.run.resuming import resume_arguments
from experiments.run.seals import say
from experiments.shell.build import build_model
from experiments.shell.commandline import guarded
from experiments.shell.foreign import content_of
from experiments.sweep import outcomes
from experiments.sweep.sweep_folders import ordered, plain_config
from experiments.sweep.sweeps import once, start
from experiments.text.trained import tokenizer_of
from experiments.train import job as train_job

FOLDERS = ("from", *PLACES, trust.TRUST)
BASE = f"{folders.MAKE} data=stdlib_base name=base hydra.run.dir=runs/base"
TRANSFORMS = folders.REPOSITORY / "experiments" / "conf" / "transform"
OF_THE_BASE = ("model", "mixer", "cell", "solver", "contender", "data.tokenizer")


def check_transforms(arguments: Sequence[str]) -> None:
    """Refuses unknown transforms, and the same one twice in a chain.

    Hydra would suggest no other name for the first, and run the second as if it were listed once.

    Args:
      arguments: of the command line, without the program.

    Raises:
      RunError: names the known transforms.
    """
    there = sorted(path.stem for path in TRANSFORMS.glob("*.yaml"))
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key != "transform" or "(" in value:  # a sweep's choice(..), which Hydra reads itself
            continue
        for chosen in re.findall(r"\[[^\]]*\]|[^,\[\]]+", value.strip("'\"")):
            names = [name.strip() for name in chosen.strip("[]").split(",") if name.strip()]
            for name in names:
                if name not in (*there, "null"):
                    raise folders.RunError(
                        f"transform={chosen}: {name} is unknown; choose from {', '.join(there)}"
                    )
                if names.count(name) > 1:
                    raise folders.RunError(
                        f"transform={chosen}: {name} is listed {names.count(name)} times, but "
                        "a chain has each transform only once"
                    )


def take_model(cfg: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Puts the model and the tokenizer of the base run into a config.

    Args:
      cfg: composed, with `from`.
      overrides: of the command line, `KEY=VALUE`.

    Raises:
      RunError: there is no such run, it has no model, or it needs something that is not trusted;
        or an override contradicts it.
    """
    if OmegaConf.is_missing(cfg, "from"):
        folders.find_run(None, key="from", make=BASE)
    if cfg["from"] is None:
        return
    base = folders.find_run(cfg["from"], key="from", make=BASE)
    with content_of(base):
        trained = trust.open_config(base)
        if trained.get("model") is not None:
            jax.eval_shape(build_model(trained).init, jax.random.key(0))
    if trained.get("model") is None:
        raise folders.RunError(
            f"from={cfg['from']!r} is not of a language model: give a run of\n  {BASE}"
        )
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0].replace("/", ".")
        if any(key == one or key.startswith(f"{one}.") for one in OF_THE_BASE):
            raise folders.RunError(
                f"{override}: from={cfg['from']} brings its model and its tokenizer; leave it out, "
                "or give from=null to train a model of your own from scratch"
            )
    with open_dict(cfg):
        cfg.model = trained.model
        cfg.data.tokenizer = OmegaConf.select(trained, "data.tokenizer")
    tokenizer_of(base, trained)


def twin(cfg: DictConfig, beside: Sequence[Path]) -> Path | None:
    """Finds a finished run that differs only in numbers that no transform uses.

    Args:
      cfg: of the next run, with its model.
      beside: the folders of the runs that may be taken.

    Returns:
      The folder of this twin, if there is one.
    """
    idle = unused(cfg)

    def used(config: DictConfig) -> dict[str, Any]:
        return ordered({k: value for k, value in plain_config(config).items() if k not in idle})

    for other in beside if idle else ():
        try:
            trust.check_links(other)
            same = used(folders.load_config(other)) == used(cfg)
        except folders.RunError as error:
            say(f"{error}; this run does without it")
            continue
        if same:
            return other
    return None


def _copy(twin: Path, folder: Path, cfg: DictConfig) -> None:
    """Copies the run of a twin under this config and marks it."""
    trust.check_links(folder, written=True)
    opening.open_run(folder, cfg)
    with replacing(folder / folders.METRICS) as part:
        shutil.copyfile(twin / folders.METRICS, part)
    summary = folders.read_summary(twin)
    folders.close_run(folder, {**summary, "same_as": summary.get("same_as", str(twin))})
    print(f"the transforms have no {' or '.join(sorted(unused(cfg)))}: the same run as {twin}")


def job(cfg: DictConfig) -> None:
    """Does one run; see `experiments.train.job`. A sweep runs equal jobs only once.

    Args:
      cfg: composed by Hydra.

    Raises:
      RunError: the user must change something; says what.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    continues = bool(cfg.resume) and (folder / folders.CONFIG).is_file()
    if not continues:  # a continued run uses its own config
        take_model(cfg, list(HydraConfig.get().overrides.task))
        chosen = " > ".join(cfg.get("transform") or {}) or "full"
        print(f"transforms, as the weight flows: {chosen}")
        # Before this start of the sweep its base and its data may have been others.
        jobs = outcomes.jobs()
        same = twin(cfg, [job.folder for job in jobs if job.new and job.status == "finished"])
        if same is not None:
            return _copy(same, folder, cfg)
    train_job(cfg)


@hydra.main(version_base="1.3", config_path="conf", config_name="finetune")
def compose(cfg: DictConfig) -> float | None:
    """Hydra's entry; returns the figure for sweepers that optimise it."""
    return guarded(lambda: once(cfg, job), cfg)


def main() -> None:
    """The command line."""

    def prepare(arguments: list[str]) -> list[str]:
        check_transforms(arguments)
        return quote_folders(resume_arguments(arguments), keys=FOLDERS)

    start(compose, prepare)


if __name__ == "__main__":
    main()
