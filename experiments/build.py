"""From config to objects, once, in `main`; below it there are plain Python values."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig

from experiments.data.corpus import Corpus
from jaxpara.types import Model, Params

RECURRENT = "jaxpara.nn.mixers.recurrent"
OBSERVED = "experiments.solver_check.observed"
SEQUENTIAL = {"_target_": "jaxpara.sequential"}


class Parts(NamedTuple):
    """What a training run is made of.

    Attributes:
      model: with the solver that trains.
      sequential: the same model, its recurrences solved step by step.
      parallel: the same model with the parallel solver that is checked.
      observed: the parallel model, whose state also reports each layer's solve; None
        where no layer is recurrent.
      parallel_name: of that solver.
      optimizer: of optax.
      projection: applied to the parameters after each step, or None.
      corpus: training and validation bytes.
    """

    model: Model
    sequential: Model
    parallel: Model
    observed: Model | None
    parallel_name: str
    optimizer: optax.GradientTransformation
    projection: Callable[[Params], Params] | None
    corpus: Corpus


def _with_solver(cfg: DictConfig, solver: Any) -> DictConfig:
    changed = copy.deepcopy(cfg)
    changed.solver = solver
    return changed


def _retarget(node: Any, old: str, new: str) -> int:
    """Replaces a `_target_` everywhere below a node, in place; returns how often."""
    count = 0
    if isinstance(node, DictConfig):
        if node.get("_target_") == old:
            node._target_ = new
            count += 1
        count += sum(_retarget(node[key], old, new) for key in node)
    elif isinstance(node, ListConfig):
        count += sum(_retarget(child, old, new) for child in node)
    return count


def build_model(cfg: DictConfig) -> Model:
    """The model alone, as `generate` needs it.

    Args:
      cfg: composed, or the resolved config of a run.

    Returns:
      The model.
    """
    return instantiate(cfg.model)


def build_corpus(cfg: DictConfig) -> Corpus:
    """The corpus alone, as `evaluate` needs it.

    Args:
      cfg: composed, or the resolved config of a run.

    Returns:
      The corpus.
    """
    return instantiate(cfg.data)


def build(cfg: DictConfig) -> Parts:
    """All objects of a training run.

    Args:
      cfg: composed by Hydra.

    Returns:
      The parts.
    """
    parallel = _with_solver(cfg, cfg.parallel)
    watched = copy.deepcopy(parallel)
    recurrent = _retarget(watched.mixer, RECURRENT, OBSERVED)
    return Parts(
        model=build_model(cfg),
        sequential=build_model(_with_solver(cfg, SEQUENTIAL)),
        parallel=build_model(parallel),
        observed=build_model(watched) if recurrent else None,
        parallel_name=cfg.parallel._target_.rpartition(".")[2],
        optimizer=instantiate(cfg.optim),
        projection=instantiate(cfg.projection),
        corpus=build_corpus(cfg),
    )
