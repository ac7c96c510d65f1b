"""From config to objects, once, in `main`; below it there are plain Python values."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig

from experiments.data.corpus import Data
from experiments.run.folders import RunError
from experiments.run.loggers import Open
from experiments.run.task import Task
from jaxpara import Reparam, chain, sequential
from jaxpara.nn.mixers import recurrent
from jaxpara.types import Model, Params


def _target(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


RECURRENT, SEQUENTIAL = _target(recurrent), {"_target_": _target(sequential)}
OBSERVED = "experiments.text.solver_check.observed"  # of a floor above this one


class Parts(NamedTuple):
    """What a training run is made of.

    Attributes:
      task: of group `task`: what is trained, on what, and how it is judged.
      optimizer: of optax.
      projection: applied to the parameters after each step, or None.
      sinks: of numbers, those of group `logger`.
    """

    task: Task
    optimizer: optax.GradientTransformation
    projection: Callable[[Params], Params] | None
    sinks: list[Open]


class Solved(NamedTuple):
    """One model, its recurrences solved in several ways.

    Attributes:
      model: with the solver that trains.
      sequential: solved step by step.
      parallel: with the parallel solver that is checked.
      observed: the parallel model, whose state also reports each layer's solve; None
        where no layer is recurrent.
      parallel_name: of that solver.
    """

    model: Model
    sequential: Model
    parallel: Model
    observed: Model | None
    parallel_name: str


def _recurrent(node: Any):
    """Every recurrent mixer below a node."""
    if isinstance(node, DictConfig):
        if node.get("_target_") == RECURRENT:
            yield node
        for key in node:
            yield from _recurrent(node[key])
    elif isinstance(node, ListConfig):
        for child in node:
            yield from _recurrent(child)


def _with(model: DictConfig, **changes: Any) -> tuple[Model, int]:
    """The model with its recurrent mixers changed, and how many there are."""
    changed = copy.deepcopy(model)
    mixers = list(_recurrent(changed))
    for mixer in mixers:
        mixer.update(changes)
    return instantiate(changed), len(mixers)


def solve_in_ways(model: DictConfig, parallel: DictConfig) -> Solved:
    """Builds one model with several solvers.

    Args:
      model: its config, resolved.
      parallel: config of the parallel solver that is checked beside the training.

    Returns:
      The models; they have the same parameters.
    """
    seen, mixers = _with(model, _target_=OBSERVED, solver=parallel)
    return Solved(
        model=instantiate(model),
        sequential=_with(model, solver=SEQUENTIAL)[0],
        parallel=_with(model, solver=parallel)[0],
        observed=seen if mixers else None,
        parallel_name=parallel._target_.rpartition(".")[2],
    )


def each_of(members: Mapping[Any, Any], where: Any = None) -> dict[str, Reparam]:
    """Builds reparameterisations.

    Args:
      members: their configs by name.
      where: the leaves, for those that do not say it themselves.

    Returns:
      They by name, in order.

    Raises:
      RunError: a setting that one of them refuses.
    """
    found = {}
    for name, node in members.items():
        try:
            found[str(name)] = instantiate(node, **({} if "where" in node else {"where": where}))
        except InstantiationException as error:
            if not isinstance(error.__cause__, (ValueError, TypeError)):
                raise
            raise RunError(f"{name}: {error.__cause__}") from error
    return found


def chain_of(members: DictConfig | None, where: Any = None) -> Reparam | None:
    """Chains reparameterisations, in the order in which they stand.

    Args:
      members: configs by name.
      where: as for `each_of`.

    Returns:
      The chain; None where there are none.
    """
    found = each_of(members or {}, where)
    return chain(*found.values()) if found else None


def build_model(cfg: DictConfig) -> Model:
    """The model alone, as `generate` needs it.

    Args:
      cfg: composed, or the resolved config of a run.

    Returns:
      The model; of a finetuned one its parameters are the state of the transforms.
    """
    transform = chain_of(cfg.get("transform"), cfg.get("where"))
    model = instantiate(cfg.model)
    return model if transform is None else transform(model)


def build_data(cfg: DictConfig) -> Data:
    """The data alone, as `evaluate` needs it.

    Args:
      cfg: composed, or the resolved config of a run.

    Returns:
      The data.
    """
    return instantiate(cfg.data)


def build(cfg: DictConfig) -> Parts:
    """All objects of a training run.

    Args:
      cfg: composed by Hydra.

    Returns:
      The parts.
    """
    chosen = cfg.get("logger") or {}
    return Parts(
        task=instantiate(cfg.task),
        optimizer=instantiate(cfg.optim),
        projection=instantiate(cfg.projection),
        sinks=[instantiate(one) for one in chosen.values()],
    )
