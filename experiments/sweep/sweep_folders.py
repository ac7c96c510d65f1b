"""Folders of a sweep's jobs: readable names that a repeated command finds again.

In `multirun/NAME/SWEEP/JOB`, SWEEP names the keys that vary (or the chosen `sweep=`) and has a
short digest of the rest of the command line. JOB has the values of these keys and a short digest of
the whole resolved config. The same command gives the same folders, another config another folder.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, ValueNode
from omegaconf.errors import OmegaConfBaseException

from experiments.run import outputs
from experiments.run.folders import CONFIG, RunError
from experiments.run.resuming import FREE
from experiments.sweep.outcomes import NOTES

LONGEST = 100  # characters of a readable name; file systems allow 255 bytes
GIVEN_BY_THE_PATH = ("experiment", "sweep")  # NAME and SWEEP contain these


def short(key: str) -> str:
    """Takes the last word of a key: `learning_rate` of `optim.learning_rate`.

    Args:
      key: as in an override.

    Returns:
      One word.
    """
    return re.split(r"[./@]", key.lstrip("+~"))[-1]


def digest(value: Any, length: int = 6) -> str:
    """Computes a short digest of values.

    Args:
      value: plain Python values.
      length: number of digits.

    Returns:
      Hexadecimal digits.
    """
    try:
        text = json.dumps(value, sort_keys=True, default=str)
    except TypeError:  # keys of several kinds have no order
        text = json.dumps(_with_text_keys(value), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _with_text_keys(child) for key, child in value.items()}
    return [_with_text_keys(child) for child in value] if isinstance(value, list) else value


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """Resolves the config of a job, without Hydra's part and what may differ between attempts.

    Args:
      cfg: composed.

    Returns:
      Plain Python values.
    """
    kept = [key for key in cfg if key not in FREE]
    values = OmegaConf.to_container(OmegaConf.masked_copy(cfg, kept), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def ordered(config: dict[str, Any]) -> dict[str, Any]:
    """Keeps the order of transforms, which is that of the chain, where mappings have none.

    Args:
      config: plain values.

    Returns:
      The same, with a list in place of more than one transform.
    """
    chain = config.get("transform")
    several = isinstance(chain, dict) and len(chain) > 1
    return {**config, "transform": list(chain.items())} if several else config


def _plain_name(text: str) -> str:
    """Replaces characters that file systems, shells or Hydra need quotes for."""
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")


def _is_swept(override: Override) -> bool:
    return override.is_sweep_override() and not override.is_hydra_override()


def sweep_first(arguments: Sequence[str]) -> list[str]:
    """Moves `-m` to the front: Hydra takes overrides only in one piece, not `a=1 -m b=1,2`.

    Args:
      arguments: of the command line, without the program.

    Returns:
      The same arguments.
    """
    return sorted(arguments, key=lambda argument: argument not in ("-m", "--multirun"))


def sweep_name(overrides: Sequence[str]) -> tuple[str, str]:
    """Names a sweep and what varies in it.

    Args:
      overrides: of the command line, without Hydra's own.

    Returns:
      SWEEP, and the short names of the keys that vary, with commas between; both are empty if the
      command line names no sweep.
    """
    parsed = OverridesParser.create().parse_overrides([one for one in overrides if "=" in one])
    swept = [short(o.get_key_element()) for o in parsed if _is_swept(o)]
    chosen = [str(o.value()) for o in parsed if o.get_key_element() == "sweep"]
    chosen = [name for name in chosen if name != "None"]
    if not (swept or chosen):
        return "", ""
    fixed = sorted(
        str(o.input_line)
        for o in parsed
        if not (_is_swept(o) or o.get_key_element() in GIVEN_BY_THE_PATH)
    )
    name = "+".join(map(_plain_name, [*chosen, *swept]))[:LONGEST]
    return (f"{name}-{digest(fixed, 4)}" if fixed else name), ",".join(swept)


def typed(config: DictConfig) -> list[str]:
    """The overrides of a command line without Hydra's own, with references as they are.

    Args:
      config: of a sweep, with Hydra's part.
    """
    overrides = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    assert isinstance(overrides, list)
    return list(map(str, overrides))


# As conf/sweep_folder.yaml has them.
DIR, SUBDIR = "multirun/${name}/jobs", "${job_folder:}"


def places(config: DictConfig) -> tuple[str, str]:
    """The folders of a sweep and of its jobs as they were chosen, with references as they are.

    Args:
      config: of a sweep, with Hydra's part.

    Returns:
      `hydra.sweep.dir` and `hydra.sweep.subdir`; where neither is chosen, with the sweep's name.
    """
    sweep = config.hydra.sweep
    place, inner = (str(sweep._get_node(key)._value()) for key in ("dir", "subdir"))
    name, keys = sweep_name(typed(config))
    if (place, inner) != (DIR, SUBDIR) or not name:
        return place, inner
    return f"multirun/${{name}}/{name}", f"${{job_folder:{keys}}}"


# Differ in each job.
OWN = re.compile(r"\$\{(job_folder:|hydra[.:]job\.(num|id)\})")
BY_OVERRIDES = re.compile(r"\$\{hydra[.:]job\.override_dirname\}")
EXAMPLE = "'hydra.sweep.subdir=${hydra.job.num}'"


def check_one_sweep(config: DictConfig) -> None:
    """Refuses several sweeps in one, and a place that differs in each job.

    Args:
      config: of a sweep, with Hydra's part.

    Raises:
      RunError: says what to type.
    """
    place, swept = places(config)[0], _swept(config, groups=True)
    if "sweep" in swept:
        raise RunError("sweep= takes one sweep; start the others by commands of their own")
    # `name` may vary: the default folder has the one of the command itself.
    varying = [key for key in swept if key != "name" and _refers(_references(place), key)]
    if OWN.search(place) or BY_OVERRIDES.search(place):
        varying.append("a job's own number or name")
    if varying:
        raise RunError(
            f"hydra.sweep.dir={place}: expected one folder for all jobs, and {varying[0]} varies;\n"
            f"what varies goes into hydra.sweep.subdir, for example {EXAMPLE}"
        )


def check_places(config: DictConfig) -> None:
    """Refuses a sweep in a run's folder, and jobs that would share a folder or leave the sweep's.

    Args:
      config: of a sweep, with Hydra's part.

    Raises:
      RunError: says what to type.
    """
    sweep = config.hydra.sweep
    outputs.check_not_kept(Path(sweep.dir))
    if (Path(sweep.dir) / CONFIG).is_file():
        raise RunError(
            f"hydra.sweep.dir={sweep.dir} is the folder of a run, for it holds {CONFIG};\n"
            "a sweep needs a folder of its own, with one in it for each job: give another, or "
            "leave it out"
        )
    given = places(config)[1]
    rest = given
    while (shorter := re.sub(r"\$\{[^{}]*\}", "x", rest)) != rest:
        rest = shorter
    below = not os.path.isabs(rest) and os.pardir not in Path(rest).parts
    referred = _references(_with_references(given, config))
    all_overrides = BY_OVERRIDES.search(referred) is not None
    left_out = config.hydra.job.config.override_dirname.exclude_keys
    # A group may change whatever is referred to.
    swept = _swept(config, groups=all_overrides or not referred)
    varies = OWN.search(referred) or all(
        _refers(referred, key) or (all_overrides and key not in left_out) for key in swept
    )
    if not (below and varies and os.path.normpath(rest or ".") != os.curdir):
        raise RunError(
            f"hydra.sweep.subdir={given}: expected a folder below the sweep's, another one for "
            f"each job;\nleave it out, or type for example {EXAMPLE}"
        )


def _refers(references: str, key: str) -> bool:
    return re.search(rf"(?<![\w.%]){re.escape(key)}(?!\w)", references) is not None


def _references(text: str) -> str:
    return " ".join(re.findall(r"(?<!\\)\$\{[^}]*\}", text))


def _with_references(text: str, config: DictConfig) -> str:
    """A text and, behind each of its references, the text that this one stands for."""
    for _ in range(4):  # `name` may refer to `seed`
        for key in re.findall(r"\$\{([\w.]+)\}", text):
            parent, _, last = key.rpartition(".")
            node = OmegaConf.select(config, parent) if parent else config
            there = isinstance(node, DictConfig) and last in node
            raw = node._get_node(last) if there else None
            if isinstance(raw, ValueNode) and "${" in str(raw._value()):
                text = f"{text} {raw._value()}"
    return text


def _swept(config: DictConfig, groups: bool) -> list[str]:
    """The settings that vary, with or without groups."""
    task = OverridesParser.create().parse_overrides(typed(config))
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    given = [o.get_key_element() for o in task if _is_swept(o)] + [str(key) for key in params]
    given = [key.lstrip("+") for key in given]
    return [key for key in given if groups or key not in config.hydra.runtime.choices]


def check_inside(folder: Path, sweep: Path) -> None:
    """Refuses a job's folder outside of the sweep's, as values in `hydra.sweep.subdir` may make it.

    Args:
      folder: of the job.
      sweep: of all jobs.

    Raises:
      RunError: says what to type.
    """
    whole, outer = (Path(os.path.abspath(path)) for path in (folder, sweep))
    if outer not in whole.parents or whole.relative_to(outer).parts[0] == NOTES:
        raise RunError(
            f"hydra.sweep.subdir leads to {folder}: expected one below the sweep's {sweep}, "
            f"and not in its {NOTES};\n"
            f"leave it out, or type for example {EXAMPLE}"
        )


def job_folder(*keys: str, _root_: DictConfig) -> str:
    """Names a job's folder; a resolver of OmegaConf.

    Args:
      *keys: short names of the overrides that vary besides those of `hydra.sweeper.params`;
        without either, every override counts as one.
      _root_: the job's whole config, given by OmegaConf.

    Returns:
      `cell-para_gru+seed-0-` and six digits of the resolved config.
    """
    overrides = OverridesParser.create().parse_overrides(list(_root_.hydra.overrides.task))
    params = OmegaConf.select(_root_, "hydra.sweeper.params") or {}
    varying = {*filter(None, keys), *map(short, params)}
    shown = [
        f"{short(o.get_key_element())}-{_plain_name(o.get_value_element_as_str())}"
        for o in overrides
        if o.get_key_element() not in GIVEN_BY_THE_PATH
        and (not varying or short(o.get_key_element()) in varying)
    ]
    readable = "+".join(shown)
    if len(readable) > LONGEST:
        readable = readable[:LONGEST].rpartition("+")[0] or readable[:LONGEST]
    try:
        config = ordered(plain_config(_root_))
    except OmegaConfBaseException:  # the job itself will report what does not resolve
        config = list(_root_.hydra.overrides.task)
    return f"{readable or 'job'}-{digest(config)}"


def is_named(folder: Path, cfg: DictConfig) -> bool:
    """Whether a folder's name ends in the digest of a job's config, as `job_folder` gives it.

    Args:
      folder: of the job.
      cfg: composed by Hydra.
    """
    try:
        return folder.name.endswith(f"-{digest(ordered(plain_config(cfg)))}")
    except OmegaConfBaseException:  # the job itself will report what does not resolve
        return False


# Launchers resolve folders in their own processes, which import this module with the program.
OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
