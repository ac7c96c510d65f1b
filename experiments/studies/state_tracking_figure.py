"""Draws which mixer solves which problem at which length.

    python -m experiments.studies.state_tracking_figure runs=FOLDER

It reads only the tables of runs. Each problem has a panel and each mixer a line: accuracy at the
last evaluation against the length of the test, the mean over seeds and their range.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import hydra
import numpy as np
from omegaconf import DictConfig, OmegaConf

from experiments.run.drawing import Figure
from experiments.run.folder_arguments import TRUST, quote_folders
from experiments.run.folders import RunError
from experiments.shell.commandline import command, guarded
from experiments.shell.foreign import content_of
from experiments.studies import figure_files
from experiments.studies.curves import styles
from experiments.sweep.run_sets import Run, differing_keys, group, need, read_all

ACCURACY, LAST = "accuracy_", "last_"
COLUMNS = ("problem", "method", "seed", "length", "accuracy", "last", "steps", "parameters")


def final(run: Run) -> list[dict[str, float]]:
    """Reads the last evaluation of a run, a row for each length of the test.

    Args:
      run: of a state tracking task.

    Returns:
      Rows with `length`, `accuracy` and `last`, by increasing length.
    """
    rows = []
    for name in run.columns:
        if name.startswith(ACCURACY):
            length = name.removeprefix(ACCURACY)
            at = [
                [value for value in run.columns[column] if value is not None]
                for column in (name, LAST + length)
            ]
            if all(at):
                rows.append({"length": int(length), "accuracy": at[0][-1], "last": at[1][-1]})
    return sorted(rows, key=lambda row: row["length"])


def methods(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Groups the runs of each method over problems and seeds.

    Args:
      runs: of state tracking tasks.

    Returns:
      Label -> runs.

    Raises:
      RunError: none of them has accuracies.
    """
    by_problem: dict[str, list[Run]] = {}
    for run in runs:
        if final(run):
            by_problem.setdefault(problem_of(run), []).append(run)
    if not by_problem:
        raise RunError(
            f"none of the {len(runs)} runs has a column {ACCURACY}N: give runs of a state tracking "
            "task, `python -m experiments.train experiment=state_tracking sweep=state_tracking`"
        )
    # Runs of one problem differ in the method; across problems the task differs too.
    keys = differing_keys(max(by_problem.values(), key=len))
    return group([run for members in by_problem.values() for run in members], keys)


def problem_of(run: Run) -> str:
    """Reads the name of a run's problem."""
    return str(run.summary.get("problem", "?"))


def draw(by_method: Mapping[str, Sequence[Run]]) -> Figure:
    """Draws accuracy against length, a panel for each problem.

    Args:
      by_method: from `methods`.

    Returns:
      The figure.
    """
    problems = list(dict.fromkeys(problem_of(r) for runs in by_method.values() for r in runs))
    width = max(6.0, 3.6 * len(problems))
    columns = int(width // 4.5)  # of the legend, whose labels are long
    figure = Figure(figsize=(width, 4.6 + 0.18 * len(by_method) / columns), layout="constrained")
    panels = figure.subplots(1, len(problems), squeeze=False, sharey=True)[0]
    lines = {}
    for problem, axes in zip(problems, panels, strict=True):
        for (label, runs), (colour, style) in zip(
            by_method.items(), styles(list(by_method)), strict=True
        ):
            found: dict[int, list[float]] = {}
            for row in (row for run in runs if problem_of(run) == problem for row in final(run)):
                found.setdefault(int(row["length"]), []).append(row["accuracy"])
            lengths = sorted(found)
            mean = [np.mean(found[n]) for n in lengths]
            (line,) = axes.plot(lengths, mean, style, color=colour, marker="o", ms=4)
            low, high = ([f(found[n]) for n in lengths] for f in (min, max))
            axes.fill_between(lengths, low, high, color=colour, alpha=0.15, lw=0)
            if lengths:
                lines[label] = line
                axes.set_xscale("log", base=2)
                axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.set_title(problem)
        axes.set_xlabel("length of the test (tokens)")
        axes.set_ylim(0, 1.03)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy (share of answers)")
    figure.suptitle("mean over seeds, and their range")
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=columns, fontsize=8
    )
    return figure


def table(by_method: Mapping[str, Sequence[Run]]) -> list[list[Any]]:
    """The numbers of the figure.

    Args:
      by_method: from `methods`.

    Returns:
      Rows with `COLUMNS`.
    """
    rows = []
    for label, runs in by_method.items():
        for run in runs:
            need(run, config=("seed",))
            known = {
                "problem": problem_of(run),
                "method": label,
                "seed": run.config["seed"],
                "steps": run.summary.get("steps", ""),
                "parameters": run.summary.get("parameters", ""),
            }
            rows += [[{**known, **row}[name] for name in COLUMNS] for row in final(run)]
    return rows


@command
@hydra.main(version_base="1.3", config_path="../conf", config_name="state_tracking_figure")
def main(cfg: DictConfig) -> None:
    """Hydra's entry."""

    def program() -> None:
        values = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(values, dict)
        runs, left_out = read_all(values["runs"])
        for line in left_out:
            print(f"left out: {line}")
        target = figure_files.check_output(values["output"], COLUMNS)
        with content_of(*(run.folder for run in runs)):
            by_method = methods(runs)
            figure_files.write(draw(by_method), target, COLUMNS, table(by_method))
        print(f"{target} and {target.with_suffix('.csv').name}, from {len(runs)} runs")

    guarded(program, cfg)


if __name__ == "__main__":
    sys.argv[1:] = quote_folders(sys.argv[1:], keys=("runs", TRUST))
    main()
