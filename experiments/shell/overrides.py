"""Finds overrides that Hydra refuses or ignores without naming them."""

import os
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Sweep
from hydra.errors import HydraException

from experiments.run.folder_arguments import PLACES
from experiments.run.folders import RunError
from experiments.run.given_folders import leaves
from experiments.run.names import CONF

SWEPT = "hydra.sweeper.params"  # of a sweep's config; into none Hydra cannot merge anything
BY_ITSELF = "give what varies by itself"
RERUN = "--experimental-rerun"  # of a file of a run's folder, which Hydra unpickles: it runs code


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
        there = _members(group)
        if isinstance(value, Sweep) and not isinstance(value, ChoiceSweep):
            continue
        given = value.list if isinstance(value, ChoiceSweep) else [value]
        named = all(isinstance(one, dict | list) or (isinstance(one, str) and one) for one in given)
        if there and not named and not override.is_delete():
            return (
                f"{argument}: expected a member of group {group}: choose from "
                f"{', '.join(there)}\nor leave it out for the default"
            )
    return None


def of_a_flag(error: Exception) -> str | None:
    """Explains what Hydra raises about its flags.

    Args:
      error: of Hydra.

    Returns:
      One line; None if it is about something else.
    """
    if isinstance(error, ValueError) and "Expecting one subcommand" in str(error):
        return "--shell-completion: give install=SHELL or uninstall=SHELL: bash, fish or zsh"
    if isinstance(error, AssertionError) and "Unexpected type for root" in str(error):
        return f"{SWEPT}: {BY_ITSELF}, as KEY=VALUES"
    if isinstance(error, KeyError) and error.args == ("COMP_LINE",):
        return "--shell-completion query=SHELL: only a shell asks this; give install=SHELL"
    if "Config group override must be" in str(error):
        return (
            "null is no member of a group: leave the group out for its default, or give [] for none"
        )
    if isinstance(error, ValueError) and "--" in str(error):  # flags that exclude each other
        return str(error)
    return None


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuses what Hydra would do something dangerous with, or fail on without naming it.

    Args:
      arguments: of the command line, without the program.

    Raises:
      RunError: a flag that unpickles a file, a variable of the environment that is not set, a
        mapping of what is swept, or a list for a group that holds more than names.
    """
    parser = OverridesParser.create()
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag != "--" and RERUN.startswith(flag):  # or shortened
            raise RunError(f"{argument}: no command runs a pickled job; type its KEY=VALUE instead")
        try:
            override = parser.parse_override(argument)
        except HydraException:
            continue  # a flag, or what Hydra names itself
        group, value = override.key_or_group, override.value()
        for key, names in leaves(group, value):
            unset = names if key == "hydra.job.env_copy" and isinstance(names, list) else []
            if unset := [str(name) for name in unset if str(name) not in os.environ]:
                raise RunError(f"{argument}: {unset[0]} is not set in the environment")
            if key.startswith(f"{SWEPT}.") and group.lstrip("+") != key:
                raise RunError(f"{argument}: {BY_ITSELF}, as {key.removeprefix(SWEPT)[1:]}=VALUES")
        there = _members(group)
        for one in value.list if isinstance(value, ChoiceSweep) else [value]:
            named = not isinstance(one, list) or all(isinstance(name, str) and name for name in one)
            if (there or "/" in group) and not named:
                raise RunError(
                    f"{argument}: expected names of members of group {group}"
                    + (f": choose from {', '.join(there)}" if there else "")
                    + "\nor leave it out for the default"
                )


def _members(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def check_repeated(arguments: Sequence[str]) -> None:
    """Refuses a key that is given twice with different values: Hydra takes the last silently.

    A mapping gives the keys in it: `'a={b: 1}' a.b=2` gives `a.b` twice.

    Args:
      arguments: of the command line, without the program.

    Raises:
      RunError: names the key and both arguments.
    """
    first: dict[str, tuple[str, Any]] = {}
    for argument in arguments:
        if "=" not in argument or argument.startswith(("-", "~")):  # a flag, or what is deleted
            continue
        for key, value in leaves(_key(argument), _value(argument)):
            before, known = first.setdefault(key, (argument, value))
            same = before.lstrip("+") == argument.lstrip("+")
            if not same and repr(known) != repr(value):
                raise RunError(
                    f"{key} is given twice, as {before} and as {argument}:\nleave one of them out"
                )


def replaced(arguments: Sequence[str], more: Sequence[str]) -> list[str]:
    """Adds arguments to a command line in place of those with the same keys.

    Args:
      arguments: of the command line, without the program.
      more: further ones.

    Returns:
      A command line that gives no key twice because of them.
    """
    anew = set(map(_key, more))
    return [one for one in arguments if _key(one) not in anew] + list(more)


def _key(argument: str) -> str:
    return argument.partition("=")[0].lstrip("+")


def _value(argument: str) -> Any:
    """As Hydra reads it; the text itself if that cannot be read yet, such as an unquoted path."""
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return argument.partition("=")[2]
    if override.is_sweep_override():
        return argument.partition("=")[2].replace(" ", "")
    value = override.value()
    value = value[0] if isinstance(value, list) and len(value) == 1 else value  # x and [x] are one
    places = (*PLACES, "run", "runs", "from", "trust")
    return os.path.realpath(value) if _key(argument) in places and isinstance(value, str) else value
