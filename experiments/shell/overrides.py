"""Finds overrides that Hydra refuses or ignores without naming them."""

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from experiments.run.names import CONF


def misread(arguments: Sequence[str]) -> str | None:
    """Finds the first argument that names no setting, or gives a group an invalid member.

    Args:
      arguments: of the command line, without the program.

    Returns:
      What was given, what was expected and what to type; None if there is no such argument.
    """
    parser = OverridesParser.create()
    for argument in arguments:
        if argument.startswith("="):
            return f"{argument}: the name before = is missing; type KEY{argument}"
        try:
            override = parser.parse_override(argument)
        except HydraException:
            continue  # a flag, or what Hydra names itself
        group, value = override.key_or_group, override.value()
        there = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        member = isinstance(value, dict) or (isinstance(value, str | list) and value)
        if there and not member and not override.is_delete() and not override.is_sweep_override():
            return (
                f"{argument}: expected a member of group {group}: choose from "
                f"{', '.join(there)}\nor leave it out for the default"
            )
    return None
