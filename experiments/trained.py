"""A finished run, opened again: its model, its parameters, and what turns text into its tokens."""

from pathlib import Path

import jax
import jax.numpy as jnp
from omegaconf import OmegaConf

from experiments import checkpoints, runs, trust
from experiments.build import build_model
from experiments.data.tokens import Tokenizer, open_tokenizer
from jaxpara.types import Model, Params


def open_model(folder: Path) -> tuple[Model, Params, Tokenizer]:
    """A finished run as a model of text.

    Args:
      folder: from `runs.find_run`.

    Returns:
      The model, its parameters and its tokenizer.

    Raises:
      RunError: the run has no parameters, is not of a language model, or asks for what is not
        trusted.
    """
    trained = trust.open_config(folder)
    runs.need(trained, folder, "model")
    model = build_model(trained)
    like = jax.eval_shape(model.init, jax.random.key(0))
    path = OmegaConf.select(trained, "data.tokenizer")
    if path is not None:
        trust.check_path(str(path), folder, key="data.tokenizer")
    try:
        tokenizer = open_tokenizer(path)
    except (ValueError, OSError) as error:
        raise runs.RunError(str(error)) from error
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    tokens = jax.eval_shape(model.apply, like, one).shape[-1]
    if tokens < tokenizer.vocab_size:
        raise runs.RunError(
            f"run={str(folder)!r} is not of a language model: it knows {tokens} tokens, and text "
            f"has {tokenizer.vocab_size}. Give a run of `python -m experiments.train experiment=lm`"
        )
    return model, checkpoints.load_params(folder, like), tokenizer
