"""Dotted names that configs give to be looked up: which are shipped, public, or gone."""

import importlib
import re
import types
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

CONF = Path(__file__).resolve().parents[1] / "conf"
GETTERS = ("hydra.utils.get_method", "hydra.utils.get_object")
OPEN = ("jaxpara", "optax")
# The modules of jaxpara whose names are public, as the pages in docs/api list them.
PUBLIC = ("jaxpara", "jaxpara.cells", "jaxpara.structure", "jaxpara.nn", "jaxpara.nn.mixers")
PUBLIC += ("jaxpara.train", "jaxpara.weights", "jaxpara.testing", "jaxpara.linen", "jaxpara.nnx")
OURS = ("jaxpara", "experiments")  # whose names change from version to version
PACKAGE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def targets(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every name that a config asks to be looked up.

    Args:
      node: plain values.
      key: of the node.

    Yields:
      The key where a name stands, and the name, which may be any value.
    """
    if isinstance(node, list):
        for number, child in enumerate(node):
            yield from targets(child, f"{key}[{number}]")
    if not isinstance(node, dict):
        return
    here = f"{key}." if key else ""
    if "_target_" in node:
        name, rest = node["_target_"], set(node) - {"_target_", "_convert_", "_recursive_"}
        if name in GETTERS and rest <= {"path"}:  # a config that was cut off has none
            yield f"{here}path", node.get("path")
        else:  # a getter with anything else is no shipped name either
            yield f"{here}_target_", name
    for name, child in node.items():
        yield from targets(child, f"{here}{name}")


@cache
def shipped() -> frozenset[str]:
    """The names of constructors, functions and objects in `experiments/conf`."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = set()
    for path in CONF.rglob("*.yaml"):
        values = yaml.load(path.read_text(encoding="utf-8"), loader) or {}
        values.pop("hydra", None)
        found |= {name for _, name in targets(values, "") if isinstance(name, str)}
    return frozenset(found)


def is_public(name: str) -> bool:
    """Whether a dotted name is public in jaxpara or optax, and made there.

    Args:
      name: such as `optax.adamw`.

    Returns:
      False for what such a module has imported from elsewhere, for modules, for attributes of
      objects, for names with an underscore at the front, and in the modules of jaxpara that are
      not public.
    """
    parts = name.split(".")
    if any(part.startswith("_") for part in parts) or not is_made_in(name, OPEN):
        return False
    place, _, last = name.rpartition(".")
    module = locate(place)
    if not isinstance(module, types.ModuleType) or last not in getattr(module, "__all__", [last]):
        return False
    if parts[0] != "jaxpara":
        return True
    # A package's __init__ holds what it offers; a plain file also holds what it imports.
    home = getattr(locate(name), "__module__", None)
    own = hasattr(module, "__path__") or home == module.__name__
    return place in PUBLIC and own


def is_made_in(name: str, packages: Sequence[str]) -> bool:
    """Whether a dotted name is in a package and everything on the way to it was made there.

    Args:
      name: such as `optax.adamw`.
      packages: names of packages.

    Returns:
      False where the way leads through something imported from elsewhere, as in
      `their.package.os.system`, and for modules.
    """
    if not any(name.startswith(f"{package}.") for package in packages):
        return False
    parts = name.split(".")
    found = None
    for end in range(1, len(parts) + 1):
        found = locate(".".join(parts[:end]))
        if isinstance(found, types.ModuleType):
            home = found.__name__
        else:
            home = getattr(found, "__module__", None) or type(found).__module__
        roots = [package.partition(".")[0] for package in packages]
        if not any(f"{home}.".startswith(f"{root}.") for root in roots):
            return False
    return found is not None and not isinstance(found, types.ModuleType)


def locate(name: str) -> Any:
    """What a dotted name stands for; None where there is nothing of that name.

    Args:
      name: of a module, or of what is in one.

    Returns:
      The object.
    """
    first, *rest = name.split(".")
    try:
        found = importlib.import_module(first)
        here = first
        for part in rest:
            here += f".{part}"
            if not hasattr(found, part):
                importlib.import_module(here)
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found


def is_gone(name: Any) -> bool:
    """Whether a name is of our own packages, and of another version of them.

    Args:
      name: any value.

    Returns:
      True if nothing has this name now.
    """
    return (
        isinstance(name, str)
        and PACKAGE.fullmatch(name) is not None
        and name.partition(".")[0] in OURS
        and locate(name) is None
    )


def present_names(name: str) -> list[str]:
    """The shipped names that end as a name of another version does.

    Args:
      name: such as `experiments.language_model.language_model`.

    Returns:
      The same last part in another module; else those with a prefix before it.
    """
    last = name.rpartition(".")[2]
    there = {one: one.rpartition(".")[2] for one in sorted(shipped())}
    same = [one for one, end in there.items() if end.replace("_", "") == last.replace("_", "")]
    return same or [one for one, end in there.items() if end.endswith(f"_{last}")]
