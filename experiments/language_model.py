"""One training run of a byte-level language model, from objects and numbers to a full folder."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import checkpoints, figures, metrics, runs, solver_check, tables
from experiments.build import Parts
from experiments.data import windows
from experiments.data.baselines import baselines
from experiments.data.corpus import Corpus
from experiments.judging import bits_per_byte
from experiments.loop import Diverged, Ending, Row, run_loop
from experiments.progress import Progress, progress
from experiments.sampling import check_generation, encode, sample_text
from experiments.stopping import interrupt_flag
from jaxpara.train import init_state, make_step, next_token_loss
from jaxpara.types import Params


class Settings(NamedTuple):
    """The numbers of a run, named and explained in conf/train.yaml."""

    name: str
    seed: int
    steps: int
    batch_size: int
    accumulate: int
    window: int
    log_every: int
    eval_every: int
    evaluation: dict[str, Any]
    check: dict[str, Any]
    sample: dict[str, Any]


Observe = Callable[[Params], list[dict[str, Any]]]


def cut_held_out(corpus: Corpus, which: dict[str, Any]):
    """Windows of held-out bytes.

    Args:
      corpus: its validation bytes are cut.
      which: `length`, and their number as `windows` or, where one batch is meant, `batch_size`.

    Returns:
      `[windows, length + 1]` bytes.

    Raises:
      RunError: they do not fit.
    """
    count = which.get("windows", which["batch_size"])
    try:
        return windows.evenly_spaced(corpus.validation, count=count, length=which["length"])
    except ValueError as error:
        raise runs.RunError(f"held-out bytes: {error}") from error


def train(parts: Parts, settings: Settings, folder: Path) -> dict[str, Any]:
    """Trains, looks up, compares and samples; everything lands in the folder.

    Args:
      parts: the objects of the run.
      settings: its numbers.
      folder: of the run, opened by `runs.open_run`.

    Returns:
      The summary, as written to `summary.json`.

    Raises:
      Diverged: the loss became NaN or infinite; what was measured is in the folder.
    """
    began = time.perf_counter()
    summary: dict[str, Any] = {
        "name": settings.name,
        "parallel_solver": parts.parallel_name,
        "baselines": baselines(parts.corpus.validation),
    }
    first = jax.jit(lambda key: init_state(parts.model, parts.optimizer, key))
    state = first(jax.random.key(settings.seed))
    summary["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    observe: Observe | None = None
    if parts.observed is not None:
        checked = cut_held_out(parts.corpus, settings.check)[:, :-1]
        observe = solver_check.observer(parts.observed, jnp.asarray(checked, jnp.int32))
    step = make_step(
        next_token_loss(parts.model),
        parts.optimizer,
        accumulate=settings.accumulate,
        project=parts.projection,
    )
    try:
        with progress(label=settings.name) as line, interrupt_flag() as interrupted:
            line.say(
                f"{settings.name}: {summary['parameters']:,} parameters; "
                f"{len(parts.corpus.train):,} bytes to train on, "
                f"{len(parts.corpus.validation):,} held out, from the {parts.corpus.source}; "
                f"{jax.devices()[0].device_kind}; {folder}"
            )
            ending = run_loop(
                state=state,
                step=jax.jit(step, donate_argnums=0),
                batches=_batches(parts, settings),
                steps=settings.steps,
                tokens_per_step=settings.batch_size * settings.window,
                log_every=settings.log_every,
                eval_every=settings.eval_every,
                write_row=_row_writer(settings, folder),
                look_up=_look_up(parts, settings, folder, summary, line, observe),
                progress=line,
                interrupted=interrupted,
            )
        summary.update(_results(ending))
        checkpoints.save_params(folder, ending.state.params)
        if ending.interrupted:
            return summary
        summary["solvers"] = _compare(parts, settings, ending.state.params, observe)
        _sample(parts, settings, folder, ending.state.params)
        tables.show_quality(
            summary["validation_bits_per_byte"],
            summary["baselines"],
            where=f"{settings.evaluation['windows']} windows of held-out files",
        )
    except Diverged as error:
        summary["diverged"] = str(error)
        raise
    finally:
        summary["seconds"] = time.perf_counter() - began
        runs.close_run(folder, summary)
        figures.draw_run(folder)
    return summary


def _batches(parts: Parts, settings: Settings):
    def batch(step: int) -> jax.Array:
        cut = windows.sample_batch(
            parts.corpus.train,
            seed=settings.seed,
            step=step,
            batch_size=settings.batch_size,
            length=settings.window,
        )
        return jnp.asarray(cut, jnp.int32)

    return batch


def _row_writer(settings: Settings, folder: Path):
    table = folder / "metrics.csv"
    metrics.start(table, metrics.TRAINING_COLUMNS)

    def write(row: Row) -> None:
        values = {
            "step": row.step,
            "tokens": row.step * settings.batch_size * settings.window,
            "seconds": f"{row.seconds:.2f}",
            "train_loss_nats": row.loss,
            "train_bits_per_byte": row.loss / math.log(2),
            "tokens_per_second": f"{row.tokens_per_second:.0f}",
        }
        if row.gradient_norm is not None:
            values["gradient_norm"] = row.gradient_norm
        metrics.append(table, metrics.TRAINING_COLUMNS, values)

    return write


def _look_up(
    parts: Parts,
    settings: Settings,
    folder: Path,
    summary: dict[str, Any],
    line: Progress,
    observe: Observe | None,
):
    """Validation bits per byte, and how the parallel solver fares in each layer."""
    score = bits_per_byte(
        parts.model,
        cut_held_out(parts.corpus, settings.evaluation),
        batch_size=settings.evaluation["batch_size"],
    )
    began = time.perf_counter()
    if observe is not None:
        metrics.start(folder / "solver.csv", metrics.SOLVER_COLUMNS)

    def look_up(step: int, params: Params) -> None:
        bits = score(params)
        tokens = step * settings.batch_size * settings.window
        summary["validation_bits_per_byte"] = bits
        row = {
            "step": step,
            "tokens": tokens,
            "seconds": f"{time.perf_counter() - began:.2f}",
            "validation_bits_per_byte": bits,
        }
        metrics.append(folder / "metrics.csv", metrics.TRAINING_COLUMNS, row)
        text = f"step {step}: validation {bits:.3f} bits/byte"
        if observe is not None:
            solves = observe(params)
            for layer, solve in enumerate(solves):
                metrics.append(
                    folder / "solver.csv",
                    metrics.SOLVER_COLUMNS,
                    {
                        "step": step,
                        "tokens": tokens,
                        "layer": layer,
                        **{name: +value for name, value in solve.items()},  # True becomes 1
                    },
                )
            iterations = ", ".join(str(solve["iterations"]) for solve in solves)
            worst = max(solve["residual"] for solve in solves)
            text += f"; {parts.parallel_name}: iterations {iterations}, residual {worst:.1e}"
        line.say(text)

    return look_up


def _results(ending: Ending) -> dict[str, Any]:
    return {
        "steps": int(ending.state.step),
        "interrupted": ending.interrupted,
        "training_seconds": ending.seconds,
        "tokens_per_second": ending.tokens_per_second,
    }


def _compare(
    parts: Parts, settings: Settings, params: Params, observe: Observe | None
) -> list[dict[str, Any]]:
    if observe is None:
        print("no recurrent layer: there is no parallel solve to compare")
        return []
    check = settings.check
    rows = solver_check.compare(
        {"sequential": parts.sequential, parts.parallel_name: parts.parallel},
        params,
        jnp.asarray(cut_held_out(parts.corpus, check), jnp.int32),
        iterations=[solve["iterations"] for solve in observe(params)],
    )
    tables.show_solvers(rows, shape=f"{check['batch_size']} windows of {check['length']} bytes")
    return rows


def _sample(parts: Parts, settings: Settings, folder: Path, params: Params) -> None:
    text = sample_text(parts.model, params, seed=settings.seed, **settings.sample)
    (folder / "sample.txt").write_text(text)
    print(f"--- a sample from {settings.sample['prompt']!r} ---\n{text}\n---")


def check_settings(parts: Parts, settings: Settings) -> None:
    """Refuses numbers that do not fit together, before anything is compiled or written.

    Args:
      parts: the objects of the run.
      settings: its numbers.

    Raises:
      RunError: what was given, and what to change.
    """
    for name in ("steps", "batch_size", "accumulate", "log_every", "eval_every"):
        if getattr(settings, name) < 1:
            raise runs.RunError(f"{name}={getattr(settings, name)}: give at least 1")
    if settings.batch_size % settings.accumulate:
        raise runs.RunError(
            f"accumulate={settings.accumulate} does not divide batch_size={settings.batch_size}: "
            "give a batch_size that is a multiple of it"
        )
    for which in (settings.evaluation, settings.check):
        cut_held_out(parts.corpus, which)
    sample = dict(settings.sample)
    try:
        _batches(parts, settings)(0)
        check_generation(
            encode(sample["prompt"]),
            length=sample["length"],
            temperature=sample["temperature"],
            top_k=sample["top_k"],
        )
    except ValueError as error:
        raise runs.RunError(str(error)) from error
