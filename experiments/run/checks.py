"""Checks a command's config against the table of `limits` before anything is built.

A mistake then costs a second instead of a compilation. Objects named by `_target_` check everything
else themselves.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from experiments.run.folder_arguments import PLACES
from experiments.run.folders import RunError
from experiments.run.limits import (
    BIGGEST,
    FINITE,
    LARGEST,
    RULES,
    SECTION,
    TEXT,
    Rule,
    rule_for,
    shortened,
)
from experiments.run.plain_files import printable

# What the shipped configs leave to the user with `???`.
MEANT = ("from", *PLACES)
# The table holds for objects of these packages; a user's own objects may use the names otherwise.
OURS = ("jaxpara.", "experiments.", "builtins.tuple", "hydra.utils.get_")


def fits(value: Any, rule: Rule) -> bool:
    """Whether a value satisfies a rule.

    Args:
      value: a plain value.
      rule: from the table.
    """
    if value is None:
        return rule.null
    if rule.many:
        single = rule._replace(many=False)
        each = isinstance(value, Sequence) and not isinstance(value, str)
        each = each and (len(value) > 0 or rule.kind == "text")
        return each and all(fits(v, rule if isinstance(v, list) else single) for v in value)
    if rule.kind == "any":
        return True
    if rule.kind in ("section", "object"):
        return False  # a mapping is entered, and never gets here
    if rule.kind == "words":
        words = value if isinstance(value, list) else [value]
        return all(fits(word, TEXT) for word in words)
    if rule.kind == "switch":
        return isinstance(value, bool)
    if rule.kind == "text":
        # A folder may be called 2024: Hydra reads a number, but it is text here.
        text = isinstance(value, str | int | float) and not isinstance(value, bool)
        if value == "" and not rule.empty:  # of an unset variable, and a path to where we are
            return False
        return text and (not rule.choices or value in rule.choices)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if value != value or (isinstance(value, int) and abs(value) > BIGGEST):
        return False
    if rule.kind == "whole" and not isinstance(value, int):
        return False
    if rule.inside and value == math.inf == rule.high:
        return True
    if rule.inside:
        return rule.low < value < rule.high
    if rule.below:
        return rule.low <= value < rule.high
    return rule.low <= value <= rule.high


def _bounds(rule: Rule) -> str:
    if rule.inside:
        high = "" if rule.high >= FINITE else f" and below {rule.high:g}"
        return f" above {rule.low:g}{high}"
    if rule.below:
        return f", at least {rule.low:g} and below {rule.high:g}"
    if rule.high in (FINITE, LARGEST, math.inf):
        return f", at least {rule.low:g}"
    return f" from {rule.low:.10g} to {rule.high:.10g}"


def expected(rule: Rule) -> str:
    """Describes what a rule accepts.

    Args:
      rule: from the table.

    Returns:
      One line.
    """
    unit = f" ({rule.unit})" if rule.unit else ""
    if rule.kind == "switch":
        text = "true or false"
    elif rule.kind == "section":
        text = "a group of settings, not a value"
    elif rule.kind == "object":
        text = "an object, with its _target_"
    elif rule.kind == "words":
        text = "text or a list of texts, none of them empty"
    elif rule.kind == "text" and rule.many:
        text = "a list of texts, none of them empty"
    elif rule.kind == "text":
        text = "text" if rule.empty else "text that is not empty"
        text = f"one of {', '.join(rule.choices)}" if rule.choices else text
    else:
        many = {"whole": "whole numbers", "number": "numbers"}
        one = {"whole": "a whole number", "number": "a number"}
        text = f"a list of {many[rule.kind]}" if rule.many else one[rule.kind]
        text += _bounds(rule) + unit
    return f"{text}, or null" if rule.null else text


def instead(value: Any, rule: Rule) -> str:
    """Suggests a valid value near the given one.

    Args:
      value: the invalid value.
      rule: the rule that it breaks.

    Returns:
      The value as it is typed.
    """
    if rule.many:
        given = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        single = rule._replace(many=False)
        if any(isinstance(v, Sequence) and not isinstance(v, str) for v in given):
            return "[[128,1,32]]" if rule is RULES["shapes"] else instead([], rule)
        near = [str(v) if fits(v, single) else instead(v, single) for v in given or [None]]
        return f"[{','.join(near)}]"
    if rule.kind == "switch":
        return "true" if str(value).lower() in ("1", "yes", "on", "ture") else "false"
    if rule.kind in ("words", "section", "object"):
        return "TEXT" if rule.kind == "words" else ""
    if rule.kind == "text":
        if not rule.choices and isinstance(value, str) and value:
            return value
        near = difflib.get_close_matches(str(value), rule.choices, n=1, cutoff=0.0)
        return near[0] if near else "TEXT"
    if rule.example is not None:
        return f"{rule.example:g}"
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= BIGGEST
    usable = whole or (isinstance(value, float) and math.isfinite(value))
    if rule.kind == "whole":
        near = min(max(math.ceil(value) if usable else 0, int(rule.low)), int(rule.high))
        return str(near)
    if usable and rule.low < -value < rule.high:
        return f"{-value:g}"  # a minus sign too many
    top = rule.high if rule.high < FINITE else max(2 * rule.low, rule.low + 1)
    if rule.inside or (rule.below and usable and value > 0):
        return f"{(rule.low + top) / 2:g}"
    return f"{top if usable and value > 0 else rule.low:g}"


def settings_of(node: DictConfig, prefix: str = "", command: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the settings of a config that a user can override: all that are not references.

    Args:
      node: composed.
      prefix: the path to it.
      command: whose config it is; its own rules say which settings are mappings.

    Yields:
      Path and plain value; objects and groups are entered.
    """
    ours = str(node.get("_target_", OURS[0])).startswith(OURS)
    for key in node:
        path = f"{prefix}{key}"
        if key == "hydra" or str(key) in ("_target_", "_convert_", "_recursive_"):
            continue
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        value = node[key]
        if isinstance(value, DictConfig):
            rule = rule_for(path, command) if ours else None  # others may use the names otherwise
            # An object may make a list of numbers, but is no number. Inside other objects a text
            # may have the name of one.
            plain = ("whole", "number", "switch", *(() if prefix else ("text", "words")))
            number = rule and rule.kind in plain and not rule.many
            if "_target_" in value and not number and not (rule == SECTION and not prefix):
                rule = None
            if rule is None or (rule.kind in ("section", "any") and "_target_" not in value):
                yield from settings_of(value, f"{path}.", command)
            else:  # a mapping where a number or a text belongs, or an object in place of a group
                yield path, OmegaConf.to_container(value, resolve=False)
        elif isinstance(value, ListConfig):
            inner = dict(_objects_in(value, path))
            for place, item in inner.items():
                yield from settings_of(item, f"{place}.", command)
            if ours and not inner:
                yield path, OmegaConf.to_container(value, resolve=True)
        elif ours:
            yield path, value


def _objects_in(node: ListConfig, path: str) -> Iterator[tuple[str, DictConfig]]:
    """The mappings of a list, at any depth, by their paths."""
    for i in range(len(node)):
        if OmegaConf.is_interpolation(node, i):
            continue
        if isinstance(node[i], DictConfig):
            yield f"{path}.{i}", node[i]
        elif isinstance(node[i], ListConfig):
            yield from _objects_in(node[i], f"{path}.{i}")


def check_text(key: str, value: Any) -> None:
    """Refuses an empty name, for settings that are not in the table, such as Hydra's folders.

    Args:
      key: of the setting.
      value: as composed.

    Raises:
      RunError: as `check_settings`.
    """
    _check(key, value, TEXT)


def check_missing(cfg: DictConfig, *, place: Path | None = None) -> None:
    """Refuses settings that have no value (`???`), except those that must be given anyway.

    Args:
      cfg: composed.
      place: the file that it was read from; None: the command line.

    Raises:
      RunError: names the first of them.
    """
    missing = next((key for key in _missing(cfg, "") if key not in MEANT), None)
    if missing is not None and place is None:
        raise RunError(
            f"{missing} has no value (???);\ngive {missing}=VALUE, or leave out what sets it to ???"
        )
    if missing is not None:
        raise RunError(
            f"{place}: {printable(missing)} has no value (???);\n"
            "put back a copy of that file, or give another run"
        )


def _missing(node: DictConfig | ListConfig, prefix: str) -> Iterator[str]:
    for key in range(len(node)) if isinstance(node, ListConfig) else node:
        if OmegaConf.is_missing(node, key):
            yield f"{prefix}{key}"
        elif not OmegaConf.is_interpolation(node, key):
            child = node[key]
            if isinstance(child, DictConfig | ListConfig) and not (not prefix and key == "hydra"):
                yield from _missing(child, f"{prefix}{key}.")


def check_settings(cfg: DictConfig, command: str = "", *, place: Path | None = None) -> None:
    """Refuses a config whose settings break the rules of the table.

    Args:
      cfg: composed.
      command: the command that it belongs to, such as `train`.
      place: the file that it was read from; None: the command line.

    Raises:
      RunError: what was given, what was expected, what to type or to write there.
    """
    if place is None:  # of a folder's, only what is read must be there
        check_missing(cfg)
    for key, value in settings_of(cfg, command=command):
        if (rule := rule_for(key, command)) is not None:
            _check(key, value, rule, place)
            if rule.kind in ("text", "words"):
                _as_text(cfg, key, value)


def _check(key: str, value: Any, rule: Rule, place: Path | None = None) -> None:
    if fits(value, rule):
        return
    where = "" if place is None else f"{place}: "
    shown = {True: "true", False: "false", None: "null"}.get(value) if _plain(value) else None
    shown = shortened(shown or (f"{value!r}" if isinstance(value, str) else str(value)))
    near = f"type for example {key}={instead(value, rule)}"
    wanted = expected(rule)
    if rule.kind == "section" and isinstance(value, dict):
        key, shown = f"{key}._target_", shortened(str(value["_target_"]))
        wanted = "no object in place of a group of settings"
        near = f"leave {key} out"
    elif rule.kind == "object":
        near = f"leave {key} out for the default"
    elif rule.kind == "section":
        near = f"type for example {key}.KEY=VALUE, as --cfg job shows them"
    if place is not None:
        near = "put back a copy of that file, or give another run"
    raise RunError(f"{where}{printable(key)}={shown}: expected {wanted};\n{near}")


def _as_text(cfg: DictConfig, key: str, value: Any) -> None:
    """A folder may be called 2024, which Hydra reads as a number."""
    words = value if isinstance(value, list) else [value]
    if any(isinstance(word, int | float) for word in words):
        text = [str(word) for word in words]
        OmegaConf.update(cfg, key, text if isinstance(value, list) else text[0])


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)
