"""Refuses `~KEY` where something reads the key: what is deleted has no value to fall back on."""

from collections.abc import Sequence

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from experiments.run.folders import RunError
from experiments.run.limits import rule_for
from experiments.run.names import CONF

OF_A_TASK = ("evaluation", "check", "sample")  # which some tasks do not read
OF_A_TRANSFORM = ("bits", "rank")  # whoever refers to one says that it is missing


def check_deletions(overrides: Sequence[str], cfg: DictConfig, command: str) -> None:
    """Refuses the deletion of a setting that is needed.

    Of objects, settings may be deleted: their constructors have defaults, or name what they need.
    So may settings of a group that may be null.

    Args:
      overrides: of the command line.
      cfg: composed with them.
      command: the name of its config, such as `train`.

    Raises:
      RunError: names the deleted setting.
    """
    parser = OverridesParser.create()
    for typed in (one for one in overrides if one.startswith("~")):
        key = parser.parse_override(typed).key_or_group
        outer, _, last = key.rpartition(".")
        parent = OmegaConf.select(cfg, outer) if outer else cfg
        if not isinstance(parent, DictConfig) or last in parent:
            continue
        if last == "_target_":
            raise RunError(f"{typed}: {outer} cannot be built without it; leave {typed} out")
        if "_target_" not in parent and _needed(key, cfg, command):
            raise RunError(f"{typed}: this command needs {key}; leave {typed} out")


def _needed(key: str, cfg: DictConfig, command: str) -> bool:
    """Whether a command's own config has this setting, and something reads it."""
    section, _, inner = key.partition(".")
    if section in OF_A_TASK and OmegaConf.select(cfg, f"task.{section}") is None:
        return False
    if key in OF_A_TRANSFORM or (inner and (rule := rule_for(key, command)) and rule.null):
        return False
    for path in (CONF / f"{command}.yaml", CONF / "run_folder.yaml"):
        node = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
        for name in key.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        if node is not None and not (isinstance(node, dict) and "_target_" in node):
            return True
    return False
