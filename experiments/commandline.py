"""What stands between the shell and Hydra: errors as one line, and prompts as typed."""

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue

from experiments.runs import RunError


def quote_text(arguments: Sequence[str], *, keys: Sequence[str]) -> list[str]:
    """Quotes free text for Hydra, whose grammar would otherwise strip and parse it.

    `prompt=def f(x): ` reaches the program with its brackets and its last space.
    What the user already put in quotes is left alone.

    Args:
      arguments: of the command line, without the program.
      keys: the overrides that hold free text.

    Returns:
      The arguments for Hydra.
    """
    quoted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        already = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        if equals and key.lstrip("+") in keys and not already:
            # A backslash is itself to Hydra, except where it stands before a quote, at the
            # end, or before an interpolation: there it is doubled.
            body = re.sub(r"(\\*)(\$\{)", r"\1\1\\\2", value)
            body = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), body)
            argument = f"{key}='{body}'"
        quoted.append(argument)
    return quoted


def explain(error: BaseException) -> str | None:
    """The line that says how to put right what a person at the keyboard can put right.

    Args:
      error: from building or running.

    Returns:
      The text; None where the traceback is worth its lines.
    """
    cause = error.__cause__
    if isinstance(cause, InstantiationException):  # an object inside another one
        return explain(cause)
    if isinstance(error, RunError):
        return str(error)
    if isinstance(error, (MissingMandatoryValue, InterpolationToMissingValueError)):
        missing = re.search(r"[Mm]issing mandatory value: (\S+)", str(error))
        name = missing[1] if missing else "a setting without a default"
        # A task reads the data and the model where they stand in groups of their own.
        name = re.sub(r"^task\.(data|model)\.", r"\1.", name)
        return f"{name} must be given: {name}=VALUE on the command line"
    if not isinstance(error, InstantiationException):
        return None
    if isinstance(cause, RunError):
        return str(cause)
    if not isinstance(cause, (ValueError, OSError)):
        return None
    key = re.search(r"full_key: (\S+)", str(error))
    return f"{key[1] if key else 'config'}: {cause}"


def guarded(program: Callable[[], Any]) -> Any:
    """Runs a program; what the user can put right ends it with one line, not a traceback.

    Args:
      program: the body of `main`.

    Returns:
      What the program returns.

    Raises:
      SystemExit: with the text, exit code 1. In a sweep the error is passed on, so
        that the launcher can go on with the other jobs.
    """
    try:
        return program()
    except Exception as error:
        text = explain(error)
        if text is None or HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        sys.stdout.flush()
        raise SystemExit(f"error: {text}") from None
