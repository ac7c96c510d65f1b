"""Continues a run: finds the folder, compares the command line with it, cuts its tables."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.run import metrics, seals
from experiments.run.folder_arguments import TRUST, quote_value
from experiments.run.folders import RunError, find_run, read_yaml
from experiments.run.plain_files import aside, replacing

# What may differ: whether to continue, where, and with which trust.
FREE = ("resume", "hydra", TRUST)


def resume_arguments(arguments: Sequence[str]) -> list[str]:
    """Turns `resume=FOLDER` into the arguments that make Hydra work in that folder.

    Args:
      arguments: of the command line, without the program. `resume=true` and `resume=false`
        pass as they are.

    Returns:
      Arguments with `resume=true hydra.run.dir=FOLDER`; Hydra's record of how the run was
      started is left as it is.

    Raises:
      RunError: the folder does not hold a run.
    """
    changed = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "resume" and value.lower() not in ("true", "false", ""):
            name = value if Path(value).is_dir() else value.strip("'\"")
            folder = quote_value(str(find_run(name, key="resume")))
            changed += ["resume=true", f"hydra.run.dir={folder}", "hydra.output_subdir=null"]
        else:
            changed.append(argument)
    return changed


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def check_overrides(
    overrides: Sequence[str], *, cfg: DictConfig, stored: DictConfig, folder: Path
) -> None:
    """Refuses a command line that contradicts the run to continue.

    Args:
      overrides: as given, `KEY=VALUE` or `GROUP=MEMBER`.
      cfg: composed with them.
      stored: the run's own config, which is what it continues with.
      folder: of the run.

    Raises:
      RunError: names the first key that differs, and both values.
    """
    choices = _choices(folder)
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key.split(".")[0].split("/")[0] in FREE:
            continue
        path = key.partition("@")[2] or key
        path = path.replace("/", ".")
        given = _plain(OmegaConf.select(cfg, path))
        if given is None and key in choices:  # a group that writes to the top level
            given, known = value, choices[key]
        else:
            known = _plain(OmegaConf.select(stored, path))
        if given != known:
            shown = known if not isinstance(known, dict) else choices.get(key, "another one")
            raise RunError(
                f"{override} contradicts the run in {folder}, which has {key}={shown}: leave it "
                "out to continue that run, or start a new one without resume"
            )


def _choices(folder: Path) -> dict[str, Any]:
    """Reads the members of groups that the run started with; empty without a complete record."""
    try:
        # Read as plain values: nothing in a run's folder is evaluated.
        record = read_yaml(folder / ".hydra" / "hydra.yaml")
        node = OmegaConf.to_container(record, resolve=False)
    except RunError:
        return {}
    for key in ("hydra", "runtime", "choices"):
        node = node.get(key) if isinstance(node, dict) else None
    return {str(key): value for key, value in node.items()} if isinstance(node, dict) else {}


def cut_table(path: Path, *, last: int) -> None:
    """Removes the rows after a step, and a row that a killed process left unfinished.

    A table with rows that cannot be read is kept as `NAME.damaged.csv`, and one line says so. The
    run continues with the others.

    Args:
      path: a CSV file of numbers with a column `step`; nothing happens if it is missing.
      last: the last step that stays.
    """
    if not path.is_file():
        return
    header, rows, lost = metrics.readable(path, key="step")
    if lost:
        kept = aside(path).name
        seals.say(f"{path} is damaged ({lost}); it is kept as {kept}, without such rows here")
    if not header:
        path.unlink(missing_ok=True)
        return
    at = header.index("step")
    kept = [row for row in rows if float(row[at]) <= last]
    with replacing(path) as whole, whole.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *kept])
