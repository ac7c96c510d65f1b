"""Evaluates finished runs in bits per byte: `python -m experiments.evaluate run=FOLDER`."""

import contextlib
import glob
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, ListConfig, OmegaConf

from experiments.data.baselines import baselines
from experiments.data.corpus import digest
from experiments.run import checkpoints, folders, tables, trust
from experiments.run.folder_arguments import PLACES, quote_folders, replace_data
from experiments.run.memory import check_tokens
from experiments.run.plain_files import printable
from experiments.shell.build import build_data
from experiments.shell.commandline import command, guarded
from experiments.shell.foreign import content_of
from experiments.sweep import run_sets
from experiments.text.judging import bits_per_byte
from experiments.text.trained import open_model


def find_runs(given: Any) -> list[Path]:
    """Finds the given runs.

    Args:
      given: a run's folder; or a glob, or a list of folders and globs.

    Returns:
      Their folders.

    Raises:
      RunError: there is none.
    """
    if isinstance(given, ListConfig):
        return run_sets.expand(map(str, given))
    if given and glob.has_magic(given) and not Path(given).is_dir():
        return run_sets.expand(given)
    return [folders.find_run(given)]


def judged_on(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Selects the data to evaluate a run on: by default that of the run itself.

    Args:
      cfg: see conf/evaluate.yaml.
      folder: of the run.

    Returns:
      `data`, the config of a source; `own`, whether it is the run's; `windows`, `length` and
      `batch_size`.

    Raises:
      RunError: its config needs something that is not trusted.
    """
    trained = trust.open_config(folder)
    folders.need(trained, folder, "model", "data", "evaluation")
    given = OmegaConf.to_container(cfg.data, resolve=True) if "data" in cfg else {}
    assert isinstance(given, dict)
    is_own = "_target_" not in given
    if is_own:
        for name, value in given.items():  # the same data in another place
            if f"data.{name}" not in PLACES or trained.data.get(name) is None:
                raise folders.RunError(
                    f"data.{name}={value}: the data of {folder} has no such place; leave it out, "
                    "or choose other text with data=SOURCE"
                )
            trained.data[name] = value
        trust.check_paths(trained.data, folder, key="data")
    own = OmegaConf.to_container(trained.data, resolve=True)
    data = own if is_own else given
    assert isinstance(own, dict)
    numbers = {
        name: trained.evaluation[name] if cfg[name] is None else cfg[name]
        for name in ("windows", "length", "batch_size")
    }
    # Other text, but in the model's tokens.
    data = {**data, "tokenizer": own.get("tokenizer")}
    return {"data": data, "own": is_own, **numbers}


@contextlib.contextmanager
def leaving_out(judged: Sequence[Path], *, several: bool) -> Iterator[None]:
    """Says why runs among several cannot be scored, and goes on.

    Args:
      judged: the runs in the block.
      several: whether there are others; the error of a single run is raised.
    """
    try:
        yield
    except (folders.RunError, OSError) as error:
        if not several:
            raise
        said = " ".join(map(printable, str(error).splitlines()))
        for folder in judged:
            print(f"left out: {folder}: {said}", flush=True)


def score(judged: list[Path], where: dict[str, Any], *, several: bool) -> dict[str, float]:
    """Scores runs on the same windows, and shows them beside compressors.

    Args:
      judged: folders of the runs.
      where: from `judged_on`.
      several: see `leaving_out`.

    Returns:
      Bits per byte by folder.

    Raises:
      RunError: the windows do not fit; or, of a single run, the text has changed since, or it is
        not a language model's.
    """
    check_tokens("windows", where["windows"], where["length"])
    with content_of(judged[0]) if where["own"] else contextlib.nullcontext():
        data = build_data(OmegaConf.create({"data": where["data"]}))
    try:
        held_out = data.held_out(count=where["windows"], length=where["length"])
    except ValueError as error:
        raise folders.RunError(str(error)) from error
    scored = {}
    for folder in judged:
        with leaving_out([folder], several=several), content_of(folder):
            if where["own"]:
                known = checkpoints.data_of(folder).get("held-out text")
                if known not in (None, digest(data.validation)):
                    raise folders.RunError(
                        f"{folder} was evaluated on other held-out text than {data.source}: its "
                        f"digest was {known!r} and is {digest(data.validation)!r}. Restore it, or "
                        "choose the text with data=SOURCE"
                    )
            model, params, _ = open_model(folder)
            judge = bits_per_byte(
                model,
                held_out,
                batch_size=where["batch_size"],
                bytes_per_token=data.bytes_per_token,
            )
            scored[str(folder)] = judge(params)
    if not scored:
        return {}
    unit = "bytes" if data.bytes_per_token == 1 else "tokens"
    windows = f"{where['windows']} windows of {where['length']} {unit}"
    tables.show_quality(scored, baselines(data.validation), where=f"{windows}, {data.source}")
    return scored


def job(cfg: DictConfig) -> dict[str, float]:
    """Scores runs, with a table for each text.

    Args:
      cfg: composed by Hydra, see conf/evaluate.yaml.

    Returns:
      Bits per byte by folder.

    Raises:
      RunError: no such run, or a setting does not fit.
    """
    together: dict[str, list[Path]] = {}
    runs, scored = find_runs(cfg.run), {}
    several = len(runs) > 1
    for folder in runs:
        with leaving_out([folder], several=several), content_of(folder):
            where = judged_on(cfg, folder)
            together.setdefault(json.dumps(where), []).append(folder)
    for where, judged in together.items():
        with leaving_out(judged, several=several):
            scored.update(score(judged, json.loads(where), several=several))
    if not scored:
        raise folders.RunError("no run could be scored: the lines above say why")
    return scored


def prepare(arguments: list[str]) -> list[str]:
    """Writes the command line as Hydra reads it.

    Args:
      arguments: of the command line, without the program.

    Returns:
      The arguments for Hydra.
    """
    return replace_data(quote_folders(arguments, keys=("run", *PLACES, trust.TRUST)))


@command
@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Hydra's entry."""
    guarded(lambda: job(cfg), cfg)


if __name__ == "__main__":
    sys.argv[1:] = prepare(sys.argv[1:])
    main()
