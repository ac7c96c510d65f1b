"""Prompts from a file: one on each line, or JSON Lines with the prompt in a field."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import ListConfig

from experiments.run.folders import RunError
from experiments.run.plain_files import regular

JSON_LINES = (".jsonl", ".ndjson")


def read_prompts(path: str, *, field: str) -> list[str]:
    """Reads the prompts of a file.

    Args:
      path: JSON Lines if it ends in .jsonl or .ndjson; otherwise each line is a prompt, without
        its line end.
      field: name of the field that holds the prompt.

    Returns:
      The prompts, at least one and none of them empty.

    Raises:
      RunError: the file is missing, no file or not text, or a line is not a prompt; says which.
    """
    try:
        text = regular(Path(path)).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RunError(
            f"prompts={path!r} cannot be read ({error.strerror}): give a file with a prompt on "
            "each line, or JSON Lines (*.jsonl)"
        ) from error
    except UnicodeDecodeError as error:
        raise RunError(
            f"prompts={path!r} is not UTF-8 (byte {error.start}): convert it, "
            "for example with iconv -f latin-1 -t utf-8"
        ) from error
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise RunError(f"prompts={path!r} is empty: give a file with a prompt on each line")
    prompts = []
    for number, line in enumerate(lines, 1):
        where, line = f"prompts={path!r}, line {number}", line.removesuffix("\r")
        if path.lower().endswith(JSON_LINES):
            line = _of_record(line, field, where)
        if not line:
            raise RunError(
                f"{where} is empty, and the model needs one token to start from: leave the line "
                'out; for a prompt that is a line break use JSON Lines, {"prompt": "\\n"}'
            )
        prompts.append(line)
    return prompts


def _of_record(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"{where} is not JSON ({error}): give an object on each line, such as "
            '{"prompt": "def "}, or plain lines in a file that does not end in .jsonl'
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        there = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise RunError(
            f"{where} has no text in the field {field!r} ({there}): give field=NAME, "
            'or an object on each line, such as {"prompt": "def "}'
        )
    try:
        record[field].encode()
    except UnicodeEncodeError as error:
        half = ascii(record[field][error.start])[1:-1]
        raise RunError(
            f"{where} holds {half}, half of a character: leave it out, or give both halves, "
            "such as \\ud83d\\ude00"
        ) from error
    return record[field]


def stop_strings(given: Any) -> tuple[str, ...]:
    """Reads stop strings from the command line or a config.

    Args:
      given: None, a list of strings, or text: a JSON list such as `["\\n\\n", "def "]`, or else
        one stop string as it was typed.

    Returns:
      The strings.

    Raises:
      RunError: a list that is not JSON.
    """
    if given is None:
        return ()
    if isinstance(given, Sequence | ListConfig) and not isinstance(given, str):
        return tuple(map(str, given))
    given = str(given)  # Hydra reads 5 as a number
    if not given.startswith("["):
        return (given,)
    try:
        strings = json.loads(given)
        if all(isinstance(string, str) for string in strings):
            return tuple(strings)
    except (ValueError, RecursionError):
        pass
    raise RunError(
        f"stop={given} is not a JSON list of strings: put it in single quotes, so that the shell "
        'leaves the double ones alone: \'stop=["\\n\\n", "def "]\''
    )
