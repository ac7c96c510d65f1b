"""Suggestions for misspelt keys."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

import yaml
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments.run.checks import settings_of
from experiments.run.folder_arguments import PLACES
from experiments.run.folders import RunError
from experiments.run.limits import RULES
from experiments.run.names import CONF

OPEN = ("grid",)  # sections of which the user gives the names, where they are


def near_misses(name: str, there: Sequence[str], *, count: int = 3) -> list[str]:
    """Suggests keys for a misspelt one.

    Args:
      name: the unknown key, or a path to it.
      there: the known keys.
      count: the most suggestions.

    Returns:
      The nearest, best first; a key of which only the last name is near also counts.
    """
    name = name.lower()
    last = name.split(".")[-1]

    def likeness(key: str) -> float:
        key = key.lower()
        return max(
            difflib.SequenceMatcher(None, name, key).ratio(),
            difflib.SequenceMatcher(None, last, key.split(".")[-1]).ratio() - 0.01,
            0.9 if last == _initials(key.split(".")[-1]) else 0.0,
        )

    # Of equally good ones the outermost comes first: inner ones often refer to it.
    ranked = sorted(there, key=lambda key: (-likeness(key), key.count(".")))
    least = max(0.7, likeness(ranked[0]) - 0.1) if ranked else 1.0
    return [key for key in ranked[:count] if likeness(key) > least]


def _initials(name: str) -> str:
    """`lr` of `learning_rate`; nothing of a single word."""
    words = name.split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else ""


def check_additions(overrides: Sequence[str], cfg: DictConfig, *, hydra: Any = None) -> None:
    """Refuses `+KEY=VALUE` if nothing would read the key.

    Constructors refuse what they do not have. Left over are keys outside of their settings; one
    that another setting refers to (`model.width=${mine}`) is read.

    Args:
      overrides: of the command line.
      cfg: composed with them.
      hydra: Hydra's own config, which may refer to a key too.

    Raises:
      RunError: suggests a key, or the command that reads it.
    """
    for override in overrides:
        if not override.startswith("+"):
            continue
        typed, _, value = override.partition("=")
        name, _, package = typed.lstrip("+").partition("@")
        key = (package or name).replace("/", ".")
        parent, _, last = key.rpartition(".")
        if key in PLACES:
            continue
        node = OmegaConf.select(cfg, parent) if parent else cfg
        if not isinstance(node, DictConfig) or "_target_" in node:
            continue
        added = node.get(last)
        if parent and isinstance(added, DictConfig) and "_target_" in added:
            continue  # one more object beside others, by its name
        if _refers([cfg, hydra], key) or _is_old(overrides, key):
            continue
        raise RunError(f"{typed}={value}: nothing reads {key}{_instead(key, value, cfg)}")


def _refers(configs: Sequence[Any], key: str) -> bool:
    """Whether a setting refers to a key, or to a part of it."""
    plain = [OmegaConf.to_container(c, resolve=False) for c in configs if c is not None]
    last = re.escape(key.rpartition(".")[2])
    return re.search(rf"\$\{{[^}}]*\b{last}\b", repr(plain)) is not None


def _is_old(overrides: Sequence[str], key: str) -> bool:
    """Whether a key is there without the additions of the command line, perhaps as null."""
    rest = [override for override in overrides if not override.startswith("+")]
    cfg = compose(HydraConfig.get().job.config_name, rest)
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    return isinstance(node, DictConfig) and (last in node or parent in OPEN)


def _instead(key: str, value: str, cfg: DictConfig) -> str:
    known = [name for name, _ in settings_of(cfg) if name != key]
    if near := near_misses(key, [*known, *RULES], count=1):
        ends = [name for name in known if f".{name}".endswith(f".{near[0]}")]
        meant = min(ends, key=lambda name: name.count("."), default="")
        if meant:
            return f"; did you mean {meant}?\ntype {meant}={value}"
    if others := readers(key)[:2]:
        does = "does" if len(others) == 1 else "do"
        return f" here; {' and '.join(others)} {does}\n--cfg job shows all settings"
    return "\n--cfg job shows all settings, --help the groups"


def readers(key: str) -> list[str]:
    """Finds the commands that have a setting or a group at their top.

    Args:
      key: its name.

    Returns:
      Names such as `experiments.finetune`.
    """
    found = []
    for path in sorted(CONF.glob("*.yaml")):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        named = config.get("hydra", {}).get("help", {}).get("app_name")
        groups = [
            name
            for entry in config.get("defaults", ())
            if isinstance(entry, dict)
            for name in entry
        ]
        if named and key in (*config, *groups):
            found.append(named)
    return found
