"""Sweeps that survive their jobs: failures are recorded, finished jobs are not run again.

A job's folder depends only on its config (see `sweep_folders`), and a job that finds a run there
continues it. Repeating the command therefore does the remaining work.
"""

import contextlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from experiments.run import claim, folders, given_folders, opening, records, trust
from experiments.run.checks import check_text
from experiments.run.plain_files import write_text
from experiments.shell.commandline import check, end_if_unread, flush, launch
from experiments.shell.explanations import explain
from experiments.shell.overrides import check_repeated
from experiments.sweep import first_start, outcomes
from experiments.sweep.sweep_folders import (
    check_inside,
    check_one_sweep,
    check_places,
    is_named,
    places,
    sweep_first,
)

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


class Announce(Callback):
    """Tells `start` after a sweep which one it was: `hydra.callbacks.sweep` in the config."""

    recorded = False  # whether the sweep's folder had Hydra's record before

    def __init__(self, notes: str | None) -> None:
        del notes  # the jobs read it from the config, see `outcomes`

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra itself sets this only inside jobs; it writes into the sweep's folder after this."""
        del kwargs
        HydraConfig.instance().set_config(config)
        with given_folders.ended(HydraConfig.instance()), explained(config):
            check_one_sweep(config)
            check_text("hydra.sweep.dir", config.hydra.sweep.dir)
            check_places(config)
            outcomes.begin(config, *places(config))
            HydraConfig.instance().set_config(config)
            trust.check_links(outcomes.place(), written=True)
            records.Notes.made = records.missing(outcomes.place())  # where it is now to be
            Announce.recorded = (outcomes.place() / RECORD).exists()


@contextlib.contextmanager
def explained(config: DictConfig) -> Iterator[None]:
    """Turns errors that a user can cause, such as a reference to nothing, into one of ours."""
    try:
        yield
    except Exception as error:
        text = explain(error, config)
        if text is None or isinstance(error, folders.RunError):
            raise
        raise folders.RunError(text) from error


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
    outcomes.note(folder, None, new=False)
    try:
        check_inside(folder, outcomes.place())
        with claim.claimed(folder):  # nothing is written to a folder that another process holds
            first_start.check_same(settings, folder, named=named)
            return _attempt(cfg, job, folder, settings)
    except (folders.RunError, OSError) as error:  # such as a file that may not be read
        said = explain(error, cfg) or str(error)
        _fail(folder, "in use" if isinstance(error, claim.InUse) else "refused", said)
        records.discard(folder, made=[folder])  # Hydra has made it
        return None


def _attempt(
    cfg: DictConfig, job: Callable[[DictConfig], None], folder: Path, settings: str
) -> float | None:
    """Runs a job in its folder, which is locked; an error is written down."""
    before, new = folders.status(folder), not (folder / folders.CONFIG).is_file()
    if not new:
        with open_dict(cfg):
            cfg.resume = True
    record = folder / records.FOLDER / records.JOB
    ours = record.exists()
    made = [folder, *records.missing(record.parent)]
    outcomes.note(folder, None, new=new)
    try:
        if (ours or not new) and (folder / opening.ERROR).is_file():
            (folder / opening.ERROR).unlink()
        check(cfg)
        if new:
            opening.check_new(folder, cfg)
            first_start.write(folder, settings)
        job(cfg)
    except Exception as error:
        end_if_unread(error)
        text = explain(error, cfg)
        if text is not None and not (folder / folders.CONFIG).is_file():
            _fail(folder, "refused", text)
            claim.unclaim(folder)
            if not ours:
                with contextlib.suppress(OSError):  # it was not written
                    record.unlink()
            records.discard(folder, made=made)
            return None
        said = text or f"{type(error).__name__}: {error}"
        _fail(folder, "failed", said, new=new)
        place = folder / opening.ERROR
        try:
            write_text(place, f"{said}\n\n{traceback.format_exc()}")
            print(f"the traceback is in {place}", file=sys.stderr, flush=True)
        except OSError:
            traceback.print_exc()
        return None
    ending = "finished before" if before == "finished" else folders.status(folder)
    outcomes.note(folder, ending, new=new)
    return outcomes.judge(folder)[1]


def _fail(folder: Path, status: str, error: str, *, new: bool = False) -> None:
    """Notes and says why a job did not begin, or has failed."""
    outcomes.note(folder, status, new=new, error=error)
    flush()
    print(f"error: {error}", file=sys.stderr, flush=True)


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


def _discard(sweep: Path) -> None:
    """Removes the folder of a sweep that was refused before its first job."""
    with contextlib.suppress(OSError):
        if not Announce.recorded and [path.name for path in sweep.iterdir()] == [RECORD]:
            (sweep / RECORD).unlink()
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
        sys.argv[1:] = sweep_first(prepare(sys.argv[1:]))

    code = None
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
        if not outcomes.have_begun():
            raise
        traceback.print_exc()
        code = 1
    if outcomes.have_begun():
        done = launch(_tell)
        if done is None:
            code = code or "error: the sweep has begun no job: give values"
        elif isinstance(code, str):  # such as a folder that Hydra cannot make for a job
            print("the sweep has ended early: further jobs were not begun")
        code = code or int(not done)
    if code:
        raise SystemExit(code)


def _tell() -> bool | None:
    """Prints what has become of a sweep; returns whether all is done, None if nothing was begun."""
    sweep, jobs = outcomes.place(), outcomes.jobs()
    if not jobs:
        _discard(sweep)
        return None
    outcomes.forget()
    return outcomes.report(jobs)
