"""Continues a run: finds the folder, compares the command line with it, cuts its tables."""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments.run import metrics, names, seals, trust
from experiments.run.folder_arguments import PLACES, TRUST, quote_value, replace_data
from experiments.run.folders import CONFIG, RunError, find_run, read_yaml
from experiments.run.limits import shortened
from experiments.run.plain_files import aside, printable, replacing

# What may differ: whether to continue, where, and with which trust.
FREE = ("resume", "hydra", TRUST)
# Sections of a config for outputs and logging, which do not change what a run computes.
NOT_COMPARED = ("checkpoint", "logger", "profile", "trace")
LEFT_OUT = (*FREE, *NOT_COMPARED, "from")  # the place of a base is not read again
# Mappings whose order counts: a weight passes one transform after the other.
CHAINS = ("transform", "task.transform.members")


def resume_arguments(arguments: Sequence[str]) -> list[str]:
    """Turns `resume=FOLDER` into the arguments that make Hydra work in that folder.

    Args:
      arguments: of the command line, without the program. `resume=true` and `resume=false`
        pass as they are.

    Returns:
      Arguments with `resume=true hydra.run.dir=FOLDER`; Hydra's record of how the run was
      started is left as it is.

    Raises:
      RunError: the folder does not hold a run, or `hydra.run.dir` gives another one.
    """
    named = [one for one in arguments if _names_a_folder(one)]
    if not named:
        return list(arguments)
    changed = []
    for argument in replace_data(arguments):  # the source is the run's
        key, _, value = argument.partition("=")
        if _names_a_folder(argument):
            folder = find_run(_folder_of(argument), key="resume")
            place = f"hydra.run.dir={quote_value(str(folder))}"
            changed += ["resume=true", place, "hydra.output_subdir=null"]
        elif key.lstrip("+") in ("hydra", "hydra.run"):
            raise RunError(
                f"{argument} beside {named[0]}, which gives the run's folder: leave it out"
            )
        elif key.lstrip("+") != "hydra.run.dir":
            changed.append(argument)
        elif Path(_folder_of(argument)).resolve() != Path(_folder_of(named[0])).resolve():
            raise RunError(
                f"{named[0]} continues the run in that folder, and {argument} puts a run into "
                f"another one:\ngive only {named[0]} to continue it, or only {argument} to start "
                "a new run there"
            )
    return changed


def _names_a_folder(argument: str) -> bool:
    key, _, value = argument.partition("=")
    if value.startswith("{") and not Path(value).is_dir():
        return False
    return key.lstrip("+") == "resume" and value.lower() not in ("true", "false", "")


def _folder_of(argument: str) -> str:
    """Without the quotes of Hydra's grammar, unless the name of the folder has them."""
    value = argument.partition("=")[2]
    return value if Path(value).is_dir() else value.strip("'\"")


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
        known = _plain(OmegaConf.select(stored, path))
        if key in PLACES and known is not None:  # it may have moved: its content is compared
            continue
        if key == "from" and os.path.realpath(str(given)) == os.path.realpath(str(known)):
            continue
        if given is None and key in choices:  # a group that writes to the top level
            given, known = value, choices[key]
        shown = {key: known}
        if isinstance(given, dict) and key in choices:  # the rest of the member is the run's
            given, known = value, choices[key]
            shown = {key: known}
        elif isinstance(given, dict) and isinstance(known, dict):
            one, other = dict(_leaves(given, path)), dict(_leaves(known, path))
            differing = [
                k
                for k in other | one
                if one.get(k) != other.get(k) and k.partition("[")[0] not in PLACES
            ]
            given, known = differing, []
            shown = {k: other.get(k) for k in differing}
        if given != known:
            key, known = next(iter(shown.items()))
            typed = override.lstrip("+").replace("'", "")  # before it was made Hydra's
            raise RunError(
                f"{typed} contradicts the run in {folder}, which has {key}={known}: leave it "
                "out to continue that run, or start a new one without resume"
            )


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of plain values, by their keys."""
    if isinstance(node, dict) and node:
        for name, child in node.items():
            yield from _leaves(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list) and node:
        for number, child in enumerate(node):
            yield from _leaves(child, f"{key}[{number}]")
    else:
        yield key, node


def move_data(cfg: DictConfig, given: DictConfig) -> bool:
    """Puts the place of the data that the command line names into a run's config.

    Args:
      cfg: of the run.
      given: composed, with the overrides.

    Returns:
      Whether it is another place.
    """
    typed = [one.lstrip("+").partition("=")[0] for one in HydraConfig.get().overrides.task]
    moved = False
    for key in (key for key in PLACES if key in typed):
        place = _plain(OmegaConf.select(given, key))
        for path in (key, f"task.{key}"):  # a task repeats its data
            if OmegaConf.select(cfg, path) not in (None, place):
                OmegaConf.update(cfg, path, place)
                moved = True
    return moved


def compared(config: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the settings of a run that may not change while it continues.

    Args:
      config: resolved, as plain values.

    Returns:
      Values by key, JSON-able; without places of files, whose contents are compared.
    """
    kept = {key: value for key, value in config.items() if key not in LEFT_OUT}
    places = {key for key, _ in trust.paths(kept, "")}
    found = {
        key: value
        for key, value in _leaves(kept)
        if not any(key == place or key.startswith((f"{place}.", f"{place}[")) for place in places)
    }
    return json.loads(json.dumps(found))  # as a checkpoint gives it back


def _single(saved: Mapping[str, Any]) -> dict[str, Any]:
    """As `compared` has them; an earlier version kept a list as one value."""
    return {one: leaf for key, value in saved.items() for one, leaf in _leaves(value, key)}


def check_same(
    saved: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    where: str,
) -> None:
    """Refuses a config that was changed since a checkpoint was written.

    Args:
      saved: from `compared`, then; None in a checkpoint of an earlier version: nothing is known.
      config: now.
      where: the checkpoint, for the message.

    Raises:
      RunError: names the first setting that was changed, and both values.
    """
    if saved is None:
        return
    now, then = compared(config), _single(saved)
    for key in now | then:
        if key.split(".")[0] in LEFT_OUT:
            continue
        before, after = then.get(key), now.get(key)
        # Names of an earlier version are to be replaced by those of this one, see `trust`.
        same = before == after or repr(before) == repr(after)  # also nan
        if same or (isinstance(before, str) and names.is_gone(before)):
            continue
        raise RunError(
            f"{CONFIG} has {key}={shortened(str(after))}, and {where} was trained with "
            f"{shortened(str(before))}:\n"
            f"write that back into {CONFIG}, or start a new run"
        )
    if (moved := _reordered(then, now)) is not None:
        raise RunError(
            f"{CONFIG} has {moved[2]} in {moved[0]}, and {where} was trained with {moved[1]}:\n"
            f"write that order back into {CONFIG}, or start a new run"
        )


def _reordered(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Finds a chain in another order: its key and, as text, both orders.

    Args:
      then, now: values by key, in the order of their configs.
    """
    for chain in CHAINS:
        inner = [
            [key.removeprefix(f"{chain}.") for key in each if key.startswith(f"{chain}.")]
            for each in (then, now)
        ]
        before, after = (list(dict.fromkeys(k.split(".")[0] for k in keys)) for keys in inner)
        if before != after and sorted(before) == sorted(after):
            return chain, *(printable(shortened(" > ".join(one))) for one in (before, after))
    return None


def difference(then: Any, now: Any) -> str | None:
    """Names a setting in which two configs differ; of mappings only `transform` has an order.

    Args:
      then, now: plain values.

    Returns:
      `KEY=BEFORE, and this job has KEY=AFTER`; None if nothing differs.
    """
    before, after = dict(_leaves(then)), dict(_leaves(now))
    for key in before | after:
        if repr(before.get(key, before)) != repr(after.get(key, after)):
            both = (str(each.get(key, "something else")) for each in (before, after))
            one, other = (printable(shortened(text)) for text in both)
            return f"{printable(key)}={one}, and this job has {printable(key)}={other}"
    if (moved := _reordered(before, after)) is not None:
        key, one, other = moved
        return f"{key} in the order {one}, and this job has {other}"
    return None


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
