"""Compares runs in a figure: `python -m experiments.plot runs=multirun/lm`.

It reads only `metrics.csv` and `config.yaml`. Runs that differ only in seeds are one curve: their
mean, and a band from the lowest to the highest of them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from experiments.run.folder_arguments import TRUST, quote_folders
from experiments.run.plain_files import printable, safe_name
from experiments.shell.commandline import command, guarded
from experiments.shell.foreign import content_of
from experiments.studies import curves, figure_files
from experiments.sweep.run_sets import Run, check_keys, differing_keys, group, read_all


def plot(
    runs: Sequence[Run],
    *,
    x: str,
    y: str | None,
    group_by: str | Sequence[str],
    output: str | None,
    title: str | None,
    log_x: bool,
    log_y: bool,
) -> tuple[Path, int]:
    """Draws and writes a figure and, beside it, the CSV of its numbers.

    Args:
      runs: at least one.
      x: a column, or a key of the config with a number.
      y: a column; None: the figure that runs are judged by.
      group_by: "auto", or keys of the config: runs that agree in them are one curve.
      output: a PNG, PDF or SVG file; None: `plots/Y-by-X.png`.
      title: of the figure; None: the runs' names.
      log_x: a logarithmic x axis.
      log_y: a logarithmic y axis.

    Returns:
      The figure's file, and how many runs are in it.

    Raises:
      RunError: a setting does not fit; says what exists instead.
    """
    y = y or curves.pick_y(runs)
    named = output or f"plots/{safe_name(y)}-by-{safe_name(x)}.png"
    target = figure_files.check_output(named, curves.COLUMNS)
    runs, left_out = curves.drawable(runs, x, y)
    for line in left_out:
        print(f"left out: {printable(line)}")
    if group_by == "auto":
        keys = [key for key in differing_keys(runs) if key != x]
    else:
        keys = check_keys(runs, [group_by] if isinstance(group_by, str) else group_by)
    groups = group(runs, keys)
    lines = {label: curves.make_curve(members, x, y) for label, members in groups.items()}
    for label, members in groups.items():
        short = curves.shortest(members, x, y)
        if short is not None:
            print(f"{printable(label)}: shown up to where {short.folder} ends")
    names = list(dict.fromkeys(str(run.config.get("name", run.folder.name)) for run in runs))
    figure = curves.draw(lines, x=x, y=y, title=title or ", ".join(names), log_x=log_x, log_y=log_y)
    figure_files.write(figure, target, *curves.table(lines, x, y))
    return target, len(runs)


@command
@hydra.main(version_base="1.3", config_path="conf", config_name="plot")
def main(cfg: DictConfig) -> None:
    """Hydra's entry."""

    def program():
        values = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(values, dict)
        del values[TRUST]  # `guarded` has read it
        runs, left_out = read_all(values.pop("runs"))
        for line in left_out:
            print(f"left out: {line}")
        with content_of(*(run.folder for run in runs)):
            target, drawn = plot(runs, **values)
        print(f"{target} and {target.with_suffix('.csv').name}, from {drawn} runs")

    guarded(program, cfg)


if __name__ == "__main__":
    sys.argv[1:] = quote_folders(sys.argv[1:], keys=("runs", TRUST))
    main()
