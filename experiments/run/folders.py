"""A run's folder: its config, what was measured, and on which machine."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.run.plain_files import aside, printable, read_text, write_text

CONFIG = "config.yaml"
ENVIRONMENT = "env.json"
SUMMARY = "summary.json"
METRICS = "metrics.csv"
TOKENIZER = "tokenizer.json"
LARGEST_CONFIG, DEEPEST_CONFIG = 200_000, 100  # characters, nested lists and mappings
PLAIN = (str, int, float, bool, type(None), dict, list)  # types in a config
MOST_BITS = 1024  # of a whole number in a config; the largest float has as many
MAKE = "python -m experiments.train experiment=lm"
REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("jax", "jaxlib", "numpy", "optax", "orbax-checkpoint", "hydra-core")


class RunError(Exception):
    """An error that the user can correct; its text says how."""


def write_json(path: Path, value: Any) -> None:
    """Writes a readable JSON file.

    Args:
      path: the file.
      value: plain Python values.
    """
    # Completely or not at all: a run may be killed at any moment.
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of an object.

    Args:
      path: the file.

    Returns:
      The object, as plain Python values.

    Raises:
      RunError: the file is truncated, too large, not JSON, nested too deep, or not an object.
    """
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"{path} is damaged ({_first_line(error)}): put back a copy of it, or leave it out"
        ) from error
    if not isinstance(value, dict):
        raise RunError(f"{path} holds {type(value).__name__} where an object was expected")
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_summary(folder: Path) -> dict[str, Any]:
    """Reads the result of a run; empty if it has none, or a damaged one.

    A run that continues rewrites it, so a damaged one counts as none.

    Args:
      folder: of a run.

    Returns:
      The summary, perhaps empty.
    """
    path = folder / SUMMARY
    try:
        return read_json(path) if path.is_file() else {}
    except RunError as error:
        print(f"{error}; it counts as unfinished", flush=True)
        return {}


def _read_environment(folder: Path) -> dict[str, Any]:
    """Reads what is known of the machine; a damaged file is kept beside the new one."""
    path = folder / ENVIRONMENT
    try:
        known = read_json(path) if path.is_file() else {}
        if not isinstance(known.get("resumed", []), list):
            raise RunError(f"{path} is damaged (resumed is not a list)")
        return known
    except RunError as error:
        print(f"{error}; it is kept as {aside(path).name}", flush=True)
        return {}


def _git(*arguments: str) -> str | None:
    """Runs git in this repository; None without git or outside a checkout."""
    try:
        done = subprocess.run(
            # Only read: a run that dies meanwhile must leave no lock in a repository.
            ["git", "--no-optional-locks", "-C", str(REPOSITORY), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def environment() -> dict[str, Any]:
    """Collects what is needed to judge or repeat a run.

    Returns:
      Versions, device, machine, commit and whether the tree was dirty.
    """
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain") if commit else None
    device = jax.devices()[0]
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "backend": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cpu_count": os.cpu_count(),
        "git_commit": commit,
        "git_dirty": None if changes is None else bool(changes),
    }


def reopen_run(folder: Path, moved: DictConfig | None = None) -> None:
    """Records that a run continues, on which machine and with which versions.

    Args:
      folder: of a run that `opening.open_run` opened.
      moved: its config, if its data is in another place now.
    """
    if moved is not None:
        write_text(folder / CONFIG, OmegaConf.to_yaml(moved))
    known = _read_environment(folder)
    again = [*known.get("resumed", []), environment()]
    write_json(folder / ENVIRONMENT, {**known, "resumed": again})


def commit_of(folder: Path) -> str | None:
    """Reads the commit of the code that started a run.

    Args:
      folder: of the run.

    Returns:
      Its first characters; None if the folder does not say.
    """
    try:
        commit = str(read_json(folder / ENVIRONMENT).get("git_commit"))
    except (RunError, OSError):
        return None
    return commit[:8] if re.fullmatch("[0-9a-f]{40}", commit) else None


def status(folder: Path) -> str | None:
    """Reads how a run ended.

    Args:
      folder: of a run.

    Returns:
      "finished", "interrupted", "diverged" or "failed"; None if it did not end.
    """
    return read_summary(folder).get("status")


def close_run(folder: Path, summary: dict[str, Any]) -> None:
    """Writes the result, and adds the seconds it took to the environment.

    Args:
      folder: of the run.
      summary: plain Python values, with `seconds`.
    """
    write_json(folder / SUMMARY, summary)
    known = _read_environment(folder)
    write_json(folder / ENVIRONMENT, {**known, "seconds": summary["seconds"]})


def find_run(run: str | None, *, key: str = "run", make: str = MAKE) -> Path:
    """Turns `run=FOLDER` into a path.

    Args:
      run: a run's folder as the user gave it.
      key: the setting that named it.
      make: a command that makes such a run.

    Returns:
      The folder; it holds a config.

    Raises:
      RunError: nothing given, no such folder, or not a run; names the newest run.
    """
    known = sorted(
        (
            path.parent
            for root in ("runs", "multirun")
            for path in Path(root).rglob(CONFIG)
            if path.parent.name != ".hydra"
        ),
        key=lambda path: path.stat().st_mtime,
    )
    hint = (
        f"the newest here is {key}={known[-1]}"
        if known
        else f"there is none here yet: `{make}` makes one"
    )
    if not run:
        raise RunError(f"give {key}=FOLDER, the folder of a training run; {hint}")
    folder = Path(os.path.expanduser(str(run)))  # a folder may be called 2024
    if folder.is_file():
        raise RunError(f"{key}={run!r} is a file: give the run's folder, {key}={folder.parent}")
    if not folder.is_dir():
        raise RunError(f"{key}={run!r}: no such folder (looked in {Path.cwd()}); {hint}")
    if not (folder / CONFIG).is_file():
        inside = sorted(path for deep in ("*", "*/*") for path in folder.glob(f"{deep}/{CONFIG}"))
        inside = [path.parent for path in inside if not path.parent.name.startswith(".")]
        if inside:
            hint = f"it holds runs: give one of them, such as {key}={inside[0]}"
        raise RunError(f"{key}={run!r} holds no {CONFIG}, so it is not a run's folder; {hint}")
    return folder


def need(cfg: DictConfig, folder: Path, *keys: str) -> None:
    """Refuses a run whose config lacks a required key.

    Args:
      cfg: from `load_config`.
      folder: of the run.
      *keys: the keys that the config must have.

    Raises:
      RunError: names the missing keys.
    """
    if lacking := [key for key in keys if OmegaConf.is_missing(cfg, key) or cfg.get(key) is None]:
        raise RunError(
            f"{folder / CONFIG} has no {', '.join(lacking)}: it is not a language model's, or "
            f"it is damaged; give a run of `{MAKE}`"
        )


def _depth(text: str) -> int:
    """Bounds how deep brackets or dashes nest: YAML's reader takes quadratic time over them."""
    deepest = depth = 0
    for mark in re.findall(r"[\[\]{}]", text):
        depth += 1 if mark in "[{" else -1
        deepest = max(deepest, depth)
    return max(deepest, *(len(run) // 2 for run in re.findall(r"(?:[-?] )+", text)), 0)


def read_yaml(path: Path) -> DictConfig | ListConfig:
    """Reads a YAML file of a run's folder, which may come from anybody.

    Args:
      path: the file.

    Returns:
      Its values; interpolations in them are not evaluated yet.

    Raises:
      RunError: the file is missing, truncated, too large or too deep, or it has aliases.
    """
    try:
        text = read_text(path, most=4 * LARGEST_CONFIG)
        if len(text) > LARGEST_CONFIG:
            raise ValueError(f"{len(text)} characters, and a config has at most {LARGEST_CONFIG}")
        if _depth(text) > DEEPEST_CONFIG:
            raise ValueError(f"it nests more than {DEEPEST_CONFIG} deep")
        # Aliases could expand to more than the memory holds; no run writes any.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("it has YAML aliases, which no run writes")
        return OmegaConf.create(text)
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}): give another run") from error
    except (
        ValueError,
        yaml.YAMLError,
        OmegaConfBaseException,
        RecursionError,
        AssertionError,
        *(LookupError, AttributeError, TypeError),  # of YAML's own tags, such as !!int ''
    ) as error:
        raise RunError(
            f"{path} is damaged ({_first_line(error)}): put back a copy of it, or give another run"
        ) from error


def load_config(folder: Path) -> DictConfig:
    """Reads the resolved config of a run to inspect it; use `trust.open_config` to build from it.

    Args:
      folder: from `find_run`.

    Returns:
      The config that `opening.open_run` wrote: only values, no interpolations.

    Raises:
      RunError: the file is missing, truncated or not a config, or it holds an interpolation, which
        `opening.open_run` never writes.
    """
    path = folder / CONFIG
    cfg = read_yaml(path)
    if not isinstance(cfg, DictConfig) or not cfg:
        raise RunError(
            f"{path} is empty or not a config: put back a copy of it, or give another run"
        )
    check_inert(OmegaConf.to_container(cfg, resolve=False), str(path))
    return cfg


def check_inert(node: Any, where: str, key: str = "") -> None:
    """Refuses what no config of a run holds.

    Texts that OmegaConf would evaluate could read the environment. Python does not even print whole
    numbers of some thousand digits, and YAML's tags make objects of other types.

    Args:
      node: plain values.
      where: names them in the message.
      key: of the node.

    Raises:
      RunError: names the key.
    """
    kind = type(node)
    if kind not in PLAIN or (kind is int and node.bit_length() > MOST_BITS):
        what = "a huge number" if kind is int else f"a {kind.__name__}"
        raise RunError(
            f"{where}: {printable(key)} holds {what}, which the config of a run must not hold"
        )
    if isinstance(node, str) and "${" in node:
        raise RunError(
            f"{where}: {key} holds {node!r}, and ${{ begins an interpolation, which the config of "
            "a run must not hold: write it without the brace"
        )
    if isinstance(node, dict):
        for name, child in node.items():
            check_inert(name, where, f"a name in {key or 'it'}")
            check_inert(child, where, f"{key}.{name}" if key else str(name))
    if isinstance(node, list):
        for number, child in enumerate(node):
            check_inert(child, where, f"{key}[{number}]")
