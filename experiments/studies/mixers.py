"""Compares contenders of equal size.

    python -m experiments.studies.mixers runs=multirun/lm/mixers

Each contender is shown at its best learning rate over all seeds. Training speed comes from the
runs, memory is XLA's account of the training step, and decoding is timed here.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import hydra
import jax
import jax.numpy as jnp
import optax
from omegaconf import DictConfig

from experiments.run import trust
from experiments.run.folder_arguments import quote_folders
from experiments.run.folders import RunError, read_yaml
from experiments.run.tables import show
from experiments.shell.build import build_model, make
from experiments.shell.commandline import command, guarded
from experiments.shell.foreign import content_of
from experiments.studies import curves, figure_files
from experiments.sweep.run_sets import Run, need, read_all
from experiments.text.decoding import decoder
from experiments.text.trained import open_model
from jaxpara.train import init_state, make_step, next_token_loss
from jaxpara.types import Model, Params

RATE = "optim.learning_rate"
COLUMNS = (
    "contender",
    "parameters",
    "learning rate",
    "bits per byte",
    "training tokens/s",
    "step memory, MB",
    "decoding tokens/s",
)


class Choice(NamedTuple):
    """A contender at its best learning rate.

    Attributes:
      name: of the contender.
      rate: the learning rate.
      tried: all rates, increasing.
      figure: by which runs are judged, the mean over seeds.
      runs: at that rate, one for each seed.
    """

    name: str
    rate: float
    tried: list[float]
    figure: float
    runs: list[Run]


def contender_of(run: Run) -> str:
    """Names the contender that a run trained.

    Args:
      run: read from its folder.

    Returns:
      Its name.

    Raises:
      RunError: the run has none.
    """
    if "contender" in run.config:
        return run.config["contender"]
    # The config of a foreign contender may lack its name; Hydra's record has it too.
    overrides = run.folder / ".hydra" / "overrides.yaml"
    for line in read_yaml(overrides) if overrides.is_file() else []:
        key, _, name = str(line).partition("=")
        if key == "contender":
            return name
    raise RunError(
        f"{run.folder} has no contender: give the runs of "
        "`python -m experiments.train experiment=lm sweep=mixers`"
    )


def choose(runs: Sequence[Run]) -> tuple[str, list[Choice]]:
    """Picks each contender's learning rate.

    Args:
      runs: with `contender` in their configs.

    Returns:
      The name of the figure, and the choices from best to worst.

    Raises:
      RunError: the runs cannot be compared; says which.
    """
    by_name: dict[str, dict[float, list[Run]]] = {}
    judged = {tuple(run.summary.get("judged_by") or ()) for run in runs} - {()}
    if len(judged) > 1:
        raise RunError(
            f"the runs are judged by different figures: {sorted(judged)}; compare runs of one task"
        )
    if not judged:
        raise RunError("no run is finished: repeat the command of the sweep")
    [(column, better)] = judged
    for run in runs:
        finished = run.summary.get("status") == "finished"
        results = (column, "parameters", "tokens_per_second") if finished else ()
        need(run, config=(RATE,), summary=results)
        rates = by_name.setdefault(contender_of(run), {})
        rates.setdefault(run.config[RATE], [])
        if run.summary.get("status") == "finished":
            rates[run.config[RATE]].append(run)
    choices = []
    for name, rates in by_name.items():
        figures = {
            rate: fmean(run.summary[column] for run in group)
            for rate, group in rates.items()
            if group
        }
        if not figures:
            raise RunError(f"no run of contender {name} is finished; repeat the sweep's command")
        best = {"min": min, "max": max}[better](figures, key=lambda rate: figures[rate])
        choices.append(Choice(name, best, sorted(rates), figures[best], rates[best]))
    tokens = {choice.name: {run.columns["tokens"][-1] for run in choice.runs} for choice in choices}
    if len(set.union(*tokens.values())) > 1:
        raise RunError(f"the runs saw unequal numbers of tokens: {tokens}")
    return column, sorted(choices, key=lambda c: c.figure, reverse=better == "max")


def step_memory(
    model: Model, optimizer: optax.GradientTransformation, *, batch_size: int, window: int
) -> int | None:
    """Computes the memory of a training step: parameters, optimiser, activations, gradients.

    Args:
      model: to train.
      optimizer: of optax.
      batch_size: windows in a step.
      window: tokens predicted in each.

    Returns:
      Bytes, by XLA's account; None if the backend gives none.
    """
    state = jax.eval_shape(lambda: init_state(model, optimizer, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((batch_size, window + 1), jnp.int32)
    step = jax.jit(make_step(next_token_loss(model), optimizer), donate_argnums=0)
    account = step.lower(state, tokens).compile().memory_analysis()
    if account is None:
        return None
    held = account.argument_size_in_bytes + account.temp_size_in_bytes
    return held + account.output_size_in_bytes - account.alias_size_in_bytes


def decode_speed(model: Model, params: Params, *, prompt: int, length: int, rounds: int) -> float:
    """Times the tokens a second of one text drawn token by token, without compilation and prompt.

    Args:
      model: a sequence model.
      params: of it.
      prompt: tokens read before.
      length: tokens drawn.
      rounds: number of timings; the median is returned.

    Returns:
      Tokens a second.
    """
    speeds = []
    loop = decoder(model, lambda keys, logits: jnp.argmax(logits, -1), block=length)
    for i in range(rounds + 1):  # the first is not counted
        position = loop.read(params, [[32] * prompt], length)
        before = loop.watch.seconds["decode"]
        loop.draw(params, position, jax.random.key(0)[None], length)
        if i:
            speeds.append(length / (loop.watch.seconds["decode"] - before))
    return median(speeds)


def measure(choice: Choice, *, optimizer_of, decoding: Mapping[str, int]) -> dict[str, Any]:
    """Makes a contender's row.

    Args:
      choice: the contender.
      optimizer_of: config of a run -> its optimiser.
      decoding: see `decode_speed`.

    Returns:
      Cells by column.
    """
    first = choice.runs[0]
    cfg = trust.open_config(first.folder)
    model, params, _ = open_model(first.folder)
    held = step_memory(
        build_model(cfg), optimizer_of(cfg), batch_size=cfg.batch_size, window=cfg.window
    )
    return dict(
        zip(
            COLUMNS,
            (
                choice.name,
                first.summary["parameters"],
                choice.rate,
                choice.figure,
                fmean(run.summary["tokens_per_second"] for run in choice.runs),
                None if held is None else held / 1e6,
                decode_speed(model, params, **decoding),
            ),
            strict=True,
        )
    )


def _cells(row: Mapping[str, Any], choice: Choice) -> list[str]:
    edge = len(choice.tried) > 1 and choice.rate in (choice.tried[0], choice.tried[-1])
    held = row["step memory, MB"]
    return [
        choice.name,
        f"{row['parameters']:,}",
        f"{choice.rate:g}" + ("*" if edge else ""),
        f"{choice.figure:.3f}",
        f"{row['training tokens/s']:,.0f}",
        "-" if held is None else f"{held:,.3g}",
        f"{row['decoding tokens/s']:,.0f}",
    ]


def compare(
    runs: Sequence[Run], *, y: str, output: str | Path, optimizer_of, decoding: Mapping[str, int]
) -> None:
    """Prints the table and writes it with the figure.

    Args:
      runs: of the sweep.
      y: the column that the figure shows over training tokens.
      output: the figure's file; the tables go beside it.
      optimizer_of: config of a run -> its optimiser.
      decoding: see `decode_speed`.

    Raises:
      RunError: the runs cannot be compared.
    """
    target = figure_files.check_output(output, COLUMNS, markdown=True)
    _, choices = choose(runs)
    rows = [measure(choice, optimizer_of=optimizer_of, decoding=decoding) for choice in choices]
    cells = [_cells(row, choice) for row, choice in zip(rows, choices, strict=True)]
    device = jax.devices()[0].device_kind
    tokens = choices[0].runs[0].columns["tokens"][-1]
    seeds = min(len(choice.runs) for choice in choices)
    title = f"{tokens:,.0f} training tokens each, {seeds} seed{'s' * (seeds > 1)}; {device}"
    show(title, COLUMNS, cells)
    note = "" if not any("*" in row[2] for row in cells) else "* at the edge of its grid\n"
    print(note, end="")
    lines = [COLUMNS, ["---"] * len(COLUMNS), *cells]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    markdown = f"{title}\n\n{text}{note and chr(10) + note}"
    lines = {f"{c.name}, {c.rate:g}": curves.make_curve(c.runs, "tokens", y) for c in choices}
    title = "equal parameters, best learning rate"
    figure = curves.draw(lines, x="tokens", y=y, title=title, log_x=True, log_y=True)
    figure_files.write(
        figure, target, COLUMNS, [list(row.values()) for row in rows], markdown=markdown
    )
    print(f"{target}, .csv and .md")


@command
@hydra.main(version_base="1.3", config_path="../conf", config_name="mixers")
def main(cfg: DictConfig) -> None:
    """Hydra's entry."""

    def program():
        runs, left_out = read_all(cfg.runs)
        for line in left_out:
            print(f"left out: {line}")
        with content_of(*(run.folder for run in runs)):
            compare(
                runs,
                y=cfg.y,
                output=cfg.output,
                optimizer_of=lambda trained: make(trained.optim),
                decoding={name: cfg[name] for name in ("prompt", "length", "rounds")},
            )

    guarded(program, cfg)


if __name__ == "__main__":
    sys.argv[1:] = quote_folders(sys.argv[1:], keys=("runs", trust.TRUST))
    main()
