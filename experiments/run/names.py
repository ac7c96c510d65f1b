"""Dotted names in configs: which of them are shipped, public, or gone."""

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
# A part of a name that is not public: with a leading underscore, or of the package's own tests.
PRIVATE = re.compile(r"^_|(^|_)tests?($|_)")
PACKAGE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def targets(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yields every name that a config would look up.

    Args:
      node: plain values.
      key: of the node.

    Yields:
      The key of a name, and the name, which may be any value.
    """
    if isinstance(node, list):
        for number, child in enumerate(node):
            yield from targets(child, f"{key}[{number}]")
    if not isinstance(node, dict):
        return
    here = f"{key}." if key else ""
    if "_target_" in node:
        name, rest = node["_target_"], set(node) - {"_target_", "_convert_", "_recursive_"}
        if name in GETTERS and rest <= {"path"}:  # a truncated config has none
            yield f"{here}path", node.get("path")
        else:  # a getter with other arguments is not a shipped name either
            yield f"{here}_target_", name
    for name, child in node.items():
        yield from targets(child, f"{here}{name}")


@cache
def shipped() -> frozenset[str]:
    """Lists the constructors, functions and objects that `experiments/conf` names."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = set()
    for path in CONF.rglob("*.yaml"):
        values = yaml.load(path.read_text(encoding="utf-8"), loader) or {}
        values.pop("hydra", None)
        found |= {name for _, name in targets(values, "") if isinstance(name, str)}
    return frozenset(found)


def is_public(name: str) -> bool:
    """Whether a dotted name is public in jaxpara or optax, and defined there.

    Args:
      name: such as `optax.adamw`.

    Returns:
      False for imports from elsewhere, modules, attributes of objects, names with a leading
      underscore, names in modules of tests, and in modules of jaxpara that are not public.
    """
    parts = name.split(".")
    if any(PRIVATE.search(part) for part in parts) or not is_made_in(name, OPEN):
        return False
    place, _, last = name.rpartition(".")
    module = locate(place)
    if not isinstance(module, types.ModuleType) or last not in getattr(module, "__all__", [last]):
        return False
    if parts[0] != "jaxpara":
        return True
    # A package's __init__ holds its public names; a plain file also holds its imports.
    home = getattr(locate(name), "__module__", None)
    own = hasattr(module, "__path__") or home == module.__name__
    return place in PUBLIC and own


def is_made_in(name: str, packages: Sequence[str]) -> bool:
    """Whether a dotted name is in a package and every part of it is defined there.

    Args:
      name: such as `optax.adamw`.
      packages: names of packages.

    Returns:
      False for modules, and where a part is imported from elsewhere, as in
      `their.package.os.system`.
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
    """Looks up a dotted name; None if it does not exist.

    Args:
      name: of a module or something in it.

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
    """Whether a name belongs to another version of our own packages.

    Args:
      name: any value.

    Returns:
      True if the name is ours and does not exist now.
    """
    return (
        isinstance(name, str)
        and PACKAGE.fullmatch(name) is not None
        and name.partition(".")[0] in OURS
        and locate(name) is None
    )


def present_names(name: str) -> list[str]:
    """Finds the shipped names that end like a name of another version.

    Args:
      name: such as `experiments.language_model.language_model`.

    Returns:
      Names with the same last part in another module; if there are none, those with a prefix
      before it.
    """
    last = name.rpartition(".")[2]
    there = {one: one.rpartition(".")[2] for one in sorted(shipped())}
    same = [one for one, end in there.items() if end.replace("_", "") == last.replace("_", "")]
    return same or [one for one, end in there.items() if end.endswith(f"_{last}")]
