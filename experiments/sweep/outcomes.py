"""What became of the jobs of a sweep: each leaves a note, which whoever started them reads.

Jobs may run in processes of their own, and two sweeps in one folder at the same time: the notes of
each start are in a folder of their own, `SWEEP/.jobs/START`.
"""

import contextlib
import os
import shlex
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override

from experiments.run import claim, folders, litter, record_fields
from experiments.run.folder_arguments import quoted
from experiments.run.tables import show

NOTES = ".jobs"
# Decided for each start: each job's config is composed with what Hydra's part was composed with.
DIR, SUBDIR, START = "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.callbacks.sweep.notes"
# What to do about jobs that were not run.
ADVICE = {
    "refused": "change the settings that the lines above name",
    "in use": "wait until the other process has ended",
}


class Job(NamedTuple):
    """The outcome of one job.

    Attributes:
      number: in the sweep.
      folder: of its run.
      overrides: as Hydra was given them.
      status: "finished", "finished before", "interrupted", "failed", "refused" before it began,
        "in use" by another process, or "no ending" if it was killed or is still running.
      new: whether this start has begun its run, which it would otherwise have found.
      error: one line, for a job that failed, was refused or is in use.
    """

    number: int
    folder: Path
    overrides: list[str]
    status: str
    new: bool
    error: str | None


def place() -> Path:
    """The folder of the sweep."""
    return _notes().parent.parent


def have_begun() -> bool:
    """Whether a sweep has been started in this process: Hydra may only have shown its config."""
    given = HydraConfig.get().callbacks.get("sweep") if HydraConfig.initialized() else None
    return bool(given and given.get("notes")) and HydraConfig.get().mode == RunMode.MULTIRUN


def _notes() -> Path:
    given = HydraConfig.get().callbacks.get("sweep")
    if not given or not given.get("notes"):
        raise folders.RunError("hydra.callbacks.sweep must stay: by it jobs note how they end")
    return Path(given.notes)


def begin(config: DictConfig, place: str, inner: str) -> None:
    """Decides on the folder of a sweep and of this start's notes, which all of its jobs are told.

    Args:
      config: of the sweep. Its folder may refer to what varies and is the same for every job.
      place: of the sweep, from `sweep_folders.places`.
      inner: of the jobs in it, with references that each resolves by itself.

    Raises:
      RunError: that of the notes was given, or something is in its place.
    """
    overrides = OmegaConf.to_container(config.hydra.overrides.hydra)  # with their references
    assert isinstance(overrides, list)
    typed = [one for one in overrides if str(one).lstrip("+~").startswith(START)]
    if typed or config.hydra.callbacks.sweep.notes is not None:
        given = typed[0] if typed else f"{START}={config.hydra.callbacks.sweep.notes}"
        raise folders.RunError(f"{given} is drawn for each start of a sweep:\nleave it out")
    chosen = inner == config.hydra.sweep._get_node("subdir")._value()
    with flag_override(config.hydra, "readonly", False):
        config.hydra.sweep.dir, config.hydra.sweep.subdir = place, inner
        sweep = str(config.hydra.sweep.dir)  # resolved, once for all
        drawn = f"{os.path.abspath(sweep)}/{NOTES}/{uuid.uuid4().hex[:12]}"
        if "${" in drawn:  # each job would take it for a reference
            raise folders.RunError(f"{DIR}={sweep} in {os.getcwd()}: no sweep has a place with ${{")
        config.hydra.sweep.dir, config.hydra.callbacks.sweep.notes = sweep, drawn
        decided = [f"{DIR}={quoted(sweep)}", f"{START}={quoted(drawn)}"]
        decided += [] if chosen else [f"{SUBDIR}={inner}"]
        config.hydra.overrides.hydra = [*overrides, *decided]
    if (notes := Path(drawn).parent).exists() and not notes.is_dir():
        raise folders.RunError(
            f"{notes} is in the way, a sweep notes there what becomes of its jobs:\n"
            "take it away, or give another hydra.sweep.dir"
        )


def note(folder: Path, status: str | None, *, new: bool, error: str | None = None) -> None:
    """Writes what has become of this job.

    Args:
      folder: of its run.
      status: see `Job`; None while it runs: then its folder tells.
      new: see `Job`.
      error: why it did not end well.
    """
    known = HydraConfig.get()
    path = _notes() / f"{known.job.num}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"number": known.job.num, "overrides": list(known.overrides.task), "error": error}
    folders.write_json(path, {**about, "folder": str(folder), "status": status, "new": new})


def jobs() -> list[Job]:
    """Reads the jobs that this start of a sweep has begun, in order; none outside of a sweep."""
    if not have_begun():
        return []
    found = [_read(path) for path in litter.without(_notes().glob("*.json"))]
    return sorted(found, key=lambda job: job.number)


def _read(path: Path) -> Job:
    known = folders.read_json(path)
    folder, status, error = Path(known["folder"]), known["status"], known["error"]
    # A job that another process held may have ended meanwhile.
    if status == "in use" and (folder / folders.CONFIG).is_file() and not claim.in_use(folder):
        status = error = None
    try:
        status = status or folders.status(folder) or "no ending"
    except OSError as problem:
        status, error = "no ending", f"{problem.filename}: {problem.strerror}"
    error = error and error.replace("\n", " ")
    return Job(known["number"], folder, known["overrides"], status, known["new"], error)


def forget() -> None:
    """Removes the notes of this start; those of others stay."""
    with contextlib.suppress(OSError):
        for path in _notes().glob("*.json"):
            path.unlink()
        _notes().rmdir()
        _notes().parent.rmdir()


def judge(folder: Path) -> tuple[str | None, float | None]:
    """Reads the figure that a run is judged by.

    Args:
      folder: of a run.

    Returns:
      The figure's name and its last value; None if the run left none, or is damaged.
    """
    summary, path = folders.read_summary(folder), folder / folders.SUMMARY
    try:
        record_fields.check(path, summary, record_fields.RESULTS)
        column = (summary.get("judged_by") or [None])[0]
        record_fields.check(path, summary, {column: record_fields.NUMBER} if column else {})
    except folders.RunError as error:
        print(error)
        return None, None
    return column, summary.get(column)


def report(jobs: Sequence[Job]) -> bool:
    """Prints the outcomes of a sweep's jobs, and the next commands.

    Args:
      jobs: of the sweep, at least one.

    Returns:
      Whether all of them are finished.
    """
    alike = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    judged = [(None, None) if job.status in ADVICE else judge(job.folder) for job in jobs]
    columns = {column for column, _ in judged if column}
    rows = []
    for job, (_, value) in zip(jobs, judged, strict=True):
        own = " ".join(line for line in job.overrides if line not in alike)
        figure = "-" if value is None else f"{value:.4g}"
        rows.append((str(job.number), own, job.status, figure, job.folder.name))
    sweep = place()
    sweep = sweep.relative_to(Path.cwd()) if sweep.is_relative_to(Path.cwd()) else sweep
    names = ("job", "overrides", "status", "/".join(sorted(columns)) or "figure", "folder")
    show(f"\n{sweep}: {len(jobs)} jobs", names, rows)
    for job in jobs:
        if job.error:
            print(f"job {job.number}: {job.error}")
    done = [job for job in jobs if job.status.startswith("finished")]
    if done:
        print("next:")
        for program in ("compare", "plot"):
            print(f"  {shlex.join(['python', '-m', f'experiments.{program}', f'runs={sweep}'])}")
    for ending, advice in ADVICE.items():
        if found := sum(job.status == ending for job in jobs):
            print(f"{found} of {len(jobs)} jobs are {ending}: {advice}")
    if left := sum(job not in done and job.status not in ADVICE for job in jobs):
        print(f"{left} of {len(jobs)} jobs are not finished: repeat the command")
        print("to run them from their last checkpoints; finished jobs are not run again")
    return len(done) == len(jobs)
