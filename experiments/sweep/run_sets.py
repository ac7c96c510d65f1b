"""Sets of runs, read from their folders: how they differ, and which belong together.

A run is described by its flattened `config.yaml`. An object becomes the last name of its
constructor: `cell` is "para_gru" and `mixer.heads` is 4. Runs that differ only in seeds belong
together.
"""

import difflib
import glob
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.run import metrics, record_fields, trust
from experiments.run.folders import (
    CONFIG,
    ENVIRONMENT,
    METRICS,
    SUMMARY,
    RunError,
    load_config,
    read_json,
)
from experiments.run.plain_files import printable
from experiments.run.resuming import FREE, NOT_COMPARED
from experiments.shell.foreign import content_of

ABSENT = ""  # the value of a key that a run's config lacks


class Run(NamedTuple):
    """The contents of a run's folder.

    Attributes:
      folder: its path.
      config: flattened, see `flatten`.
      columns: of `metrics.csv`; None where a cell is empty.
      summary: of `summary.json`; empty while the run continues.
      environment: of `env.json`.
    """

    folder: Path
    config: dict[str, Any]
    columns: dict[str, list[float | None]]
    summary: dict[str, Any]
    environment: dict[str, Any]


def flatten(node: Any) -> Any:
    """Turns a config into one level, `outer.inner` -> value.

    Args:
      node: plain values, as of a resolved config.

    Returns:
      The flat mapping; for anything but a mapping, a value to compare and print.
    """
    if isinstance(node, Sequence) and not isinstance(node, str):
        return "+".join(str(_name(item)) for item in node)
    if not isinstance(node, Mapping):
        return node
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            name = _name(value)
            if name is not value:
                flat[str(key)] = name
            hidden = {"_target_", "_args_"} | ({"path"} if _is_getter(value) else set())
            inner = flatten(value).items()
            flat.update({f"{key}.{k}": v for k, v in inner if k not in hidden})
        else:
            flat[str(key)] = flatten(value)
    return flat


def _is_getter(node: Mapping[str, Any]) -> bool:
    """Whether an object is a function or class that `path` names."""
    return str(node.get("_target_")).startswith("hydra.utils.get_")


def _name(node: Any) -> Any:
    """Names an object; returns the node itself if it is not one."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        return flatten(node) if isinstance(node, list | tuple) else node
    target = str(node["_target_"])
    if target == "builtins.tuple":
        return flatten(node["_args_"][0])
    if _is_getter(node):
        target = str(node["path"])
    return target.rpartition(".")[2]


def expand(patterns: str | Iterable[str] | None) -> list[Path]:
    """Finds runs by folder, by glob, or by a folder that holds runs at any depth.

    Args:
      patterns: one or several.

    Returns:
      Folders with a config, in order, each once.

    Raises:
      RunError: nothing given, or a pattern under which there is no run.
    """
    given = [patterns] if isinstance(patterns, str) else list(patterns or ())
    if not given:
        raise RunError(
            "give runs=FOLDER or 'runs=[FOLDER,GLOB,...]': folders of runs, or folders of these, "
            "for example runs=runs/lm or 'runs=multirun/lm/*'"
        )
    found: dict[Path, None] = {}
    for pattern in given:
        place = Path(os.path.expanduser(pattern))
        # A folder's name may look like a glob.
        places = [place] if place.is_dir() else [Path(p) for p in sorted(glob.glob(str(place)))]
        inside = [
            folder
            for place in places
            for folder in sorted(path.parent for path in place.rglob(CONFIG))
            # the run's own config, not Hydra's copy nor one in a checkpoint
            if not any(part.startswith(".") for part in folder.relative_to(place).parts)
        ]
        if not inside:
            what = "no such folder" if not places else f"no {CONFIG} in or below it"
            raise RunError(f"runs: {pattern!r}: {what} (looked in {Path.cwd()})")
        found.update(dict.fromkeys(inside))
    return list(found)


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def read(folder: Path) -> Run:
    """Reads a run.

    Args:
      folder: from `expand`.

    Returns:
      The run.

    Raises:
      RunError: a link in it leads out, its table is missing or has no row, or a value in its
        records is not of the type that it has in every run.
    """
    trust.check_links(folder)
    table = folder / METRICS
    if not table.is_file():
        raise RunError(f"{folder} has no {METRICS}: it is not a training run, or it did not start")
    try:
        columns = metrics.read(table)
    except (ValueError, OSError) as error:
        raise RunError(f"{table} is not a table of numbers: {error}") from error
    if not any(columns.values()):
        raise RunError(f"{table} is empty: the run measured nothing; leave it out")
    try:
        config = flatten(OmegaConf.to_container(load_config(folder), resolve=True))
        summary, environment = _json(folder / SUMMARY), _json(folder / ENVIRONMENT)
    except (OmegaConfBaseException, OSError, IndexError, RecursionError) as error:
        raise RunError(f"{folder} cannot be read: {str(error).splitlines()[0]}") from error
    record_fields.check(folder / SUMMARY, summary, record_fields.RESULTS)
    if "judged_by" in summary:
        figure = {summary["judged_by"][0]: record_fields.NUMBER}
        record_fields.check(folder / SUMMARY, summary, figure)
    record_fields.check(folder / ENVIRONMENT, environment, record_fields.MACHINE)
    record_fields.check(folder / CONFIG, config, record_fields.SETTINGS)
    return Run(folder, config, columns, summary, environment)


def need(run: Run, *, config: Sequence[str] = (), summary: Sequence[str] = ()) -> None:
    """Refuses a run that lacks keys of a table.

    Args:
      run: read.
      config: the keys that its config must have.
      summary: the keys that its summary must have.

    Raises:
      RunError: names the file and what it lacks.
    """
    for name, keys, there in ((CONFIG, config, run.config), (SUMMARY, summary, run.summary)):
        if lacking := [key for key in keys if key not in there]:
            raise RunError(
                f"{run.folder / name} has no {', '.join(lacking)}: leave that run out of runs="
            )


def read_all(patterns: str | Iterable[str] | None) -> tuple[list[Run], list[str]]:
    """Reads all runs; those without numbers, or with damaged files, are named and left out.

    Args:
      patterns: as for `expand`.

    Returns:
      The runs, and a line for each that was left out.

    Raises:
      RunError: no run has numbers.
    """
    found, left_out = [], []
    for folder in expand(patterns):
        try:
            with content_of(folder):
                found.append(read(folder))
        except (RunError, OSError) as error:
            left_out.append(" ".join(map(printable, str(error).splitlines())))
    if not found:
        raise RunError("no run with numbers:\n  " + "\n  ".join(left_out))
    return found, left_out


def _is_seed(runs: Sequence[Run], key: str) -> bool:
    """Whether a key is the seed of a run or a copy of it; a seed that chooses data is not."""
    copied = key.endswith(".seed") and _values(runs, key) == _values(runs, "seed")
    return key == "seed" or copied


def _values(runs: Sequence[Run], key: str) -> tuple[str, ...]:
    return tuple(str(run.config.get(key, ABSENT)) for run in runs)


def _joint(runs: Sequence[int], values: Sequence[Any]) -> tuple[int, ...]:
    """Numbers runs so that those with the same number before and the same value share one."""
    numbers: dict[tuple[int, Any], int] = {}
    pairs = zip(runs, values, strict=True)
    return tuple(numbers.setdefault(pair, len(numbers)) for pair in pairs)


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Finds the keys in which configs differ, without seeds, each difference once.

    A config is resolved, so one choice changes many keys: `mixer=attention` also changes
    `model.mixer` and `mixer.heads`. Keys that follow from others are left out if they are inside
    one of them or repeat its values.

    Args:
      runs: any number.

    Returns:
      Keys, outer ones first; the run's name only if nothing else tells runs apart.
    """
    every = dict.fromkeys(key for run in runs for key in run.config)
    differing = [
        key
        for key in every
        if not _is_seed(runs, key)
        and key.split(".")[0] not in (*FREE, *NOT_COMPARED)
        and len(set(_values(runs, key))) > 1
    ]
    kept: dict[str, None] = {}
    seen: set[tuple[str, ...]] = set()
    alike = (0,) * len(runs)  # the same number for runs that agree in all kept keys
    for key in sorted(differing, key=lambda key: (key == "name", key.count("."))):
        values = _values(runs, key)
        repeats = values in seen or not kept.keys().isdisjoint(key.split(".")) or key == "name"
        joint = _joint(alike, values)
        follows = len(set(joint)) == len(set(alike))
        if not (kept and repeats and follows):
            kept[key], alike = None, joint
            seen.add(values)
    inside: dict[str, list[str]] = {}
    for key in every:
        if key.count(".") == 1:
            inside.setdefault(key.split(".")[1], []).append(key)
    acting = (_where_it_acts(runs, key, inside.get(key, ())) for key in kept)
    return sorted(acting, key=lambda key: key.count("."))


def _where_it_acts(runs: Sequence[Run], key: str, inside: Iterable[str]) -> str:
    """Names `mixer.cell` for `cell` if some runs' mixer has no cell, which is then unused there."""
    for inner in inside:
        there = [run for run in runs if inner in run.config]
        if len(there) < len(runs) and _values(there, inner) == _values(there, key):
            return inner
    return key


def check_keys(runs: Sequence[Run], keys: Iterable[str]) -> list[str]:
    """Refuses keys that no run's config has.

    Args:
      runs: at least one.
      keys: of the flattened config.

    Returns:
      The keys.

    Raises:
      RunError: suggests the nearest keys.
    """
    there = list(dict.fromkeys(key for run in runs for key in run.config))
    wanted = list(keys)
    for key in wanted:
        if key not in there:
            near = difflib.get_close_matches(key, there, n=5, cutoff=0.4) or there[:20]
            raise RunError(f"no run's config has the key {key!r}; near it: {', '.join(near)}")
    return wanted


def group(runs: Sequence[Run], keys: Sequence[str]) -> dict[str, list[Run]]:
    """Groups runs that agree in some keys.

    Args:
      runs: any number.
      keys: of the flattened config.

    Returns:
      Label -> runs, in natural order of the keys' values; without keys one group, labelled
      with the runs' name.
    """
    if not keys:
        return {str(runs[0].config.get("name", runs[0].folder.name)): list(runs)}

    def values(run: Run) -> tuple:
        return tuple(run.config.get(key, ABSENT) for key in keys)

    def order(run: Run) -> list[tuple]:
        numbers = (int, float)
        return [(0, v, "") if isinstance(v, numbers) else (1, 0, str(v)) for v in values(run)]

    groups: dict[tuple, list[Run]] = {}
    for run in sorted(runs, key=order):
        groups.setdefault(values(run), []).append(run)

    def text(at: tuple) -> str:
        there = [label(k, v) for k, v in zip(keys, at, strict=True) if v != ABSENT]
        return ", ".join(there) or "none"

    return {text(at): members for at, members in groups.items()}


def label(key: str, value: Any) -> str:
    """Formats a key and its value.

    Args:
      key: of the flattened config.
      value: its value.

    Returns:
      `key=value`, with at most the last two parts of the key.
    """
    short = ".".join(key.split(".")[-2:])
    return f"{short}={'null' if value is None else value}"


def short_names(runs: Sequence[Run]) -> list[str]:
    """Names the runs by their folders without the common parts.

    Args:
      runs: any number.

    Returns:
      A name for each; the folder's own for a single run.
    """
    folders = [os.path.abspath(run.folder) for run in runs]
    common = os.path.commonpath(folders) if len(folders) > 1 else str(runs[0].folder.parent)
    return [os.path.relpath(folder, common) for folder in folders]
