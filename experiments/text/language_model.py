"""A language model as a Task: it predicts the next token and is judged in bits per byte."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.data.baselines import baselines
from experiments.data.corpus import Data
from experiments.run import folders, tables
from experiments.run.memory import check_tokens
from experiments.run.plain_files import write_text
from experiments.run.task import Table, Task
from experiments.shell.build import Solved
from experiments.text import solver_check
from experiments.text.judging import bits_per_byte, reading
from experiments.text.sampling import check_generation, encode, sample_text
from jaxpara.train import next_token_loss
from jaxpara.types import Loss, Model, Params

BITS = "validation_bits_per_byte"
# One row for each layer at each evaluation.
SOLVER_COLUMNS = ("layer", "iterations", "residual", "converged", "fallback_steps")

Observe = Callable[[Params], list[dict[str, Any]]]


def language_model(
    *,
    models: Solved,
    data: Data,
    seed: int,
    batch_size: int,
    window: int,
    evaluation: Mapping[str, Any],
    check: Mapping[str, Any],
    sample: Mapping[str, Any],
) -> Task:
    """Trains on windows of text, and compares a parallel solver with the sequential one.

    Args:
      models: the model and its variants.
      data: training and held-out text.
      seed: of the order of the data and of the sample.
      batch_size: sequences in a step.
      window: tokens predicted in each.
      evaluation: `windows, length, batch_size`, held-out windows at each evaluation.
      check: `batch_size, length`, a held-out batch on which the solvers are compared.
      sample: `prompt, length, temperature, top_k` of the text written at the end.

    Returns:
      The task.

    Raises:
      RunError: a number does not fit the data.
    """
    try:
        if "prompt" not in sample:
            raise ValueError(f"sample={dict(sample)}: expected prompt, length and the rest of them")
        rule = {name: value for name, value in sample.items() if name != "prompt"}
        check_generation(encode(sample["prompt"]), **rule)
        batches = data.batches(seed=seed, batch_size=batch_size, length=window)
    except ValueError as error:
        raise folders.RunError(str(error)) from error
    check_vocabulary(models.model, data)
    judged = cut_held_out(data, count=evaluation["windows"], length=evaluation["length"])
    checked = cut_held_out(data, count=check["batch_size"], length=check["length"])
    tokens = jnp.asarray(checked["tokens"], jnp.int32)
    score = bits_per_byte(
        models.model,
        judged,
        batch_size=evaluation["batch_size"],
        bytes_per_token=data.bytes_per_token,
    )
    rulers = baselines(data.validation)
    observe: Observe | None = None
    if models.observed is not None:
        observe = solver_check.observer(models.observed, tokens[:, :-1])

    def finish(folder: Path, params: Params, summary: dict[str, Any]) -> None:
        shape = f"{check['batch_size']} windows of {check['length']} tokens"
        summary["solvers"] = _compare(models, params, tokens, observe, shape)
        text = sample_text(models.model, params, seed=seed, tokenizer=data.tokenizer, **sample)
        write_text(folder / "sample.txt", text)
        print(f"--- a sample from {sample['prompt']!r} ---\n{text}\n---")
        where = f"{evaluation['windows']} windows of held-out files"
        tables.show_quality({"this model": summary[BITS]}, rulers, where=where)

    size = "" if data.train_bytes is None else f"{data.train_bytes:,} bytes to train on, "
    return Task(
        model=models.model,
        loss=loss_of(models.model),
        batches=batches,
        tokens_per_step=batch_size * window,
        batch_like=batch_like(judged, batch_size, window),
        columns=(BITS,),
        evaluate=lambda step, params: {BITS: score(params)},
        best=(BITS, "min"),
        describe=lambda values: f"validation {values[BITS]:.3f} bits/byte",
        finish=finish,
        about=f"{size}{len(data.validation):,} held out, from the {data.source}",
        summary={"parallel_solver": models.parallel_name, "baselines": rulers},
        bytes_per_token=data.bytes_per_token,
        tables={} if observe is None else {"solver": _solver_table(models, observe)},
    )


def cut_held_out(data: Data, *, count: int, length: int) -> dict[str, Any]:
    """Cuts windows of held-out text.

    Args:
      data: its validation text is cut.
      count: number of windows.
      length: tokens predicted in each.

    Returns:
      A batch.

    Raises:
      RunError: they do not fit.
    """
    check_tokens("windows", count, length)
    try:
        return dict(data.held_out(count=count, length=length))
    except ValueError as error:
        raise folders.RunError(f"held-out text: {error}") from error


def batch_like(judged: Mapping[str, Any], batch_size: int, window: int) -> dict[str, Any]:
    """Describes the shapes of a training batch.

    Args:
      judged: held-out windows, which have the same leaves.
      batch_size: sequences.
      window: tokens predicted in each.

    Returns:
      Shapes and dtypes by name.
    """
    extra = {name: leaf.shape[1] - judged["tokens"].shape[1] for name, leaf in judged.items()}
    return {
        name: jax.ShapeDtypeStruct((batch_size, window + 1 + extra[name]), leaf.dtype)
        for name, leaf in judged.items()
    }


def check_vocabulary(model: Model, data: Data) -> None:
    """Refuses a model whose vocabulary is too small.

    Args:
      model: a language model.
      data: the data that it reads.

    Raises:
      RunError: gives the size that is needed.
    """
    logits = jax.eval_shape(
        lambda key, tokens: model.apply(model.init(key), tokens),
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, 1), jnp.int32),
    )
    needed = data.tokenizer.vocab_size
    if logits.shape[-1] < needed:
        raise folders.RunError(
            f"model.vocab_size={logits.shape[-1]} is too small for the {needed} tokens of the "
            f"data: give model.vocab_size={needed}"
        )


def loss_of(model: Model) -> Loss:
    """Makes the next-token loss of windows or packed documents.

    Args:
      model: a language model.

    Returns:
      The loss of a batch of `Data`.
    """

    def loss(params, batch, key):
        return next_token_loss(reading(model, batch))(params, batch["tokens"], key)

    return loss


def _solver_table(models: Solved, observe: Observe) -> Table:
    def rows(params: Params) -> list[dict[str, Any]]:
        return [
            {"layer": layer, **{name: +value for name, value in solve.items()}}  # True becomes 1
            for layer, solve in enumerate(observe(params))
        ]

    def describe(rows: list[dict[str, Any]]) -> str:
        iterations = ", ".join(str(row["iterations"]) for row in rows)
        worst = max(row["residual"] for row in rows)
        return f"{models.parallel_name}: iterations {iterations}, residual {worst:.1e}"

    return Table(SOLVER_COLUMNS, rows, describe)


def _compare(
    models: Solved, params: Params, tokens: jax.Array, observe: Observe | None, shape: str
) -> list[dict[str, Any]]:
    if observe is None:
        print("no recurrent layer: there is no parallel solve to compare")
        return []
    print(f"comparing solvers on {shape}: they are compiled first", flush=True)
    rows = solver_check.compare(
        {"sequential": models.sequential, models.parallel_name: models.parallel},
        params,
        tokens,
        iterations=[solve["iterations"] for solve in observe(params)],
    )
    tables.show_solvers(rows, shape=shape)
    return rows
