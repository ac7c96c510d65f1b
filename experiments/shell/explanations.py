"""Explains errors to the user: what was given, what is wrong, what to type."""

import errno
import functools
import importlib.util
import inspect
import os
import re
import sys
from typing import Any

import yaml
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    InterpolationKeyError,
    InterpolationResolutionError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from experiments.run.checks import settings_of
from experiments.run.folder_arguments import PLACES
from experiments.run.folders import RunError
from experiments.run.names import CONF
from experiments.run.plain_files import printable
from experiments.shell.near_misses import near_misses, readers

FULL_ERROR = "HYDRA_FULL_ERROR"  # 1: tracebacks instead of messages
LINES = 3  # the most lines of a message


class FolderError(RunError):
    """An error about a run's folder that is explained already, whatever its cause."""


def explain(error: BaseException, cfg: DictConfig | None = None) -> str | None:
    """Explains an error that the user can correct.

    Args:
      error: from composing, building or running.
      cfg: the command's config, in which the setting to change is looked up.

    Returns:
      The text, at most three lines; None if the traceback is needed.
    """
    text = _text_of(error, cfg)
    if text is None:
        return None
    if isinstance(error, InterpolationResolutionError):  # it names the reader, not the origin
        typed = [argument for argument in sys.argv[1:] if "${" in argument]
        text = ": ".join([" ".join(typed), text]) if typed else text
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(printable(line) for line in lines[:LINES])


def _text_of(error: BaseException, cfg: DictConfig | None) -> str | None:
    cause = error.__cause__
    if isinstance(error, BrokenPipeError):  # the reader has closed, see `commandline.command`
        return None
    if isinstance(error, FolderError):
        return str(error)
    if isinstance(cause, InstantiationException):  # an object inside another one
        return _text_of(cause, cfg)
    if isinstance(error, RunError):
        return str(error)
    if isinstance(error, InstantiationException):
        return _of_target(error, cfg)
    if flag := re.match(r"Instantiation: (_\w+_) flag must be a bool", str(error)):
        found = re.search(r"full_key: (\S+)", str(error))
        key = f"{typed_key(cfg, found[1])}.{flag[1]}" if found else flag[1]
        return f"{key}: give true or false, or leave it out"
    if isinstance(error, (MissingMandatoryValue, InterpolationToMissingValueError)):
        missing = re.search(r"[Mm]issing mandatory value: (\S+)", str(error))
        name = missing[1] if missing else "a setting without a default"
        # A task refers to the data and the model, which are their own groups.
        name = re.sub(r"^task\.(data|model)\.", r"\1.", name)
        return f"{name} must be given: {name}=VALUE on the command line"
    if isinstance(error, InterpolationKeyError | ConfigAttributeError):
        return _of_absence(error)
    if isinstance(error, (HydraException, OmegaConfBaseException, yaml.YAMLError)):
        return _of_config(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        first = str(error).splitlines()[:1] or ["no room"]
        return (
            f"not enough memory: {first[0][:200]}\n"
            "give a smaller batch_size, window or model, or accumulate=N"
        )
    if isinstance(error, OSError) and error.strerror:
        return _of_file(error)
    return None


def _of_file(error: OSError) -> str:
    place = error.filename2 or error.filename
    hint = {
        errno.ENOSPC: "make room, then repeat the command",
        errno.EDQUOT: "make room, then repeat the command",
        errno.EACCES: "give another path, or change the permissions of this one",
        errno.EPERM: "give another path, or change the permissions of this one",
        errno.EROFS: "give a path that can be written to",
        errno.EISDIR: "give a file",
        errno.ENOTDIR: "a part of this path is a file: give another path",
        errno.ENAMETOOLONG: "give a shorter name",
    }.get(error.errno or 0, "give another path")
    where = "" if place is None else f"{_shown(place)}: "
    return f"{where}{error.strerror}; {hint}"


def _shown(place: Any) -> str:
    return os.fsdecode(place) if isinstance(place, str | bytes | os.PathLike) else str(place)


def _of_config(error: BaseException) -> str:
    """Shortens errors of Hydra and OmegaConf, and suggests a key."""
    text, cause = str(error), error.__cause__
    wrong = re.search(r"Could not (?:override|delete from config\.) '([^']+)'", text)
    root = getattr(getattr(cause, "parent_node", None), "_get_root", lambda: None)()
    if wrong and isinstance(root, DictConfig):
        # The value of an override may hold keys: `model={widht: 8}`.
        asked = str(getattr(cause, "full_key", None) or wrong[1])
        groups = [str(key) for key in root if isinstance(root._get_node(key), DictConfig)]
        there = list(dict.fromkeys([key for key, _ in settings_of(root)] + groups))
        if (meant := _addable(asked, root)) is not None:
            return f"{asked}: there is no such setting; {meant}"
        near = near_misses(asked, [key for key in there if not key.startswith("hydra")])
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        outer = asked.rpartition(".")[0]
        beside = [key for key in there if outer and key.startswith(f"{outer}.")]
        meant = meant or (f"; choose from {', '.join(beside)}" if beside else "")
        return (
            f"{asked}: there is no such setting{meant}\n"
            "--cfg job shows all settings, --help the groups"
        )
    if group := re.search(r"Could not override '([^']+)'\.\s+No match in the defaults list", text):
        others = readers(group[1])
        by = f"; {' and '.join(others)} has it" if others else ""
        at = re.match(r"In '([^']+)'", text)
        return f"{at[1] + ': ' if at else ''}{group[1]}: this command has no such group{by}"
    if several := re.search(r"Ambiguous value for argument '(([^=]+)=([^']*))'", text):
        return (
            f"{several[1]}: several values need -m, for a run each; "
            f"a list is typed {several[2]}=[{several[3]}]"
        )
    if isinstance(error, OverrideParseException):
        text = str(error.override)
        if "=" not in text:
            key = "run" if os.path.exists(text) else "KEY" if "/" in text else text
            like = f"{key}={text}" if key != text else f"{key}=VALUE"
            return f"{text!r}: settings are KEY=VALUE; type for example {like}"
        return f"{text!r}: this cannot be read; give KEY=VALUE, and text as KEY=\"'TEXT'\""
    missing = re.search(r"Could not find '([^']+)'", text)
    if missing and (options := re.search(r"Available options in '[^']*':\n((?:\t.*\n?)+)", text)):
        group, _, member = missing[1].rpartition("/")
        there = options[1].split()
        near = near_misses(member, there, count=1)
        meant = f"did you mean {group}={near[0]}? " if near else ""
        return f"{group}={member}: no such member; {meant}choose from {', '.join(there)}"
    key = getattr(error, "full_key", None)
    text = text.partition("Config search path:")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("full_key", "object_type", "See "))]
    return (f"{key}: " if key else "") + "\n".join(kept[:LINES])


def _addable(key: str, cfg: DictConfig) -> str | None:
    """What to type for a setting that a constructor has and its config does not list."""
    outer, _, last = key.rpartition(".")
    node = OmegaConf.select(cfg, outer) if outer else None
    if isinstance(node, DictConfig) and last in _parameters(str(node.get("_target_", ""))):
        return f"{node['_target_']} has one; type +{key}=VALUE"
    if key in PLACES:
        sources = sorted(
            path.stem
            for path in (CONF / "data").glob("*.yaml")
            if last in yaml.safe_load(path.read_text(encoding="utf-8"))
        )
        example = "text" if "text" in sources else sources[0]
        return (
            f"give its source with it, {' or '.join(sources)};\n"
            f"type for example data={example} {key}=PLACE"
        )
    return None


def _of_absence(error: OmegaConfBaseException) -> str:
    """Explains a missing setting or group that another one, or the command, reads."""
    key = str(error.full_key or error.key)
    referred = re.search(r"Interpolation key '([^']+)' not found", str(error))
    name = referred[1] if referred else key
    reader = key if referred and error.full_key else "this command"
    return (
        f"{name}: {reader} reads it, but it is missing;\n"
        f"leave ~{name} or {name}=[] out if that is what you typed, or give +{name}=VALUE"
    )


def typed_key(cfg: DictConfig | None, key: str) -> str:
    """Finds the key by which a node is overridden: `model` if `task.model` is `${model}`.

    Args:
      cfg: composed, its references as they are.
      key: of a node.

    Returns:
      The key; unchanged if it is not a reference.
    """
    if cfg is None:
        return key
    path = ""
    for name in key.split("."):
        parent = OmegaConf.select(cfg, path) if path else cfg
        path = f"{path}.{name}" if path else name
        if (
            isinstance(parent, DictConfig)
            and name in parent
            and not OmegaConf.is_missing(parent, name)
        ):
            node = parent._get_node(name)
            reference = re.fullmatch(r"\$\{([\w.]+)\}", str(getattr(node, "_value", lambda: "")()))
            path = reference[1] if reference else path
    return path


def _of_target(error: InstantiationException, cfg: DictConfig | None) -> str | None:
    """Explains what an object refused, with the override that changes it."""
    cause = error.__cause__
    if isinstance(cause, RunError):
        return str(cause)
    if isinstance(cause, MemoryError):
        return _text_of(cause, cfg)
    found = re.search(r"full_key: (\S+)", str(error))
    key = typed_key(cfg, found[1]) if found else "config"
    if isinstance(cause, TypeError):
        called = re.search(r"target '([\w.<>]+)'", str(error))
        return of_signature(key, called[1] if called else "it", cause)
    if isinstance(cause, OSError) and cause.strerror:
        return f"{key}: {_of_file(cause)}"
    if "'hydra.utils.get_" in str(error):
        node = OmegaConf.select(cfg, key) if cfg is not None else None
        path = str(node.path) if isinstance(node, DictConfig) and "path" in node else ""
        if path and not isinstance(cause, RunError):
            return _of_name(f"{key}.path", path)
    if located := re.match(r"Error locating target '([^']*)'", str(error)):
        return _of_name(f"{key}._target_", located[1])
    if located := re.match(r"Target '([^']*)' is blocklisted", str(error)):
        return (
            f"{key}._target_={located[1]}: Hydra calls no function that runs other programs or "
            f"code; give one that builds the object, as --cfg job shows for {key}"
        )
    if located := re.match(r"Expected a callable target, got '?([^']*)'", str(error)):
        return f"{key}._target_={located[1]}: expected the dotted name of a function or a class"
    if isinstance(cause, ValueError | OSError):
        text = str(cause)
        name = re.match(r"(\w+)=", text)
        node = OmegaConf.select(cfg, key) if cfg is not None and found else None
        if name and isinstance(node, DictConfig) and name[1] in node:
            return f"{key}.{text}\nchange it with {key}.{name[1]}=VALUE"
        return text if text.startswith(f"{key}.") else f"{key}: {text}"
    called = re.match(r"Error in call to target '([\w.<>]+)'", str(error))
    if called and isinstance(cause, AttributeError):  # it was given an object of another kind
        return (
            f"{key}: {called[1]} cannot use what it is given: {cause}\n"
            "leave out what you have changed of it; --cfg job shows the settings"
        )
    if cause is None or isinstance(cause, ImportError | AttributeError | InstantiationException):
        return f"{key}: {' '.join(str(error).splitlines()[:2])}"
    return None


def _of_name(key: str, path: str) -> str:
    """Explains a dotted name that does not exist."""
    outer, _, last = path.rpartition(".")
    parts, place = outer.split("."), None
    if parts[0] in sys.modules:
        place = functools.reduce(
            lambda at, name: getattr(at, name, None), parts[1:], sys.modules[parts[0]]
        )
    there = [name for name in vars(place) if name[0] != "_"] if hasattr(place, "__dict__") else []
    near = near_misses(last, there)
    meant = f"; did you mean {' or '.join(f'{outer}.{name}' for name in near)}?" if near else ""
    if parts[0].isidentifier() and importlib.util.find_spec(parts[0]) is None:
        meant = f"; Python does not find {parts[0]}: put its folder on PYTHONPATH"
    return f"{key}={path}: there is no such name{meant}"


def of_signature(key: str, called: str, cause: TypeError) -> str:
    """Explains a setting that an object does not have, lacks, or cannot use.

    Args:
      key: of the object.
      called: its constructor.
      cause: what calling that raised.

    Returns:
      One line or two.
    """
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(cause))
    if unknown:
        there = _parameters(called)
        near = near_misses(unknown[1], there, count=1)
        meant = f"did you mean {key}.{near[0]}? " if near else ""
        has = f"it has {', '.join(there)}" if there else "see its documentation"
        return f"{key}.{unknown[1]}: {called} has no such setting; {meant}{has}"
    lacking = re.search(r"missing \d+ required [\w -]*arguments?: (.+)", str(cause))
    if lacking:
        names = re.findall(r"'(\w+)'", lacking[1])
        typed = " ".join(f"+{key}.{name}=VALUE" for name in names)
        return f"{key}: {called} needs {', '.join(names)}; type {typed}"
    where = f"{FULL_ERROR}=1 before the command shows where"
    return f"{key}: {called} refuses its settings: {cause}\n{where}"


def _parameters(called: str) -> list[str]:
    module, _, name = called.rpartition(".")
    function = getattr(sys.modules.get(module), name, None)
    try:
        return list(inspect.signature(function).parameters) if callable(function) else []
    except (TypeError, ValueError):
        return []
