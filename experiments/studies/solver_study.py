"""Studies accuracy against the budget and the tolerance of the solve.

    python -m experiments.studies.solver_study

The library completes every solve; this study leaves them unfinished. Each model is trained with a
solver that stops early and tested twice, with the same solver and with the exact one. Models that
were trained exactly are tested with every solver that stops early.
"""

import copy
import csv
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments.run import figures, folders, opening, trust
from experiments.shell.commandline import command, guarded
from experiments.studies.study_figure import draw
from experiments.tasks.answers import answer_loss, correct, last_answers, share
from experiments.tasks.problem import Examples, Problem, sample
from jaxpara.train import init_state, make_step
from jaxpara.types import Model, Params

EXACT = "exact"
WRITTEN = ("study.csv", "study.png", folders.SUMMARY, folders.ENVIRONMENT)


class Way(NamedTuple):
    """A way to solve the recurrence.

    Attributes:
      solver: its name, or "exact".
      max_iters: the budget; None if only the tolerance stops it.
      tol: the tolerance; None if only the budget stops it.
    """

    solver: str = EXACT
    max_iters: int | None = None
    tol: float | None = None


class Row(NamedTuple):
    """One model tested at one length."""

    trained: str
    tested: str
    solver: str
    max_iters: int | None
    tol: float | None
    seed: int
    length: int
    accuracy: float
    last: float
    train_loss: float


class Setting(NamedTuple):
    """The settings that all models of a study share, named as in conf/solver_study.yaml."""

    problem: Problem
    optimizer: optax.GradientTransformation
    steps: int
    batch_size: int
    length: int
    test_lengths: Sequence[int]
    test_sequences: int
    seeds: Sequence[int]


def train(model: Model, setting: Setting) -> tuple[Params, np.ndarray]:
    """Trains one model for each seed, side by side.

    Args:
      model: solved in one way.
      setting: the numbers.

    Returns:
      Parameters with a leading axis over seeds, and the mean loss over the last ten steps.
    """
    keys = jnp.stack([jax.random.key(seed) for seed in setting.seeds])
    state = jax.jit(jax.vmap(lambda key: init_state(model, setting.optimizer, key)))(keys)
    step = jax.jit(jax.vmap(make_step(answer_loss(model), setting.optimizer)), donate_argnums=0)
    losses: list[Any] = []
    for number in range(setting.steps):
        drawn = [
            sample(
                setting.problem,
                seed=seed,
                step=number,
                batch_size=setting.batch_size,
                length=setting.length,
            )
            for seed in setting.seeds
        ]
        batch = Examples(*(np.stack(leaves) for leaves in zip(*drawn, strict=True)))
        state, metrics = step(state, batch)
        losses = [*losses[-9:], metrics["loss"]]
    return state.params, np.mean(losses, axis=0)


Judge = Callable[[Params], list[tuple[int, int, float, float]]]


def judge(model: Model, setting: Setting) -> Judge:
    """Makes a function that computes the accuracy of the models of all seeds.

    Args:
      model: solved in one way, which may differ from that of training.
      setting: the numbers.

    Returns:
      A function from parameters with a leading axis over seeds to rows of
      `(seed, length, accuracy, accuracy of the last answers)`.
    """
    right = jax.jit(
        jax.vmap(lambda p, tokens, targets: correct(model, p, tokens, targets), (0, None, None))
    )
    drawn = [
        sample(
            setting.problem,
            seed=0,
            step=0,
            batch_size=setting.test_sequences,
            length=length,
            held_out=True,
        )
        for length in setting.test_lengths
    ]

    def judged(params: Params) -> list[tuple[int, int, float, float]]:
        rows = []
        for tokens, targets, mask in drawn:
            hits = np.asarray(right(params, tokens, targets))
            for seed, hit in zip(setting.seeds, hits, strict=True):
                last = share(hit, last_answers(mask))
                rows.append((seed, tokens.shape[1], share(hit, mask), last))
        return rows

    return judged


def study(
    models: Mapping[Way, Model], setting: Setting, say: Callable[[str], None]
) -> Iterable[Row]:
    """Trains and tests.

    Args:
      models: the same model solved in each way, one of them `Way()`, the exact one.
      setting: the numbers.
      say: prints a line of results.

    Yields:
      Rows, as soon as they are measured.
    """
    exact = Way()
    judges = {way: judge(model, setting) for way, model in models.items()}
    exactly, exact_losses = train(models[exact], setting)
    longest = max(setting.test_lengths)
    for way, model in models.items():
        began = time.perf_counter()
        if way == exact:
            jobs = [(EXACT, EXACT, judges[exact], exactly, exact_losses)]
        else:
            params, losses = train(model, setting)
            jobs = [
                ("stopped", "stopped", judges[way], params, losses),
                ("stopped", EXACT, judges[exact], params, losses),
                (EXACT, "stopped", judges[way], exactly, exact_losses),
            ]
        said = []
        for trained, tested, judged, params, losses in jobs:
            loss_of = dict(zip(setting.seeds, losses, strict=True))
            rows = [
                Row(trained, tested, *way, seed, length, accuracy, last, float(loss_of[seed]))
                for seed, length, accuracy, last in judged(params)
            ]
            yield from rows
            shown = " ".join(f"{row.accuracy:.2f}" for row in rows if row.length == longest)
            said.append(f"trained {trained}, tested {tested}: {shown}")
        say(f"{way}: {'; '.join(said)} ({time.perf_counter() - began:.0f} s)")


def ways(solvers: Sequence[str], budgets: Sequence[int], tols: Sequence[float]) -> list[Way]:
    """Lists the exact way, then every solver at every budget and at every tolerance.

    Args:
      solvers: names.
      budgets: evaluations of all steps.
      tols: relative sizes of the next correction.

    Returns:
      The ways.
    """
    stopped = [Way(solver, max_iters=n) for solver, n in itertools.product(solvers, budgets)]
    loose = [Way(solver, tol=float(tol)) for solver, tol in itertools.product(solvers, tols)]
    return [Way(), *stopped, *loose]


@command
@hydra.main(version_base="1.3", config_path="../conf", config_name="solver_study")
def main(cfg: DictConfig) -> None:
    """Hydra's entry."""

    def model_of(way: Way) -> Model:
        changed = copy.deepcopy(cfg)
        if way.solver != EXACT:
            budget = cfg.unlimited if way.max_iters is None else way.max_iters
            changed.solver = {**cfg.solvers[way.solver], "max_iters": budget, "tol": way.tol}
        return instantiate(changed.model)

    def program() -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        names = ("steps", "batch_size", "length", "test_lengths", "test_sequences", "seeds")
        setting = Setting(
            instantiate(cfg.problem),
            instantiate(cfg.optim),
            **instantiate({name: cfg[name] for name in names}, _convert_="all"),
        )
        models = {way: model_of(way) for way in ways(list(cfg.solvers), cfg.budgets, cfg.tols)}
        trust.check_links(folder, written=True)
        opening.open_run(folder, cfg, writes=WRITTEN)
        began = time.perf_counter()
        table = folder / "study.csv"
        with table.open("x", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(Row._fields)
            for row in study(models, setting, lambda text: print(text, flush=True)):
                writer.writerow(["" if value is None else value for value in row])
                file.flush()
        figures.save(draw(table), folder / "study.png")
        folders.close_run(folder, {"seconds": time.perf_counter() - began})
        print(f"{folder / 'study.png'} and study.csv")

    guarded(program, cfg)


if __name__ == "__main__":
    main()
