"""Bits per byte of a finished run: `python -m experiments.evaluate run=FOLDER`."""

import hydra
import jax
from omegaconf import DictConfig

from experiments import checkpoints, runs, tables
from experiments.build import build_data, build_model
from experiments.commandline import guarded
from experiments.data.baselines import baselines
from experiments.judging import bits_per_byte


def job(cfg: DictConfig) -> float:
    """Scores the parameters of a run on the windows that the run itself used.

    Args:
      cfg: composed by Hydra, see conf/evaluate.yaml.

    Returns:
      Bits per byte.

    Raises:
      RunError: no such run, or settings that do not fit.
    """
    folder = runs.find_run(cfg.run)
    trained = runs.load_config(folder)
    model = build_model(trained)
    params = checkpoints.load_params(folder, jax.eval_shape(model.init, jax.random.key(0)))
    chosen = {
        name: trained.evaluation[name] if cfg[name] is None else cfg[name]
        for name in ("windows", "length", "batch_size")
    }
    corpus = build_data(trained)
    try:
        held_out = corpus.held_out(count=chosen["windows"], length=chosen["length"])
    except ValueError as error:
        raise runs.RunError(str(error)) from error
    bits = bits_per_byte(
        model,
        held_out,
        batch_size=chosen["batch_size"],
        bytes_per_token=corpus.bytes_per_token,
    )(params)
    tables.show_quality(
        bits,
        baselines(corpus.validation),
        where=f"{chosen['windows']} windows of {chosen['length']} bytes, {corpus.source}",
    )
    return bits


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Hydra's entry."""
    guarded(lambda: job(cfg))


if __name__ == "__main__":
    main()
