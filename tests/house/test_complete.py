"""Every public factory has a row in its wing's conformance table, a config, and a docs entry.

A factory is told by what it returns. So a new one is asked for its row without being listed here.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

import jaxpara as jp
from jaxpara.nn.mixers import Mixer
from jaxpara.recurrence.choice import Auto
from tests.house.test_docs import METHODS, PUBLIC, ROOT
from tests.nn import test_nn
from tests.recurrence import test_cells, test_conformance
from tests.weights import test_weights_dtypes


class Kind(NamedTuple):
    """Factories of one type: what they return, where their rows are, and their configs."""

    returns: tuple[Any, ...]
    rows: dict[str, Any]
    configs: str


SOLVERS = {**test_conformance.TABLE, "fused": test_conformance.KERNEL}
MIXERS = {**test_nn.MODELS, "recurrent": test_nn.MODELS["para_gru"]}
KINDS = {
    "solver": Kind((jp.Solver, Auto), SOLVERS, "solver"),
    "cell": Kind((jp.Cell,), test_cells.TABLE, "cell"),
    "reparameterisation": Kind((jp.Reparam,), test_weights_dtypes.TABLE, "transform"),
    "mixer": Kind((Callable[[int], Mixer],), MIXERS, "mixer"),
}


@functools.cache
def targets(group: str) -> str:
    """All that the configs of a group build, as one text."""
    folder = ROOT / "experiments" / "conf" / group
    return "\n".join(path.read_text() for path in sorted(folder.rglob("*.yaml")))


def missing(name: str, factory: Any, kind: Kind, documents: str) -> list[str]:
    """What a factory lacks."""
    last = name.rsplit(".", 1)[-1]
    found = []
    if not any(key == last or key.startswith(last + "_") for key in kind.rows):
        found.append(f"no row {last!r} in the conformance table, which has {list(kind.rows)}")
    if f"jaxpara.{name}\n" not in targets(kind.configs) + "\n":
        found.append(f"no config in experiments/conf/{kind.configs} builds jaxpara.{name}")
    if f"`{name}`" not in documents and f"`{last}`" not in documents:
        found.append(f"no entry `{name}` in docs/methods")
    return found


def factories(public: dict[str, Any]) -> list[tuple[str, Any, Kind]]:
    """Public functions that make something of a kind out of something else."""
    found = []
    for name, value in public.items():
        hints = typing.get_type_hints(value) if inspect.isfunction(value) else {}
        made = hints.pop("return", None)
        kinds = [k for k in KINDS.values() if made in k.returns and made not in hints.values()]
        found += [(name, value, kind) for kind in kinds]
    return found


FOUND = factories(PUBLIC)


@pytest.mark.parametrize(("name", "factory", "kind"), FOUND, ids=[name for name, *_ in FOUND])
def test_every_factory_has_a_row_a_config_and_an_entry(name, factory, kind):
    assert not missing(name, factory, kind, METHODS)


def test_every_kind_has_factories():
    for kind in KINDS.values():
        assert len([name for name, _, k in FOUND if k is kind]) > 1


def test_a_factory_without_row_config_or_entry_is_found():
    def new_solver() -> jp.Solver:
        return jp.newton()

    module = types.SimpleNamespace(new_solver=new_solver)
    ((name, factory, kind),) = factories(vars(module))
    assert [text.split(" ")[1] for text in missing(name, factory, kind, METHODS)] == [
        "row",
        "config",
        "entry",
    ]
