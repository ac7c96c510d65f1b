"""Runs every experiment and checks its figures: `python -m experiments.reproduce full NAME`.

An experiment's file says, in comments before its first key, what to run and what to expect:

    # python -m experiments.train experiment=lm
    # 4 minutes on two CPU cores: validation_bits_per_byte 1.654 +- 0.02
    # small, 0.5 minutes: steps=40 window=64:
    #   validation_bits_per_byte <= 4.2

The last lines add overrides to the command, for everyday checks. A line may continue, indented, on
the next. Figures are those of `summary.json`, separated by commas.

An experiment that starts from another run names it in a separate line:

    # first: python -m experiments.train experiment=lm data=stdlib_base hydra.run.dir=runs/base

That run is done first, in its own folder, which the command then gets as `from=`. Overrides of the
small trial that begin with `first.` apply to it.
"""

import argparse
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

from experiments.run import unicode
from experiments.run.folders import REPOSITORY, RunError, read_summary
from experiments.run.tables import show
from experiments.shell.explanations import explain
from experiments.shell.overrides import replaced

EXPERIMENTS = REPOSITORY / "experiments" / "conf" / "experiment"
COMMAND = re.compile(r"# python -m (experiments\.\w+)(.*)")
BEFORE = re.compile(r"# first: python -m (experiments\.\w+)(.*)")
FULL = re.compile(r"# ([\d.]+) minutes? on ([^:]+): (.+)")
SMALL = re.compile(r"# small, ([\d.]+) minutes?: (.+): ([^:]+)")
FIRST = "first."
FIGURE = re.compile(r"(\w+) (?:(<=|>=) (\S+)|(\S+) \+- (\S+))")


class Expected(NamedTuple):
    """The allowed range of a figure.

    Attributes:
      figure: a name in `summary.json`.
      low: the smallest value.
      high: the largest value.
      text: as written.
    """

    figure: str
    low: float
    high: float
    text: str


class Trial(NamedTuple):
    """A command and its expected figures.

    Attributes:
      module: to run with `python -m`.
      overrides: for Hydra.
      minutes: its expected time.
      expected: figures.
      first: the trial that it starts from, to be run first.
    """

    module: str
    overrides: list[str]
    minutes: float
    expected: list[Expected]
    first: Optional["Trial"] = None


def read_figures(text: str) -> list[Expected]:
    """Reads `NAME VALUE +- TOLERANCE`, `NAME >= VALUE` or `NAME <= VALUE`, comma-separated.

    Args:
      text: one or more of them.

    Returns:
      The figures.

    Raises:
      ValueError: the text has another form; quotes it.
    """
    figures = []
    for part in text.split(","):
        match = FIGURE.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"{part.strip()!r}: write NAME VALUE +- TOLERANCE, or NAME >= VALUE")
        name, sign, bound, value, tolerance = match.groups()
        low = float(bound) if sign == ">=" else -math.inf
        high = float(bound) if sign == "<=" else math.inf
        if sign is None:
            low, high = float(value) - float(tolerance), float(value) + float(tolerance)
        figures.append(Expected(name, low, high, part.strip()))
    return figures


def read_head(path: Path) -> dict[str, Trial]:
    """Reads the comments with which an experiment's file begins.

    Args:
      path: the file.

    Returns:
      The trials "full" and "small".

    Raises:
      RunError: a line is missing or cannot be read; shows an example.
    """
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if line.startswith("#  ") and lines:
            lines[-1] += " " + line[1:].strip()
        else:
            lines.append(line.strip())

    def find(pattern: re.Pattern[str]) -> tuple[str, ...] | None:
        return next((match.groups() for line in lines if (match := pattern.fullmatch(line))), None)

    def need(pattern: re.Pattern[str], example: str) -> tuple[str, ...]:
        if (found := find(pattern)) is None:
            raise RunError(f"{path}: its first comments need a line such as\n  {example}")
        return found

    module, overrides = need(COMMAND, "# python -m experiments.train experiment=NAME")
    minutes, _, figures = need(FULL, "# 4 minutes on two CPU cores: FIGURE 1.654 +- 0.02")
    less, changed, rough = need(SMALL, "# small, 0.5 minutes: steps=40: FIGURE <= 4.2")
    before = find(BEFORE)

    def trial(more: list[str], minutes: str, figures: str) -> Trial:
        own = [one for one in more if not one.startswith(FIRST)]
        theirs = [one.removeprefix(FIRST) for one in more if one.startswith(FIRST)]
        found = Trial(
            module, replaced(overrides.split(), own), float(minutes), read_figures(figures)
        )
        if before is None:
            if theirs:
                raise ValueError(
                    f"{FIRST}{theirs[0]} is for a first run, but no line "
                    "`# first: python -m ...` gives one"
                )
            return found
        # Its folder and `from=` are for users who type the commands.
        given = [one for one in before[1].split() if not one.startswith("hydra.run.dir=")]
        return found._replace(first=Trial(before[0], replaced(given, theirs), found.minutes, []))

    try:
        return {
            "full": trial([], minutes, figures),
            "small": trial(changed.split(), less, rough),
        }
    except ValueError as error:
        raise RunError(f"{path}: {error}") from error


def judge(expected: Sequence[Expected], summary: Mapping[str, object]) -> list[str]:
    """Compares figures with the expected ones.

    Args:
      expected: figures.
      summary: of the run.

    Returns:
      A line for each figure outside its range.
    """
    wrong = []
    for want in expected:
        value = summary.get(want.figure)
        if not isinstance(value, int | float):
            wrong.append(f"summary.json has no number {want.figure}")
        elif not want.low <= value <= want.high:
            wrong.append(f"{want.figure} is {value:.4g}")
    return wrong


def run_trial(trial: Trial, folder: Path) -> tuple[dict[str, object], str | None]:
    """Runs a trial in its own process, after the trial that it starts from.

    The output goes to a file beside the folder.

    Args:
      trial: what to run.
      folder: of the run; made here.

    Returns:
      The summary, and what went wrong with the process, if anything.
    """
    if trial.first is not None:
        base = folder.with_name(f"{folder.name}-base")
        _, broken = run_trial(trial.first, base)
        if broken:
            return {}, f"the run that it starts from: {broken}"
        trial = trial._replace(overrides=[*trial.overrides, f"from={base}"])
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", trial.module, *trial.overrides, f"hydra.run.dir={folder}"]
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT)
    known = read_summary(folder)
    return known, f"exit code {done.returncode}, see {log}" if done.returncode else None


def reproduce(
    files: Sequence[Path],
    *,
    size: str,
    folder: Path,
    run: Callable[[Trial, Path], tuple[Mapping[str, object], str | None]] = run_trial,
) -> bool:
    """Runs experiments one after another and prints a table.

    Args:
      files: of the experiments.
      size: "small" or "full".
      folder: for the runs.
      run: runs one trial.

    Returns:
      Whether every figure was as expected.

    Raises:
      RunError: a file does not say what to expect; raised before anything is run.
    """
    trials = {path.stem: read_head(path)[size] for path in files}
    rows = []
    for name, trial in trials.items():
        print(f"{name}: about {trial.minutes:g} minutes", flush=True)
        began = time.perf_counter()
        summary, broken = run(trial, folder / name)
        wrong = [broken] if broken else judge(trial.expected, summary)
        found = [summary.get(want.figure) for want in trial.expected]
        rows.append(
            [
                name,
                f"{(time.perf_counter() - began) / 60:.2f}",
                ", ".join(f"{x:.4g}" if isinstance(x, int | float) else "-" for x in found),
                ", ".join(want.text for want in trial.expected),
                "; ".join(wrong) or "as expected",
            ]
        )
    title = f"The runs and what they printed are in {folder}"
    show(title, ("experiment", "minutes", "found", "expected", "verdict"), rows)
    return all(row[-1] == "as expected" for row in rows)


def main() -> None:
    """The command line."""
    unicode.show_all()
    parser = argparse.ArgumentParser(prog="python -m experiments.reproduce", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("words", nargs="*", metavar="full | NAME", help="default: all, small")
    words = parser.parse_args().words
    size = "full" if "full" in words else "small"
    names = [word for word in words if word not in ("full", "small")]
    there = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))
    if unknown := sorted(set(names) - set(there)):
        parser.error(f"no experiment is named {', '.join(unknown)}; choose from {', '.join(there)}")
    files = [EXPERIMENTS / f"{name}.yaml" for name in names or there]
    folder = REPOSITORY / "runs" / "reproduce" / time.strftime("%Y-%m-%d_%H-%M-%S")
    try:
        good = reproduce(files, size=size, folder=folder)
    except (RunError, OSError) as error:
        raise SystemExit(f"error: {explain(error)}") from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
