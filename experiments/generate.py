"""Continues a prompt: `python -m experiments.generate run=FOLDER prompt="def "`."""

import codecs
import sys

import hydra
import jax
from omegaconf import DictConfig

from experiments import checkpoints, runs
from experiments.build import build_model
from experiments.commandline import guarded, quote_text
from experiments.sampling import encode, generate


def job(cfg: DictConfig) -> None:
    """Streams a continuation to stdout, each character as soon as its bytes are complete.

    Args:
      cfg: composed by Hydra, see conf/generate.yaml.

    Raises:
      RunError: no such run, or settings that cannot be served.
    """
    folder = runs.find_run(cfg.run)
    model = build_model(runs.load_config(folder))
    params = checkpoints.load_params(folder, jax.eval_shape(model.init, jax.random.key(0)))
    prompt = encode(str(cfg.prompt))
    try:
        stream = generate(
            model,
            params,
            prompt,
            length=cfg.length,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            seed=cfg.seed,
        )
    except ValueError as error:
        raise runs.RunError(str(error)) from error
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    sys.stdout.write(prompt.decode(errors="replace"))
    for byte in stream:
        sys.stdout.write(decoder.decode(bytes([byte])))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")


@hydra.main(version_base="1.3", config_path="conf", config_name="generate")
def main(cfg: DictConfig) -> None:
    """Hydra's entry."""
    guarded(lambda: job(cfg))


if __name__ == "__main__":
    sys.argv[1:] = quote_text(sys.argv[1:], keys=("prompt",))
    main()
