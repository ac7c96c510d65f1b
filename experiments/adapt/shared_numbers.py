"""Numbers of a config that all transforms of a chain share: `bits` and `rank`."""

from omegaconf import DictConfig

NUMBERS = ("bits", "rank")


def unused(cfg: DictConfig) -> set[str]:
    """Finds which of `bits` and `rank` no transform of a config uses.

    Args:
      cfg: composed, or of a run.

    Returns:
      Their names.
    """
    members = [node for node in (cfg.get("transform") or {}).values() if node is not None]
    return {name for name in NUMBERS if not any(name in node for node in members)}
