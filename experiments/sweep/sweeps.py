"""Sweeps that survive their jobs: failures are recorded, finished jobs are not run again.

A job's folder depends only on its config (see `sweep_folders`), and a job that finds a run there
continues it. Repeating the command therefore does the remaining work.
"""

import contextlib
import importlib.util
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

from experiments.run import folders, given_folders, litter, records, trust
from experiments.run.checks import check_text
from experiments.run.plain_files import read_text, write_text
from experiments.run.tables import show
from experiments.shell.commandline import check, launch
from experiments.shell.explanations import explain
from experiments.sweep.sweep_folders import name_sweep

ERROR = "error.txt"
REFUSED = "refused"  # holds a file for each refused job, which has no folder
OVERRIDES = Path(".hydra") / "overrides.yaml"
RECORD = "multirun.yaml"  # Hydra's, of the sweep
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
      status: "finished", "finished before", "interrupted", "failed", "refused" before it began, or
        "no ending" if it was killed or is still running.
      figure: by which the run is judged, after its last evaluation; None without one.
      column: the name of that figure.
      error: one line, for a job that failed or was refused.
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
            trust.check_links(Path(config.hydra.sweep.dir), written=True)
            with contextlib.suppress(OSError):  # Hydra reports it
                Announce.before = _stamps(Path(config.hydra.sweep.dir).absolute())


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
    known = HydraConfig.get()
    folder = Path(known.runtime.output_dir)
    (folder / ERROR).unlink(missing_ok=True)
    if (folder / folders.CONFIG).is_file():
        with open_dict(cfg):
            cfg.resume = True
    refused = Path(known.sweep.dir) / REFUSED / f"{folder.name}.json"
    refused.unlink(missing_ok=True)
    safe = False
    try:
        trust.check_links(folder, written=True)
        safe = True
        records.write(folder, cfg)
        check(cfg)
        job(cfg)
    except Exception as error:
        text = explain(error, cfg)
        said = text or f"{type(error).__name__}: {error}"
        sys.stdout.flush()
        if text is not None and not (safe and (folder / folders.CONFIG).is_file()):
            refused.parent.mkdir(exist_ok=True)
            job_of = {"number": known.job.num, "overrides": list(known.overrides.task)}
            folders.write_json(refused, {**job_of, "folder": str(folder), "error": text})
            records.discard(folder, made=[folder])
            print(f"error: {said}", file=sys.stderr, flush=True)
            return None
        write_text(folder / ERROR, f"{said}\n\n{traceback.format_exc()}")
        print(f"error: {said}\nthe traceback is in {folder / ERROR}", file=sys.stderr, flush=True)
        return None
    return judge(folder)[1]


def judge(folder: Path) -> tuple[str | None, float | None]:
    """Reads the figure that a run is judged by.

    Args:
      folder: of a run.

    Returns:
      The figure's name and its last value; None if the run left none.
    """
    summary = folders.read_summary(folder)
    column = (summary.get("judged_by") or [None])[0]
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
    launched = [path for path in sweep.rglob(str(OVERRIDES)) if path in new]
    jobs = [_read_job(path, new) for path in launched]
    jobs += [_read_refused(path) for path in _refusals(sweep) if path in new]
    return sorted(jobs, key=lambda job: job.number)


def _read_refused(path: Path) -> Job:
    known = folders.read_json(path)
    told = (known["number"], Path(known["folder"]), known["overrides"])
    return Job(*told, "refused", None, None, known["error"].replace("\n", " "))


def _read_job(record: Path, new: set[Path]) -> Job:
    folder = record.parent.parent
    status, error = folders.status(folder) or "no ending", None
    if (folder / ERROR).is_file():
        status, error = "failed", read_text(folder / ERROR).split("\n")[0]
    elif status == "finished" and folder / folders.SUMMARY not in new:
        status = "finished before"
    overrides = []
    with contextlib.suppress(folders.RunError):  # a damaged record costs the row its second column
        overrides = [str(one) for one in folders.read_yaml(record)]
    column, figure = judge(folder)
    # The file is long, and OmegaConf is slow to read it.
    number = re.search(r"^    num: (\d+)$", read_text(record.with_name("hydra.yaml")), re.M)
    return Job(int(number[1]) if number else 0, folder, overrides, status, figure, column, error)


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
    if len(done) < len(jobs):
        print(f"{len(jobs) - len(done)} of {len(jobs)} jobs are not finished: repeat the command")
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
        sweep = Path(HydraConfig.get().sweep.dir).absolute()
        jobs = jobs_since(sweep, Announce.before)
        if not (jobs and report(sweep, jobs)):
            code = code or (1 if jobs else "error: the sweep has begun no job: give values")
        if not jobs:
            _discard(sweep, Announce.before)
    if code:
        raise SystemExit(code)
