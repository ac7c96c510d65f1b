"""The rows of a benchmark on disk: written as they are measured, reused by the same command."""

import csv
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.contest.contest import REFERENCE, Row
from experiments.run import folders, metrics, trust
from experiments.run.plain_files import open_to_append

TABLE = "results.csv"
FIELDS = [field.name for field in dataclasses.fields(Row)]
WHOLE = ("time", "batch", "state", "rounds", "iterations", "fallback_steps")
TEXT = ("which", "name", "verdict")
# Keys of `folders.environment` that rows of one table must share.
SAME = ("python", "platform", "packages", "backend", "device", "devices", "cpu_count")
SAME_CODE = ("git_commit", "git_dirty")


def read(path: Path) -> list[Row]:
    """Reads rows, without a last one that a killed process left unfinished.

    Args:
      path: from `append`; a missing file has no rows.

    Returns:
      The rows.

    Raises:
      RunError: it is not such a table.
    """
    if not path.is_file():
        return []

    def value(name: str, cell: str) -> Any:
        if name in TEXT:
            return cell
        return None if not cell else int(cell) if name in WHOLE else float(cell)

    try:
        header, *rows = metrics.read_rows(path) or [FIELDS]
        if header != FIELDS or any(len(row) != len(FIELDS) for row in rows):
            raise ValueError(f"its columns are {', '.join(header)}")
        return [Row(*map(value, FIELDS, row)) for row in rows]
    except ValueError as error:
        raise folders.RunError(
            f"{path} is damaged ({error}): move it away, or give fresh=true"
        ) from error


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows; a new file begins with its header.

    Args:
      path: the file.
      rows: of one contest.
    """
    new = not path.is_file()
    with open_to_append(path) as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)
        file.flush()
        os.fsync(file.fileno())


def keep_whole(path: Path, names: Sequence[str]) -> dict[tuple, list[Row]]:
    """Drops the rows of interrupted contests, and returns those of complete ones.

    Args:
      path: the table.
      names: of all implementations in a contest.

    Returns:
      Rows by `(time, batch, state, pass)`.
    """
    contests: dict[tuple, list[Row]] = {}
    for row in read(path):
        contests.setdefault((row.time, row.batch, row.state, row.which), []).append(row)
    whole = {at: rows for at, rows in contests.items() if [row.name for row in rows] == list(names)}
    if path.is_file():
        part = path.with_suffix(".part")
        part.unlink(missing_ok=True)
        append(part, [row for rows in whole.values() for row in rows])
        os.replace(part, path)
    return whole


def names_of(suite: Mapping[str, Any]) -> list[str]:
    """Lists the implementations of a suite, in the order of the table.

    Args:
      suite: as in conf/suite.

    Returns:
      Names.
    """
    return [REFERENCE, *suite["solvers"], *suite["rivals"]]


def same_work(folder: Path, cfg: DictConfig, environment: Mapping[str, Any]) -> bool:
    """Whether a folder holds rows of the same suite, machine and code.

    Args:
      folder: perhaps of a run of the benchmark.
      cfg: of the current run.
      environment: the current one.

    Returns:
      True if its rows can be in one table with new ones.
    """
    try:
        trust.check_links(folder)
        known = folders.read_json(folder / folders.ENVIRONMENT)
        config = folders.load_config(folder)
        before, now = (OmegaConf.to_container(c, resolve=True) for c in (config, cfg))
    except (folders.RunError, OSError, ValueError):
        return False
    for plain in (before, now):
        assert isinstance(plain, dict)
        plain.pop("fresh", None)
    return before == now and all(
        known.get(name) == environment[name] for name in (*SAME, *SAME_CODE)
    )


def find(
    folder: Path,
    cfg: DictConfig,
    environment: Callable[[], Mapping[str, Any]] = folders.environment,
) -> Path | None:
    """Finds the newest folder with the same work, this one or beside it.

    Args:
      folder: of the current run.
      cfg: its config.
      environment: of this machine.

    Returns:
      The folder, or None.
    """
    beside = [path.parent for path in folder.parent.glob(f"*/{TABLE}")]
    newest = sorted(beside, key=lambda path: path.stat().st_mtime, reverse=True)
    places = [path for path in (folder, *newest) if (path / TABLE).is_file()]
    now = environment() if places else {}
    return next((path for path in places if same_work(path, cfg, now)), None)
