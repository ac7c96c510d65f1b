"""Suggestions for misspelt keys."""

import difflib
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from experiments.run.checks import settings_of
from experiments.run.folders import RunError
from experiments.run.limits import RULES, rule_for


def near_misses(name: str, there: Sequence[str], *, count: int = 3) -> list[str]:
    """Suggests keys for a misspelt one.

    Args:
      name: the unknown key, or a path to it.
      there: the known keys.
      count: the most suggestions.

    Returns:
      The nearest, best first; a key of which only the last name is near also counts.
    """
    last = name.split(".")[-1]

    def likeness(key: str) -> float:
        return max(
            difflib.SequenceMatcher(None, name, key).ratio(),
            difflib.SequenceMatcher(None, last, key.split(".")[-1]).ratio() - 0.01,
        )

    # Of equally good ones the outermost comes first: inner ones often refer to it.
    ranked = sorted(there, key=lambda key: (-likeness(key), key.count(".")))
    least = max(0.7, likeness(ranked[0]) - 0.1) if ranked else 1.0
    return [key for key in ranked[:count] if likeness(key) > least]


def check_additions(overrides: Sequence[str], cfg: DictConfig) -> None:
    """Refuses `+KEY=VALUE` if the key is nearly a known one: nothing would read it.

    Args:
      overrides: of the command line.
      cfg: composed with them.

    Raises:
      RunError: suggests a key.
    """
    added = [one[1:].partition("=") for one in overrides if one.startswith("+")]
    known = [key for key, _ in settings_of(cfg)]
    there = known + list(RULES)
    for key, _, value in added:
        key = key.lstrip("+")
        parent, _, last = key.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        read_by_name = isinstance(node, DictConfig) and "_target_" in node
        if "@" in key or "/" in key or read_by_name or not isinstance(node, DictConfig):
            continue
        if isinstance(node.get(last), DictConfig) or rule_for(key) is not None:
            continue
        others = [name for name in there if name not in (key, last)]
        if near := near_misses(key, others, count=1):
            ends = [name for name in known if f".{name}".endswith(f".{near[0]}")]
            meant = min(ends, key=lambda name: name.count("."), default=f"+{near[0]}")
            raise RunError(
                f"+{key}={value}: nothing reads {key}; did you mean {meant}?\ntype {meant}={value}"
            )
