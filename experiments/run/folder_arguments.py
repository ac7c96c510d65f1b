"""Quotes folders and files on the command line for Hydra's grammar."""

import os
import re
from collections.abc import Sequence

TRUST = "trust"
# Arguments of constructors that are files, folders, globs or names of data sets.
FILES = ("path", "root", "data_files", "tokenizer", "base")
# Where a run's data is; data that has moved is named anew.
PLACES = tuple(f"data.{name}" for name in FILES[:-1])


def quote_value(text: str) -> str:
    """Quotes a text for Hydra, which would otherwise parse its special characters.

    Args:
      text: such as a path.

    Returns:
      The text in single quotes; unchanged if it needs none.
    """
    return text if re.fullmatch(r"[A-Za-z/.][\w.-]*/[\w./-]*", text, re.ASCII) else quoted(text)


def quoted(text: str) -> str:
    """Any text, in single quotes: Hydra gives it to the program as it is.

    Args:
      text: as typed.

    Returns:
      The text in Hydra's grammar.
    """
    # A backslash is itself to Hydra, except before a quote, at the end, or before `${`.
    body = re.sub(r"(\\*)(\$\{)", r"\1\1\\\2", text)
    body = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), body)
    return f"'{body}'"


def replace_data(arguments: Sequence[str]) -> list[str]:
    """Lets a place of data be given without its source, which is that of a run.

    Args:
      arguments: of the command line, without the program.

    Returns:
      The arguments for Hydra, which would otherwise take `data.path=` only with `data=`.
    """
    if any(one.lstrip("+").startswith("data=") for one in arguments):
        return list(arguments)
    return [f"++{one}" if one.partition("=")[0] in PLACES else one for one in arguments]


def quote_folders(arguments: Sequence[str], *, keys: Sequence[str]) -> list[str]:
    """Quotes the values of keys that are files or folders.

    `run=runs/a[1],b=2` reaches the program unchanged, if it exists. Lists, globs and quoted values
    are left alone.

    Args:
      arguments: of the command line, without the program.
      keys: the overrides that hold paths.

    Returns:
      The arguments for Hydra.
    """
    quoted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        # Hydra cannot read a ~, wherever it leads.
        typed = value.startswith("~") or os.path.exists(value)
        if equals and key.lstrip("+") in keys and typed:
            argument = f"{key}={quote_value(value)}"
        quoted.append(argument)
    return quoted
