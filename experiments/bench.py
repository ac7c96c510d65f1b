"""Times recurrences: `python -m experiments.bench suite=recurrence`.

Our solvers and other people's implementations against `lax.scan` on the same recurrence: in one
process, in turn, medians and quartiles, compilation apart, beside the floor of memory traffic; an
implementation whose values or gradients are wrong shows no speed-up.
"""

import csv
import dataclasses
import importlib.metadata
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import jax
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments import runs
from experiments.commandline import command, guarded
from experiments.contest import Row, contest
from experiments.recurrence_problem import PASSES, make_problem
from experiments.rivals import RIVALS

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
            raise runs.RunError(f"suite.passes has {which!r}; expected some of {list(PASSES)}")
    for name in suite["rivals"]:
        if name not in RIVALS:
            raise runs.RunError(f"suite.rivals has {name!r}; expected some of {list(RIVALS)}")
    for shape in suite["shapes"]:
        if len(shape) != 3 or min(shape) < 1:
            raise runs.RunError(
                f"suite.shapes has {list(shape)}; expected [T, B, D], each at least 1"
            )


def cells(row: Row) -> list[str]:
    """A row as text.

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


def write(folder: Path, rows: Sequence[Row], machine: str) -> None:
    """Writes `results.csv` (every number) and `results.md` (the table, the machine named).

    Args:
      folder: of the run.
      rows: all of them.
      machine: one line.
    """
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)
    lines = [machine, "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    (folder / "results.md").write_text("\n".join(lines) + "\n")


def machine() -> str:
    """The machine in one line, as it stands above every table.

    Returns:
      Device, cores, versions, commit.
    """
    known = runs.environment()
    dirty = " with uncommitted changes" if known["git_dirty"] else ""
    commit = (known["git_commit"] or "unknown")[:10] + dirty
    return (
        f"{_processor()} ({known['device']}, {known['cpu_count']} cores), "
        f"Python {known['python']}, JAX {known['packages']['jax']}, float32, commit {commit}; "
        f"{time.strftime('%Y-%m-%d')}."
    )


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return jax.devices()[0].platform
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else jax.devices()[0].platform


def versions() -> dict[str, str | None]:
    """Versions of the rivals' packages; None for one that is not installed.

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


def bench(suite: dict[str, Any], folder: Path, *, rounds: int, budget_s: float, seed: int) -> None:
    """Runs a suite; what is finished is on disk after every shape.

    Args:
      suite: as in conf/suite, solvers built.
      folder: of the run.
      rounds: samples of each implementation.
      budget_s: seconds of timing for each shape and pass.
      seed: of the data and of the order.

    Raises:
      RunError: at the end, if one of our own solvers failed or was wrong.
    """
    console, line = Console(), machine()
    began, rows = time.perf_counter(), []
    settings = [(shape, which) for shape in suite["shapes"] for which in suite["passes"]]
    for n, (shape, which) in enumerate(settings, 1):
        console.print(f"{n}/{len(settings)}  T, B, D = {tuple(shape)}, {which}", highlight=False)
        problem = make_problem(suite["cell"], *shape, scale=suite["scale"], seed=seed)
        rows += contest(
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
        write(folder, rows, line)
    table = Table(*COLUMNS, title=f"{suite['cell']}: {line}")
    for row in rows:
        table.add_row(
            *map(escape, cells(row)), end_section=row is rows[-1] or row.name == suite_end(suite)
        )
    # On a terminal rich fits its width; in a file nothing may be cut off.
    (console if console.is_terminal else Console(width=200)).print(table)
    console.print(f"{folder}/results.md and results.csv", highlight=False)
    bad = [row for row in rows if row.name in suite["solvers"] and row.verdict != "ok"]
    runs.close_run(
        folder,
        {
            "seconds": time.perf_counter() - began,
            "rows": len(rows),
            "ours_not_ok": len(bad),
            "versions": versions(),
        },
    )
    if bad:
        raise runs.RunError(
            f"{len(bad)} of our own rows are not ok: "
            + ", ".join(f"{r.name} at {r.time, r.batch, r.state}: {r.verdict}" for r in bad[:5])
        )


def suite_end(suite: dict[str, Any]) -> str:
    """The name in the last row of each shape and pass.

    Args:
      suite: as in conf/suite.

    Returns:
      An implementation's name.
    """
    return list(suite["rivals"] or suite["solvers"])[-1]


@command
@hydra.main(version_base="1.3", config_path="conf", config_name="bench")
def main(cfg: DictConfig) -> None:
    def program():
        suite = instantiate(cfg.suite, _convert_="all")
        check(suite)
        folder = Path(HydraConfig.get().runtime.output_dir)
        runs.open_run(folder, cfg)
        bench(suite, folder, rounds=cfg.rounds, budget_s=cfg.budget_s, seed=cfg.seed)

    guarded(program, cfg)


if __name__ == "__main__":
    main()
