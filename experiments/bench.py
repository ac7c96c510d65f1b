"""Times recurrences: `python -m experiments.bench suite=recurrence`.

Compares our solvers and other people's implementations with `lax.scan` on the same recurrence, in
one process and in turn. Shows medians and quartiles without compilation, and the floor of memory
traffic. An implementation whose values or gradients are wrong shows no speed-up.
"""

import contextlib
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from experiments.contest import bench_figure, bench_rows
from experiments.contest.contest import Row, contest
from experiments.contest.machine import machine
from experiments.contest.recurrence_problem import PASSES, make_problem
from experiments.contest.rivals import RIVALS
from experiments.run import figures, folders, opening, records, trust
from experiments.run.plain_files import write_text
from experiments.run.progress import clock
from experiments.shell.commandline import command, guarded

# What a folder of times holds, see `opening.WRITTEN`.
WRITTEN = (bench_rows.TABLE, "results.md", "results.png", folders.SUMMARY, folders.ENVIRONMENT)
COLUMNS = (
    "T, B, D",
    "pass",
    "implementation",
    "ms, median (quartiles)",
    "x lax.scan",
    "x floor",
    "compile s",
    "iterations",
    "max error, values / gradients",
    "verdict",
)


def check(suite: dict[str, Any]) -> None:
    """Refuses a suite that cannot run, before anything compiles.

    Args:
      suite: as in conf/suite.

    Raises:
      RunError: says what was given and what was expected.
    """
    for which in suite["passes"]:
        if which not in PASSES:
            raise folders.RunError(f"suite.passes has {which!r}; expected some of {list(PASSES)}")
    for name in suite["rivals"]:
        if name not in RIVALS:
            raise folders.RunError(f"suite.rivals has {name!r}; expected some of {list(RIVALS)}")
    for shape in suite["shapes"]:
        if len(shape) != 3 or min(shape) < 1:
            raise folders.RunError(
                f"suite.shapes has {list(shape)}; expected [T, B, D], each at least 1"
            )


def cells(row: Row) -> list[str]:
    """Formats a row.

    Args:
      row: of a contest.

    Returns:
      One string for each of `COLUMNS`.
    """
    head = [f"{row.time}, {row.batch}, {row.state}", row.which.replace("_", "+"), row.name]
    if row.median_ms is None:
        return [*head, *[""] * 6, row.verdict]
    steps = "" if row.iterations is None else str(row.iterations)
    steps += f" + {row.fallback_steps} steps" if row.fallback_steps else ""
    return [
        *head,
        f"{row.median_ms:.3g} ({row.low_ms:.3g}, {row.high_ms:.3g})",
        "" if row.speed_up is None else f"{row.speed_up:.2f}",
        f"{row.times_floor:.1f}",
        f"{row.compile_s:.2f}",
        steps,
        f"{row.value_error:.0e}"
        + ("" if row.gradient_error is None else f" / {row.gradient_error:.0e}"),
        row.verdict,
    ]


def write_table(folder: Path, rows: Sequence[Row], machine: str) -> None:
    """Writes `results.md`: the table in Markdown, under the machine.

    Args:
      folder: of the run.
      rows: all of them.
      machine: one line.
    """
    lines = [machine, "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    write_text(folder / "results.md", "\n".join(lines) + "\n")


def versions() -> dict[str, str | None]:
    """Reads the versions of the rivals' packages; None for one that is not installed.

    Returns:
      Package -> version.
    """
    found: dict[str, str | None] = {}
    for package in ("flax", "torch", "deer", "pararnn-torch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


@contextlib.contextmanager
def counted(console: Console, total: int) -> Iterator[Callable[[int, str], None]]:
    """Shows the progress of a suite: a bar on a terminal, a line for each contest elsewhere.

    Args:
      console: where to.
      total: contests.

    Yields:
      `(number done, what comes next) -> None`.
    """
    began, first = time.perf_counter(), None

    def left(done: int) -> str:
        nonlocal first
        first = done if first is None else first
        if done == first:
            return ""
        each = (time.perf_counter() - began) / (done - first)
        return f", about {clock(each * (total - done))} left"

    if not console.is_terminal:
        yield lambda done, what: console.print(
            f"{min(done + 1, total)}/{total}  {what}{left(done)}", highlight=False
        )
        return
    columns = (
        TextColumn("{task.completed}/{task.total}"),
        BarColumn(24),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, what: bar.update(
            task, completed=done, description=escape(f"{what}{left(done)}")
        )


def bench(suite: dict[str, Any], folder: Path, *, rounds: int, budget_s: float, seed: int) -> None:
    """Runs the contests of a suite that are missing from its folder; writes each when it is timed.

    Args:
      suite: as in conf/suite, solvers built.
      folder: of the run.
      rounds: number of samples of each implementation.
      budget_s: seconds of timing for each shape and pass.
      seed: of the data and of the order.

    Raises:
      RunError: at the end, if one of our own solvers failed or was wrong.
    """
    console, line = Console(), machine()
    began, table = time.perf_counter(), folder / bench_rows.TABLE
    settings = [(shape, which) for shape in suite["shapes"] for which in suite["passes"]]
    known = bench_rows.keep_whole(table, bench_rows.names_of(suite))
    due = [(s, w) for s, w in settings if (*s, w) not in known]
    if known:
        console.print(f"{len(settings) - len(due)} of {len(settings)} are in {folder} already")
    with counted(console, len(settings)) as say:
        for n, (shape, which) in enumerate(due, len(settings) - len(due)):
            say(n, f"T, B, D = {tuple(shape)}, {which}")
            problem = make_problem(suite["cell"], *shape, scale=suite["scale"], seed=seed)
            rows = contest(
                problem,
                which,
                solvers=suite["solvers"],
                others=suite["rivals"],
                rounds=rounds,
                budget_s=budget_s,
                values_tol=suite["values_tol"],
                gradients_tol=suite["gradients_tol"],
                seed=seed,
            )
            bench_rows.append(table, rows)
    order = {(*shape, which): n for n, (shape, which) in enumerate(settings)}
    rows = sorted(bench_rows.read(table), key=lambda r: order[(r.time, r.batch, r.state, r.which)])
    write_table(folder, rows, line)
    figures.save(bench_figure.draw(table, title=f"{suite['cell']}: {line}"), folder / "results.png")
    _show(console, suite, rows, line)
    console.print(f"{folder}/results.png, .csv and .md", highlight=False, soft_wrap=True)
    bad = [row for row in rows if row.name in suite["solvers"] and row.verdict != "ok"]
    folders.close_run(
        folder,
        {
            "seconds": time.perf_counter() - began,
            "status": "finished",
            "rows": len(rows),
            "ours_not_ok": len(bad),
            "versions": versions(),
        },
    )
    if bad:
        raise folders.RunError(
            f"{len(bad)} of our own rows are not ok: "
            + ", ".join(f"{r.name} at {r.time, r.batch, r.state}: {r.verdict}" for r in bad[:5])
        )


def _show(console: Console, suite: dict[str, Any], rows: Sequence[Row], line: str) -> None:
    table = Table(*COLUMNS, title=f"{suite['cell']}: {line}")
    for row in rows:
        table.add_row(
            *map(escape, cells(row)), end_section=row is rows[-1] or row.name == suite_end(suite)
        )
    # On a terminal rich fits the width; in a file nothing may be cut off.
    (console if console.is_terminal else Console(width=200)).print(table)


def suite_end(suite: dict[str, Any]) -> str:
    """Finds the name in the last row of each shape and pass.

    Args:
      suite: as in conf/suite.

    Returns:
      An implementation's name.
    """
    return list(suite["rivals"] or suite["solvers"])[-1]


def place(cfg: DictConfig, folder: Path) -> Path:
    """Selects the folder to work in: one with rows of the same work, or a new one.

    Args:
      cfg: composed, with `fresh`.
      folder: Hydra's.

    Returns:
      A folder that holds an opened run.

    Raises:
      RunError: the folder holds other work.
    """
    trust.check_links(folder, written=True)
    found = None if cfg.fresh else bench_rows.find(folder, cfg)
    if found is None:
        opening.open_run(folder, cfg, writes=WRITTEN)
        bench_rows.append(folder / bench_rows.TABLE, [])  # by which the same command finds it
        return folder
    if found != folder:
        records.discard(folder)
    print(f"the same suite on this machine: {found}; fresh=true starts a new folder", flush=True)
    return found


@command
@hydra.main(version_base="1.3", config_path="conf", config_name="bench")
def main(cfg: DictConfig) -> None:
    def program():
        suite = instantiate(cfg.suite, _convert_="all")
        check(suite)
        try:
            make_problem(suite["cell"], 1, 1, 1, scale=suite["scale"], seed=cfg.seed)
        except ValueError as error:
            raise folders.RunError(str(error)) from error
        folder = place(cfg, Path(HydraConfig.get().runtime.output_dir))
        try:
            bench(suite, folder, rounds=cfg.rounds, budget_s=cfg.budget_s, seed=cfg.seed)
        except KeyboardInterrupt:
            table = folder / bench_rows.TABLE
            print(f"\nwhat was timed is in {table}; the same command continues")
            raise

    guarded(program, cfg)


if __name__ == "__main__":
    main()
