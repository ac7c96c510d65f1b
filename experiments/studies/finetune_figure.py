"""Draws quality against bits and size.

    python -m experiments.studies.finetune_figure runs=multirun/finetune

Each chain of transforms, with its bits and rank, has a row over the seeds at its best learning
rate. Each grid to which dense weights are rounded after training has one too. If runs of a chain
differ in other settings, its name includes these. It reads only `config.yaml` and `summary.json`.
"""

import fnmatch
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import hydra
from omegaconf import DictConfig

from experiments.adapt.shared_numbers import NUMBERS, unused
from experiments.run.drawing import Figure
from experiments.run.folder_arguments import TRUST, quote_folders
from experiments.run.folders import RunError, load_config
from experiments.run.tables import show
from experiments.shell.commandline import command, guarded, quote_text
from experiments.shell.foreign import content_of
from experiments.studies import figure_files
from experiments.studies.curves import styles
from experiments.sweep.run_sets import Run, need, read_all
from experiments.text.language_model import BITS

MERGED = "merged_bits_per_byte"
ROUNDED = "rounded_"
TICKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
COLUMNS = (
    "transforms",
    "bits",
    "rank",
    "learning rate",
    "seeds",
    "bits per byte",
    "spread",
    "merged",
    "bits per weight",
    "trained numbers",
    "step memory, MB",
    "step, ms",
)


class Row(NamedTuple):
    """One line of the table, in the order of `COLUMNS`; None where a column does not apply.

    Attributes:
      spread: half the range over the seeds.
    """

    transforms: str
    bits: int | None
    rank: int | None
    rate: float
    seeds: int
    quality: float
    spread: float
    merged: float | None
    bits_per_weight: float
    trained: float | None
    memory: float | None
    milliseconds: float | None


def _mean(runs: Sequence[Run], name: str) -> float | None:
    values = [run.summary[name] for run in runs if run.summary.get(name) is not None]
    return fmean(values) if values else None


def _row(name: str, numbers: tuple, runs: Sequence[Run], quality: str, bits: str, **rest) -> Row:
    values = [run.summary[quality] for run in runs]
    weight = _mean(runs, bits)
    assert weight is not None
    spread = (max(values) - min(values)) / 2
    empty = dict.fromkeys(("merged", "trained", "memory", "milliseconds"))
    return Row(
        name,
        *numbers,
        rate=runs[0].config["learning_rate"],
        seeds=len(runs),
        quality=fmean(values),
        spread=spread,
        bits_per_weight=weight,
        **{**empty, **rest},
    )


def _step_milliseconds(runs: Sequence[Run]) -> float | None:
    speed = _mean(runs, "tokens_per_second")
    config = runs[0].config
    return 1e3 * config["batch_size"] * config["window"] / speed if speed else None


def _names(configs: Sequence[DictConfig]) -> list[str]:
    """Names chains, each transform with the settings in which runs of its chain differ."""
    chains = [
        {name: dict(settings) for name, settings in (cfg.get("transform") or {}).items()}
        for cfg in configs
    ]

    def differs(chain: Mapping[str, Any], name: str, key: str) -> bool:
        alike = [other for other in chains if list(other) == list(chain)]
        # Absent, as in older runs, means the default.
        return len({str(other[name].get(key)) for other in alike}) > 1

    def label(chain: Mapping[str, Mapping[str, Any]], name: str) -> str:
        own = [
            f"{key}={value}"
            for key, value in chain[name].items()
            if key not in NUMBERS and value is not None and differs(chain, name, key)
        ]
        return f"{name}({', '.join(own)})" if own else name

    return [" > ".join(label(chain, name) for name in chain) or "full" for chain in chains]


def rows(runs: Iterable[Run]) -> list[Row]:
    """Makes the table.

    Args:
      runs: of `experiments.finetune`.

    Returns:
      The rows, grouped by chain, with decreasing bits.

    Raises:
      RunError: no run is finished, or one is from another command.
    """
    known: list[tuple[Run, DictConfig]] = []
    for run in runs:
        if run.summary.get("status") != "finished" or "same_as" in run.summary:
            continue
        if "bits_per_weight" not in run.summary:
            raise RunError(f"{run.folder} is not a run of `python -m experiments.finetune`")
        need(
            run, config=("learning_rate", "seed", "batch_size", "window", *NUMBERS), summary=(BITS,)
        )
        known.append((run, load_config(run.folder)))
    names = _names([cfg for _, cfg in known])
    groups: dict[tuple, dict[int, Run]] = {}  # one run for each seed, even after two sweeps
    for (run, cfg), name in zip(known, names, strict=True):
        idle = unused(cfg)
        numbers = tuple(None if key in idle else int(cfg[key]) for key in NUMBERS)
        at = (name, *numbers, run.config["learning_rate"])
        groups.setdefault(at, {})[run.config["seed"]] = run
    if not groups:
        raise RunError("no run is finished: repeat the command of the sweep")
    found = []
    for (name, *numbers, _), by_seed in groups.items():
        members = list(by_seed.values())
        memory = _mean(members, "step_memory_bytes")
        rest = {
            "merged": _mean(members, MERGED),
            "trained": _mean(members, "trainable_parameters"),
            "memory": None if memory is None else memory / 1e6,
            "milliseconds": _step_milliseconds(members),
        }
        found.append(_row(name, tuple(numbers), members, BITS, "bits_per_weight", **rest))
        # Older runs may have been rounded to other grids.
        for key in dict.fromkeys(key for run in members for key in run.summary):
            if key.startswith(ROUNDED) and key.endswith("_bits_per_byte"):
                kind = key.removeprefix(ROUNDED).removesuffix("_bits_per_byte")
                bits = f"{ROUNDED}{kind}_bits_per_weight"
                how = (int(kind), numbers[1]) if kind.isdigit() else (None, numbers[1])
                label = f"{name}, rounded" if kind.isdigit() else f"{name}, rounded: {kind}"
                having = [run for run in members if key in run.summary]
                found.append(_row(label, how, having, key, bits))

    best: dict[tuple, Row] = {}
    for row in sorted(found, key=lambda row: row.quality):
        best.setdefault((row.transforms, row.bits, row.rank), row)

    def order(row: Row):
        return row.transforms, -(row.rank or 0), -row.bits_per_weight

    return sorted(best.values(), key=order)


def cells(row: Row) -> list[str]:
    """Formats a row.

    Args:
      row: from `rows`.

    Returns:
      Text by column.
    """

    def text(value: Any, form: str) -> str:
        return "-" if value is None else format(value, form)

    forms = ("", "", "", "g", "", ".3f", ".3f", ".3f", ".2f", ",.0f", ".1f", ".0f")
    return [text(value, form) for value, form in zip(row, forms, strict=True)]


def pick(table: Sequence[Row], globs: Sequence[str] | None) -> dict[str, list[Row]]:
    """Selects the lines of the figure by their labels: a chain, its rounding, its rank.

    Args:
      table: from `rows`.
      globs: of labels; None selects all.

    Returns:
      Rows by label.

    Raises:
      RunError: a glob selects nothing.
    """
    lines: dict[str, list[Row]] = {}
    for row in table:
        rank = "" if row.rank is None else f", rank {row.rank}"
        lines.setdefault(f"{row.transforms}{rank}", []).append(row)
    for glob in globs or ():
        if not fnmatch.filter(lines, glob):
            raise RunError(f"lines: {glob!r} selects none of {', '.join(map(repr, lines))}")
    if globs is None:
        return lines
    return {label: lines[label] for label in lines if any(fnmatch.fnmatch(label, g) for g in globs)}


def draw(lines: Mapping[str, Sequence[Row]], *, title: str) -> Figure:
    """Draws bits per byte against bits per weight.

    Args:
      lines: from `pick`.
      title: of the figure.

    Returns:
      The figure; bars are the range over the seeds. Rows far above the best are cut off: weights
      that rounding has destroyed would leave no room for the others.
    """
    table = [row for points in lines.values() for row in points]
    top = min(row.quality for row in table) + 1.5
    lines = {
        label: points for label, points in lines.items() if min(r.quality for r in points) < top
    }
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.add_subplot()
    for (label, points), (colour, line) in zip(lines.items(), styles(list(lines)), strict=True):
        axes.errorbar(
            [row.bits_per_weight for row in points],
            [row.quality for row in points],
            yerr=[row.spread for row in points],
            label=label,
            color=colour,
            linestyle=":" if "rounded" in label else line,
            marker="x" if "rounded" in label else "o" if line == "-" else "s",
            capsize=2,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(TICKS, map(str, TICKS))
    axes.set_xlim(0.85 * min(row.bits_per_weight for row in table), 40)
    axes.set_xlabel("bits per weight, scales included")
    axes.set_ylabel("validation, bits per byte")
    axes.set_ylim(top=min(axes.get_ylim()[1], top))
    figure.suptitle(title, fontsize="medium")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    return figure


def write(
    output: str | Path, table: Sequence[Row], *, title: str, lines: Sequence[str] | None = None
) -> None:
    """Prints the table and writes it with the figure.

    Args:
      output: the figure's file; the tables go beside it.
      table: from `rows`.
      title: of both.
      lines: globs of what the figure shows, see `pick`.

    Raises:
      RunError: a glob selects nothing.
    """
    target = figure_files.check_output(output, COLUMNS, markdown=True)
    drawn = pick(table, lines)
    shown = [cells(row) for row in table]
    show(title, COLUMNS, shown)
    text = "".join(
        f"| {' | '.join(line)} |\n" for line in (COLUMNS, ["---"] * len(COLUMNS), *shown)
    )
    figure_files.write(
        draw(drawn, title=title), target, COLUMNS, table, markdown=f"{title}\n\n{text}"
    )
    print(f"{target}, .csv and .md")


def named(runs: Sequence[Run], title: str | None) -> str:
    """Makes a title that says what was trained.

    Args:
      runs: all of them.
      title: as given.

    Returns:
      The title.
    """
    if title:
        return title
    first: Mapping[str, Any] = runs[0].config
    return f"{first['name']}: {first['steps']} steps of {first['batch_size']} x {first['window']}"


@command
@hydra.main(version_base="1.3", config_path="../conf", config_name="finetune_figure")
def compose(cfg: DictConfig) -> None:
    """Hydra's entry."""

    def program():
        found, left_out = read_all(cfg.runs)
        for line in left_out:
            print(f"left out: {line}")
        with content_of(*(run.folder for run in found)):
            write(cfg.output, rows(found), title=named(found, cfg.title), lines=cfg.lines)

    guarded(program, cfg)


def main() -> None:
    """The command line; keeps the title as typed."""
    sys.argv[1:] = quote_text(sys.argv[1:], keys=("title",))
    compose()


if __name__ == "__main__":
    sys.argv[1:] = quote_folders(sys.argv[1:], keys=("runs", TRUST))
    main()
