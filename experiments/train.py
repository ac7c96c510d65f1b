"""Trains a byte-level language model: `python -m experiments.train experiment=lm`."""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments import runs
from experiments.build import build
from experiments.commandline import guarded, quote_text
from experiments.language_model import Settings, check_settings, train


def job(cfg: DictConfig) -> None:
    """One run, from its config.

    Args:
      cfg: composed by Hydra.

    Raises:
      RunError: something to put right at the keyboard.
      SystemExit: 130 after Ctrl-C, with everything saved.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    parts = build(cfg)
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    settings = Settings(**{name: values[name] for name in Settings._fields})
    check_settings(parts, settings)
    runs.open_run(folder, cfg)
    summary = train(parts, settings, folder)
    if summary["interrupted"]:
        print(
            f"interrupted after step {summary['steps']} of {settings.steps}: "
            f"parameters, metrics and figures are in {folder}\n"
            f"look at them with: python -m experiments.evaluate run={folder}"
        )
        raise SystemExit(130)
    print(f"everything is in {folder}")


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """Hydra's entry."""
    guarded(lambda: job(cfg))


if __name__ == "__main__":
    sys.argv[1:] = quote_text(sys.argv[1:], keys=("sample.prompt",))
    main()
