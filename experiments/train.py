"""Trains a byte-level language model: `python -m experiments.train experiment=lm`."""

import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import jax
import jax.numpy as jnp
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments import checkpoints, figures, metrics, runs, solver_check, tables
from experiments.build import Parts, build
from experiments.commandline import guarded, quote_text
from experiments.data import windows
from experiments.data.baselines import baselines
from experiments.judging import bits_per_byte
from experiments.loop import Diverged, Ending, Row, run_loop
from experiments.progress import Progress, progress
from experiments.sampling import sample_text
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
    state = init_state(parts.model, parts.optimizer, jax.random.key(settings.seed))
    summary["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(state.params))
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
                look_up=_look_up(parts, settings, folder, summary, line),
                progress=line,
                interrupted=interrupted,
            )
        summary.update(_results(ending))
        checkpoints.save_params(folder, ending.state.params)
        if ending.interrupted:
            return summary
        summary["solvers"] = _compare(parts, settings, ending.state.params)
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


def _held_out(parts: Parts, count: int, length: int):
    return windows.evenly_spaced(parts.corpus.validation, count=count, length=length)


def _look_up(
    parts: Parts, settings: Settings, folder: Path, summary: dict[str, Any], line: Progress
):
    """Validation bits per byte, and how the parallel solver fares in each layer."""
    judge, check = settings.evaluation, settings.check
    score = bits_per_byte(
        parts.model,
        _held_out(parts, judge["windows"], judge["length"]),
        batch_size=judge["batch_size"],
    )
    batch = jnp.asarray(_held_out(parts, check["batch_size"], check["length"])[:, :-1], jnp.int32)
    began = time.perf_counter()
    if parts.observed is not None:
        metrics.start(folder / "solver.csv", metrics.SOLVER_COLUMNS)
        observe = solver_check.observer(parts.observed, batch)

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
        if parts.observed is not None:
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


def _compare(parts: Parts, settings: Settings, params: Params) -> list[dict[str, Any]]:
    if parts.observed is None:
        print("no recurrent layer: there is no parallel solve to compare")
        return []
    check = settings.check
    batch = jnp.asarray(_held_out(parts, check["batch_size"], check["length"]), jnp.int32)
    solves = solver_check.observer(parts.observed, batch[:, :-1])(params)
    rows = solver_check.compare(
        {"sequential": parts.sequential, parts.parallel_name: parts.parallel},
        params,
        batch,
        iterations=[solve["iterations"] for solve in solves],
    )
    tables.show_solvers(rows, shape=f"{check['batch_size']} windows of {check['length']} bytes")
    return rows


def _sample(parts: Parts, settings: Settings, folder: Path, params: Params) -> None:
    text = sample_text(parts.model, params, seed=settings.seed, **settings.sample)
    (folder / "sample.txt").write_text(text)
    print(f"--- a sample from {settings.sample['prompt']!r} ---\n{text}\n---")


def job(cfg: DictConfig) -> None:
    """One run, from its config.

    Args:
      cfg: composed by Hydra.

    Raises:
      RunError: something to put right at the keyboard.
      SystemExit: 130 after Ctrl-C, with everything saved.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    parts = build(cfg)
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    settings = Settings(**{name: values[name] for name in Settings._fields})
    if settings.accumulate < 1 or settings.batch_size % settings.accumulate:
        raise runs.RunError(
            f"accumulate={settings.accumulate} does not divide batch_size={settings.batch_size}: "
            "give a batch_size that is a multiple of it"
        )
    runs.open_run(folder, cfg)
    summary = train(parts, settings, folder)
    if summary["interrupted"]:
        print(
            f"interrupted after step {summary['steps']} of {settings.steps}: "
            f"parameters, metrics and figures are in {folder}\n"
            f"look at them with: python -m experiments.evaluate run={folder}"
        )
        raise SystemExit(130)
    print(f"everything is in {folder}")


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """Hydra's entry."""
    guarded(lambda: job(cfg))


if __name__ == "__main__":
    sys.argv[1:] = quote_text(sys.argv[1:], keys=("sample.prompt",))
    main()
