"""Opens a finished run: its model, its parameters and its tokenizer."""

from pathlib import Path

import jax
import jax.numpy as jnp
from omegaconf import DictConfig, OmegaConf

from experiments.data.tokens import Tokenizer, open_tokenizer
from experiments.run import checkpoints, folders, trust
from experiments.shell.build import build_model
from jaxpara.types import Model, Params


def tokenizer_of(folder: Path, cfg: DictConfig) -> Tokenizer:
    """Opens the tokenizer of a run.

    Args:
      folder: of the run.
      cfg: its config, from `trust.open_config`.

    Returns:
      The tokenizer.

    Raises:
      RunError: it is elsewhere and not trusted, cannot be read, or is not the one that the run was
        trained with.
    """
    path = OmegaConf.select(cfg, "data.tokenizer")
    if path is not None:
        trust.check_path(str(path), folder, key="data.tokenizer")
    try:
        tokenizer = open_tokenizer(path)
    except (ValueError, OSError) as error:
        raise folders.RunError(str(error)) from error
    known = checkpoints.data_of(folder).get("tokenizer", tokenizer.digest)
    if known != tokenizer.digest:
        raise folders.RunError(
            f"{path or 'data.tokenizer=null'} is not the tokenizer that {folder} was trained with: "
            f"its digest was {known!r} and is {tokenizer.digest!r}. Restore that file"
        )
    return tokenizer


def open_model(folder: Path) -> tuple[Model, Params, Tokenizer]:
    """Opens a finished run as a language model.

    Args:
      folder: from `folders.find_run`.

    Returns:
      The model, its parameters and its tokenizer.

    Raises:
      RunError: the run has no parameters, is not a language model's, or needs something that is not
        trusted.
    """
    trained = trust.open_config(folder)
    folders.need(trained, folder, "model")
    model = build_model(trained)
    if not isinstance(model, Model):
        raise folders.RunError(
            f"{folder / folders.CONFIG}: model= makes a {type(model).__name__}, and a "
            "jaxpara.types.Model was expected: name a function that returns one"
        )
    like = jax.eval_shape(model.init, jax.random.key(0))
    tokenizer = tokenizer_of(folder, trained)
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    tokens = jax.eval_shape(model.apply, like, one).shape[-1]
    if tokens < tokenizer.vocab_size:
        raise folders.RunError(
            f"run={str(folder)!r} is not of a language model: it knows {tokens} tokens, and text "
            f"has {tokenizer.vocab_size}. Give a run of `python -m experiments.train experiment=lm`"
        )
    return model, checkpoints.load_params(folder, like), tokenizer
