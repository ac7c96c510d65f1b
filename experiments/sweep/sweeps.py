"""Sweeps that survive their jobs: failures are recorded, finished jobs are not run again.

A job's folder depends only on its config (see `sweep_folders`), and a job that finds a run there
continues it. Repeating the command therefore does the remaining work.
"""

import contextlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from experiments.run import claim, folders, given_folders, litter, record_fields, records, trust
from experiments.run.checks import check_text
from experiments.run.plain_files import read_text, write_text
from experiments.run.tables import show
from experiments.shell.commandline import check, launch
from experiments.shell.explanations import explain
from experiments.shell.overrides import check_repeated
from experiments.sweep import first_start
from experiments.sweep.sweep_folders import check_inside, check_places, is_named, name_sweep

ERROR = "error.txt"
REFUSED = "refused"  # holds a file for each refused job, which has no folder
OVERRIDES = Path(".hydra") / "overrides.yaml"
RECORD = "multirun.yaml"  # Hydra's, of the sweep
# What to do about jobs that were not run.
ADVICE = {
    "refused": "change the settings that the lines above name",
    "in use": "wait until the other process has ended",
}
# The Hydra plugin that each choice needs; all are in the extra `sweeps`.
PLUGINS = {
    "hydra/launcher=joblib": "hydra_joblib_launcher",
    "hydra/launcher=submitit_local": "hydra_submitit_launcher",
    "hydra/launcher=submitit_slurm": "hydra_submitit_launcher",
    "hydra/launcher=local": "hydra_submitit_launcher",
    "hydra/launcher=slurm": "hydra_submitit_launcher",
    "hydra/sweeper=optuna": "hydra_optuna_sweeper",
    "sweep=optuna": "hydra_optuna_sweeper",
}


class Job(NamedTuple):
    """The outcome of one job.

    Attributes:
      number: in the sweep.
      folder: of its run.
      overrides: as Hydra was given them.
      status: "finished", "finished before", "interrupted", "failed", "refused" before it began,
        "in use" by another process, or "no ending" if it was killed or is still running.
      figure: by which the run is judged, after its last evaluation; None without one.
      column: the name of that figure.
      error: one line, for a job that failed, was refused or is in use.
    """

    number: int
    folder: Path
    overrides: list[str]
    status: str
    figure: float | None
    column: str | None
    error: str | None


# A version of a file: its number and the time of its last change, by the clock of its disk.
Stamp = tuple[int, int]


class Announce(Callback):
    """Tells `start` after a sweep which one it was: `hydra.callbacks.sweep` in the config."""

    before: Mapping[Path, Stamp] = {}  # the records in the sweep's folder when it began

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra itself sets this only inside jobs; it writes into the sweep's folder after this."""
        del kwargs
        HydraConfig.instance().set_config(config)
        with given_folders.ended(HydraConfig.instance()):
            check_text("hydra.sweep.dir", config.hydra.sweep.dir)
            check_places(config)
            trust.check_links(Path(config.hydra.sweep.dir), written=True)
            with contextlib.suppress(OSError):  # Hydra reports it
                Announce.before = _stamps(_place())


def _stamps(sweep: Path) -> dict[Path, Stamp]:
    """Versions of what jobs leave; a job that begins or ends writes its files anew."""
    found = [*sweep.rglob(str(OVERRIDES)), *_refusals(sweep)]
    found += [path.parent.parent / folders.SUMMARY for path in found]
    stats = {path: path.stat() for path in [*found, sweep / RECORD] if path.is_file()}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in stats.items()}


def _refusals(sweep: Path) -> list[Path]:
    return list(litter.without((sweep / REFUSED).glob("*.json")))


def once(cfg: DictConfig, job: Callable[[DictConfig], None]) -> float | None:
    """Runs a job; in a sweep, continues from its folder and raises no error.

    Args:
      cfg: composed by Hydra, with `resume`.
      job: runs or resumes in Hydra's output folder.

    Returns:
      In a sweep the run's figure, for sweepers that optimise it; None if the job failed.

    Raises:
      Exception: whatever the job raises, outside a sweep.
    """
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        return job(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    settings, named = first_start.settings_of(cfg), is_named(folder, cfg)
    try:
        check_inside(folder, _place())
        with claim.claimed(folder):  # nothing is written to a folder that another process holds
            _note(folder).unlink(missing_ok=True)
            first_start.check_same(settings, folder, named=named)
            return _attempt(cfg, job, folder, settings)
    except folders.RunError as error:
        _refuse(folder, "in use" if isinstance(error, claim.InUse) else "refused", str(error))
        records.discard(folder, made=[folder])  # Hydra has made it
        return None


def _attempt(
    cfg: DictConfig, job: Callable[[DictConfig], None], folder: Path, settings: str
) -> float | None:
    """Runs a job in its folder, which is locked; an error is written down."""
    (folder / ERROR).unlink(missing_ok=True)
    if (folder / folders.CONFIG).is_file():
        with open_dict(cfg):
            cfg.resume = True
    made = [folder, *records.missing(folder / records.FOLDER)]
    try:
        check(cfg)
        records.write(folder, cfg)
        if not (folder / folders.CONFIG).is_file():
            first_start.write(folder, settings)
        job(cfg)
    except Exception as error:
        text = explain(error, cfg)
        if text is not None and not (folder / folders.CONFIG).is_file():
            _refuse(folder, "refused", text)
            claim.unclaim(folder)
            records.discard(folder, made=made)
            return None
        said = text or f"{type(error).__name__}: {error}"
        write_text(folder / ERROR, f"{said}\n\n{traceback.format_exc()}")
        sys.stdout.flush()
        print(f"error: {said}\nthe traceback is in {folder / ERROR}", file=sys.stderr, flush=True)
        return None
    return judge(folder)[1]


def _note(folder: Path) -> Path:
    """Where it is written why a job did not begin: beside the jobs, for its folder is not ours."""
    sweep = _place()
    parts = folder.relative_to(sweep).parts if folder.is_relative_to(sweep) else (folder.name,)
    return sweep / REFUSED / f"{'+'.join(parts)}.json"


def _place() -> Path:
    """The sweep's folder."""
    return Path(os.path.abspath(HydraConfig.get().sweep.dir))


def began() -> float | None:
    """When this sweep was started, by the clock of its disk.

    Returns:
      Seconds; None outside of a sweep, or if Hydra has left no record.
    """
    if HydraConfig.get().mode != RunMode.MULTIRUN or not (_place() / RECORD).is_file():
        return None
    return (_place() / RECORD).stat().st_mtime


def _refuse(folder: Path, status: str, error: str) -> None:
    """Notes and says why a job did not begin."""
    known, note = HydraConfig.get(), _note(folder)
    note.parent.mkdir(exist_ok=True)
    about = {"number": known.job.num, "overrides": list(known.overrides.task), "status": status}
    folders.write_json(note, {**about, "folder": str(folder), "error": error})
    sys.stdout.flush()
    print(f"error: {error}", file=sys.stderr, flush=True)


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


def jobs_since(sweep: Path, before: Mapping[Path, Stamp]) -> list[Job]:
    """Reads the jobs of a sweep that were launched since it began.

    Args:
      sweep: the sweep's folder.
      before: the versions of its records at that time; no clock is asked, for that of a disk may
        be another one.

    Returns:
      The jobs, in order.
    """
    new = {path for path, stamp in _stamps(sweep).items() if before.get(path) != stamp}
    notes = [_read_note(path) for path in _refusals(sweep) if path in new]
    # A job that another process held may have ended meanwhile: its folder tells.
    known = {job.folder / OVERRIDES: job for job in notes}
    ended = {path for path, job in known.items() if _has_ended(job)}
    held = {path for path, job in known.items() if job.status == "in use"} - ended
    launched = [path for path in sweep.rglob(str(OVERRIDES)) if path in ended | new]
    jobs = [_read_job(path, new) for path in launched if path not in held]
    jobs += [job for path, job in known.items() if path not in ended]
    return sorted(jobs, key=lambda job: job.number)


def _read_note(path: Path) -> Job:
    known = folders.read_json(path)
    told = (known["number"], Path(known["folder"]), known["overrides"])
    return Job(*told, known["status"], None, None, known["error"].replace("\n", " "))


def _has_ended(job: Job) -> bool:
    free = job.status == "in use" and not claim.in_use(job.folder)
    return free and (job.folder / OVERRIDES).is_file()


def _read_job(record: Path, new: set[Path]) -> Job:
    folder = record.parent.parent
    status, error = folders.status(folder) or "no ending", None
    failure, summary = folder / ERROR, folder / folders.SUMMARY
    if failure.is_file() and not (status == "finished" and _is_newer(summary, failure)):
        status, error = "failed", read_text(failure).split("\n")[0]
    elif status == "finished" and summary not in new:
        status = "finished before"
    overrides = []
    with contextlib.suppress(folders.RunError):  # a damaged record costs the row its second column
        overrides = [str(one) for one in folders.read_yaml(record)]
    column, figure = judge(folder)
    # The file is long, and OmegaConf is slow to read it.
    number = re.search(r"^    num: (\d+)$", read_text(record.with_name("hydra.yaml")), re.M)
    return Job(int(number[1]) if number else 0, folder, overrides, status, figure, column, error)


def _is_newer(path: Path, other: Path) -> bool:
    return path.stat().st_mtime_ns > other.stat().st_mtime_ns


def report(sweep: Path, jobs: Sequence[Job]) -> bool:
    """Prints the outcomes of a sweep's jobs, and the next commands.

    Args:
      sweep: the sweep's folder.
      jobs: of the sweep.

    Returns:
      Whether all of them are finished.
    """
    alike = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    columns = {job.column for job in jobs if job.column}
    rows = []
    for job in jobs:
        own = " ".join(line for line in job.overrides if line not in alike)
        figure = "-" if job.figure is None else f"{job.figure:.4g}"
        rows.append((str(job.number), own, job.status, figure, job.folder.name))
    shown = _from_here(sweep)
    names = ("job", "overrides", "status", "/".join(sorted(columns)) or "figure", "folder")
    show(f"\n{shown}: {len(jobs)} jobs", names, rows)
    for job in jobs:
        if job.error:
            print(f"job {job.number}: {job.error}")
    done = [job for job in jobs if job.status.startswith("finished")]
    if done:
        print("next:")
        print(f"  python -m experiments.compare runs={shown}")
        print(f"  python -m experiments.plot runs={shown}")
    for ending, advice in ADVICE.items():
        if found := sum(job.status == ending for job in jobs):
            print(f"{found} of {len(jobs)} jobs are {ending}: {advice}")
    if left := sum(job not in done and job.status not in ADVICE for job in jobs):
        print(f"{left} of {len(jobs)} jobs are not finished: repeat the command")
        print("to run them from their last checkpoints; finished jobs are not run again")
    return len(done) == len(jobs)


def _from_here(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def check_plugins(arguments: Sequence[str]) -> None:
    """Refuses a launcher or sweeper whose plugin is not installed.

    Args:
      arguments: of the command line, without the program.

    Raises:
      SystemExit: names the package and the extra.
    """
    there = importlib.util.find_spec("hydra_plugins") is not None
    for argument in arguments:
        plugin = PLUGINS.get(argument)
        if plugin and not (there and importlib.util.find_spec(f"hydra_plugins.{plugin}")):
            package = plugin.replace("_", "-")
            raise SystemExit(f"error: {argument} needs {package}: pip install -e '.[sweeps]'")


def _sweeps() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _discard(sweep: Path, before: Mapping[Path, Stamp]) -> None:
    """Removes the folder of a sweep that was refused before its first job."""
    with contextlib.suppress(OSError):
        record = sweep / RECORD
        if list(sweep.iterdir()) == [record] and record not in before:
            record.unlink()
    records.discard(sweep)


def start(
    main: Callable[[], None], prepare: Callable[[list[str]], list[str]] = lambda given: given
) -> None:
    """Runs a program, or a sweep of it if the command line asks for one, and reports on the sweep.

    Args:
      main: decorated by Hydra.
      prepare: changes the arguments before Hydra sees them.

    Raises:
      SystemExit: not 0 if a job is not finished.
    """
    HydraConfig.instance().cfg = None  # of an earlier program in this process

    def prepared() -> None:
        check_repeated(sys.argv[1:])
        sys.argv[1:] = name_sweep(prepare(sys.argv[1:]))

    Announce.before, code = {}, None
    try:
        launch(prepared)
        check_plugins(sys.argv[1:])
        launch(main)
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt as interrupt:
        if not interrupt.args:
            print("interrupted", file=sys.stderr)
        code = 130
    except Exception:
        # A launcher raises it if a process was killed, once all others have ended.
        if not _sweeps():
            raise
        traceback.print_exc()
        code = 1
    if _sweeps():
        sweep = _place()
        jobs = jobs_since(sweep, Announce.before)
        if not (jobs and report(sweep, jobs)):
            code = code or (1 if jobs else "error: the sweep has begun no job: give values")
        if not jobs:
            _discard(sweep, Announce.before)
    if code:
        raise SystemExit(code)
