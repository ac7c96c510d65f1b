"""Exports a run's LoRA for Hugging Face PEFT: `python -m experiments.export_adapters run=F`."""

import sys
from pathlib import Path

import hydra
import jax
from omegaconf import DictConfig, OmegaConf

from experiments.adapt import peft_files
from experiments.run import checkpoints, folders, outputs, trust
from experiments.run.folder_arguments import quote_folders
from experiments.shell.build import build_model
from experiments.shell.commandline import command, guarded
from experiments.shell.foreign import content_of


def export(cfg: DictConfig) -> None:
    """Writes PEFT's two files.

    Args:
      cfg: see conf/export_adapters.yaml.

    Raises:
      RunError: no such run, it has transforms other than LoRA, or files are there.
    """
    names = OmegaConf.to_container(cfg)["names"] or {}
    if not isinstance(names, dict):
        raise folders.RunError(
            f"names={names}: expected modules by the path of their leaf;\n"
            "type for example \"names={blocks/0/out/kernel: 'model.layers.{}.out'}\""
        )
    folder = folders.find_run(cfg.run)
    output = Path(cfg.output) if cfg.output else folder / "peft"
    if output.is_symlink() and output.parent.resolve().is_relative_to(folder.resolve()):
        raise folders.RunError(
            f"{output} is a link in the run's folder, through which nothing is written: remove it, "
            "or give output=FOLDER"
        )
    for name in (peft_files.TENSORS, peft_files.CONFIG):
        outputs.new(output / name)
    with content_of(folder):
        trained = trust.open_config(folder)
        folders.need(trained, folder, "model")
        like = jax.eval_shape(build_model(trained).init, jax.random.key(0))
        state = checkpoints.load_params(folder, like, which="last")
        peft_files.save(output, state, names={str(glob): str(name) for glob, name in names.items()})
    print(f"{output / peft_files.TENSORS} and {output / peft_files.CONFIG}")


@command
@hydra.main(version_base="1.3", config_path="conf", config_name="export_adapters")
def main(cfg: DictConfig) -> None:
    """Hydra's entry."""
    guarded(lambda: export(cfg), cfg)


if __name__ == "__main__":
    sys.argv[1:] = quote_folders(sys.argv[1:], keys=("run", "output", trust.TRUST))
    main()
