"""Builds objects from configs, once, in `main`; everything below takes plain Python values.

Some constructors build other objects themselves, from nodes that they are given; `spelled` guards
them.
"""

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
from experiments.shell.explanations import of_signature
from experiments.shell.spelled import building, spelled_out
from jaxpara import Reparam, chain, sequential
from jaxpara.nn.mixers import recurrent
from jaxpara.types import Model, Params


def _target(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


RECURRENT, SEQUENTIAL = _target(recurrent), {"_target_": _target(sequential)}
OBSERVED = (
    "experiments.text.solver_check.observed"  # by name: the module is in a layer above this one
)


class Parts(NamedTuple):
    """The parts of a training run.

    Attributes:
      task: of group `task`: model, data and evaluation.
      optimizer: of optax.
      projection: applied to the parameters after each step, or None.
      sinks: of numbers, from group `logger`.
    """

    task: Task
    optimizer: optax.GradientTransformation
    projection: Callable[[Params], Params] | None
    sinks: list[Open]


class Solved(NamedTuple):
    """One model, its recurrences solved in several ways.

    Attributes:
      model: with the solver of training.
      sequential: solved step by step.
      parallel: with the parallel solver to check.
      observed: the parallel model, whose state also reports each layer's solve; None
        if no layer is recurrent.
      parallel_name: of that solver.
    """

    model: Model
    sequential: Model
    parallel: Model
    observed: Model | None
    parallel_name: str


def make(cfg: Any) -> Any:
    """Builds an object from a config that is the user's own, or was checked.

    Args:
      cfg: composed, or from `trust.open_config`.

    Returns:
      The object.
    """
    with building(cfg, OBSERVED, SEQUENTIAL["_target_"]):
        return instantiate(cfg)


def _make_within(node: Any, **arguments: Any) -> Any:
    """Builds an object inside a constructor, from a node of the config being built."""
    return instantiate(spelled_out(node), **arguments)


def _recurrent(node: Any):
    """Yields every recurrent mixer below a node."""
    if isinstance(node, DictConfig):
        if node.get("_target_") == RECURRENT:
            yield node
        for key in node:
            yield from _recurrent(node[key])
    elif isinstance(node, ListConfig):
        for child in node:
            yield from _recurrent(child)


def _with(model: DictConfig, **changes: Any) -> tuple[Model, int]:
    """Returns the model with changed recurrent mixers, and their number."""
    changed = copy.deepcopy(model)
    mixers = list(_recurrent(changed))
    for mixer in mixers:
        mixer.update(changes)
    return _make_within(changed), len(mixers)


def solve_in_ways(model: DictConfig, parallel: DictConfig) -> Solved:
    """Builds one model with several solvers.

    Args:
      model: its config, resolved.
      parallel: config of the parallel solver to check during training.

    Returns:
      The models; they have the same parameters.
    """
    seen, mixers = _with(model, _target_=OBSERVED, solver=parallel)
    return Solved(
        model=_make_within(model),
        sequential=_with(model, solver=SEQUENTIAL)[0],
        parallel=_with(model, solver=parallel)[0],
        observed=seen if mixers else None,
        parallel_name=parallel._target_.rpartition(".")[2],
    )


def each_of(members: Mapping[Any, Any], where: Any = None) -> dict[str, Reparam]:
    """Builds reparameterisations.

    Args:
      members: their configs by name.
      where: the leaves, for members that do not set it.

    Returns:
      The reparameterisations by name, in order.

    Raises:
      RunError: one of them refuses a setting, or is not spelled out in the config being built.
    """
    if not isinstance(members, Mapping):
        raise RunError(f"members is {type(members).__name__}: give configs by name")
    found = {}
    others = [name for name, node in members.items() if not isinstance(node, Mapping)]
    for name, node in ((name, members[name]) for name in members if name not in others):
        try:
            given = {} if "where" in node else {"where": where}
            found[str(name)] = _make_within(node, **given)
        except InstantiationException as error:
            if not isinstance(error.__cause__, (ValueError, TypeError)):
                raise
            text = f"{name}: {error.__cause__}"
            if isinstance(error.__cause__, TypeError):
                text = of_signature(f"transform.{name}", str(node["_target_"]), error.__cause__)
            raise RunError(text) from error
    if others:
        raise RunError(
            f"transform.{others[0]}={members[others[0]]}: expected the config of a transform;\n"
            "leave it out, or give one that --cfg job shows for transform=[lora]"
        )
    return found


def chain_of(members: DictConfig | None, where: Any = None) -> Reparam | None:
    """Chains reparameterisations in the order of the configs.

    Args:
      members: configs by name.
      where: as for `each_of`.

    Returns:
      The chain; None if there are none.
    """
    found = each_of(members or {}, where)
    return chain(*found.values()) if found else None


def build_transform(cfg: DictConfig) -> Reparam | None:
    """Builds only the reparameterisation.

    Args:
      cfg: composed, or the resolved config of a run.

    Returns:
      The chain of `transform`; None if there are none.
    """
    with building(cfg.get("transform")):
        return chain_of(cfg.get("transform"), cfg.get("where"))


def build_model(cfg: DictConfig) -> Model:
    """Builds only the model, for `generate`.

    Args:
      cfg: composed, or the resolved config of a run.

    Returns:
      The model; if it is finetuned, its parameters are the state of the transforms.
    """
    transform = build_transform(cfg)
    model = make(cfg.model)
    return model if transform is None else transform(model)


def build_data(cfg: DictConfig) -> Data:
    """Builds only the data, for `evaluate`.

    Args:
      cfg: composed, or the resolved config of a run.

    Returns:
      The data.
    """
    return make(cfg.data)


def _other(key: str, made: Any, expected: str) -> RunError:
    return RunError(
        f"{key} makes {type(made).__name__}: expected {expected};\n"
        f"give {key}._target_=NAME of one, without _partial_, as --cfg job shows for {key}"
    )


def build(cfg: DictConfig) -> Parts:
    """Builds all objects of a training run.

    Args:
      cfg: composed by Hydra.

    Returns:
      The parts.

    Raises:
      RunError: a part is something else than is expected there.
    """
    chosen = cfg.get("logger") or {}
    if not isinstance(chosen, Mapping):
        raise RunError(
            f"logger={chosen}: expected loggers by name;\ntype for example logger=tensorboard"
        )
    task, optimizer, projection = make(cfg.task), make(cfg.optim), make(cfg.projection)
    if not all(hasattr(task, name) for name in ("model", "loss")):
        raise _other("task", task, "a Task, as experiments.run.task describes it")
    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        raise _other("optim", optimizer, "an optimiser of optax")
    if projection is not None and not callable(projection):
        raise _other("projection", projection, "a function of the parameters")
    return Parts(
        task=task,
        optimizer=optimizer,
        projection=projection,
        sinks=[make(one) for one in chosen.values()],
    )
