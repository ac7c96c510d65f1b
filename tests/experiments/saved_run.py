"""Runs that did not train, to read: a config and first parameters; and commands on them."""

import jax
import jax.numpy as jnp
import numpy as np
from omegaconf import OmegaConf

from experiments.faults import MODEL
from experiments.generate import FREE_TEXT
from experiments.run import checkpoints
from experiments.shell.build import build_model
from experiments.shell.commandline import quote_text
from jaxpara.types import TrainState
from tests.experiments.programs import ending

EVALUATION = {"windows": 6, "length": 16, "batch_size": 4}


def random_params(model, *, seed=0):
    """Parameters for which what came before matters; by NumPy, for compiling an init takes long."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        fan_in = leaf.shape[-2] if leaf.ndim > 2 else 4
        return jnp.asarray(2 * fan_in**-0.5 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(fill, jax.eval_shape(model.init, jax.random.key(0)))


def save_run(folder, *, model=MODEL, data=None, seed=0):
    """Writes a run's folder as a training that ended at once would have."""
    folder.mkdir()
    cfg = OmegaConf.create({"model": model, "data": data or {}, "evaluation": EVALUATION})
    OmegaConf.save(cfg, folder / "config.yaml")
    params = random_params(build_model(cfg), seed=seed)
    state = TrainState(params, (), jnp.zeros((), jnp.int32), jax.random.key(0))
    with checkpoints.saver(folder, keep_last=1, keep_best=0, best=("loss", "min")) as save:
        save(state, {}, None)
    return folder


def call(program, place, *arguments):
    """Runs a command in this process, from a folder; returns its error, if any."""
    return ending(program, place, *quote_text(arguments, keys=FREE_TEXT))
