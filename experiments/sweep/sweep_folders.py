"""Folders of a sweep's jobs: readable names that a repeated command finds again.

In `multirun/NAME/SWEEP/JOB`, SWEEP names the keys that vary (or the chosen `sweep=`) and has a
short digest of the rest of the command line. JOB has the values of these keys and a short digest of
the whole resolved config. The same command gives the same folders, another config another folder.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

LONGEST = 100  # characters of a readable name; file systems allow 255 bytes
GIVEN_BY_THE_PATH = ("experiment", "sweep")  # NAME and SWEEP contain these
NOT_OF_THE_RESULT = ("resume", "trust")  # keys that do not change the result


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
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """Resolves the config of a job, without Hydra's part and keys that do not change the result.

    Args:
      cfg: composed.

    Returns:
      Plain Python values.
    """
    kept = [key for key in cfg if key != "hydra" and key not in NOT_OF_THE_RESULT]
    values = OmegaConf.to_container(OmegaConf.masked_copy(cfg, kept), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _plain_name(text: str) -> str:
    """Replaces characters that file systems, shells or Hydra need quotes for."""
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")


def _is_swept(override: Override) -> bool:
    return override.is_sweep_override() and not override.is_hydra_override()


def name_sweep(arguments: Sequence[str]) -> list[str]:
    """Adds the folders of a sweep to a command line that asks for one.

    Args:
      arguments: of the command line, without the program.

    Returns:
      The arguments, `-m` first, with `hydra.sweep.dir` and `hydra.sweep.subdir` added if missing.
    """
    # Hydra takes overrides only in one piece: `a=1 -m b=1,2` would be an error.
    given = sorted(arguments, key=lambda argument: argument not in ("-m", "--multirun"))
    lines = [argument for argument in given if "=" in argument and argument[0] != "-"]
    try:
        overrides = OverridesParser.create().parse_overrides(lines)
    except HydraException:
        return given  # Hydra reports the error
    keys = {override.get_key_element() for override in overrides}
    swept = [o.get_key_element() for o in overrides if _is_swept(o)]
    chosen = [str(o.value()) for o in overrides if o.get_key_element() == "sweep"]
    chosen = [name for name in chosen if name != "None"]
    if not (swept or chosen) or keys & {"hydra.sweep.dir", "hydra.sweep.subdir"}:
        return given
    fixed = sorted(
        str(o.input_line)
        for o in overrides
        if not (_is_swept(o) or o.is_hydra_override() or o.get_key_element() in GIVEN_BY_THE_PATH)
    )
    name = "+".join(map(_plain_name, [*chosen, *map(short, swept)]))[:LONGEST]
    if fixed:
        name += "-" + digest(fixed, 4)
    at = given.index(lines[-1]) + 1
    given[at:at] = [
        f"hydra.sweep.dir=multirun/${{name}}/{name}",
        f"hydra.sweep.subdir=${{job_folder:{','.join(map(short, swept))}}}",
    ]
    return given


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
        config = plain_config(_root_)
    except OmegaConfBaseException:  # the job itself will report what does not resolve
        config = list(_root_.hydra.overrides.task)
    return f"{readable or 'job'}-{digest(config)}"


# Launchers resolve folders in their own processes, which import this module with the program.
OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
