"""State tracking as a Task: trained at one length, tested at longer ones, stopped when solved."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.data.batches import by_step
from experiments.run import metrics
from experiments.run.memory import check_tokens
from experiments.run.task import Task
from experiments.tasks.answers import answer_loss, first_answers, judge
from experiments.tasks.problem import Examples, Problem, sample
from jaxpara.types import Model, Params

POSITION_COLUMNS = ("length", "position", "accuracy")


def state_tracking(
    *,
    model: Model,
    problem: Problem,
    vocab_size: int,
    seed: int,
    batch_size: int,
    length: int,
    test_lengths: Sequence[int],
    test_sequences: int,
    grow_steps: int = 0,
    grow_from: int = 4,
) -> Task:
    """Makes the task of solving a synthetic problem at every length.

    Args:
      model: from tokens `[batch, length]` to logits over answers.
      problem: from which examples are drawn.
      vocab_size: of the model; at least the problem's.
      seed: of the order of the examples.
      batch_size: sequences in a step.
      length: of the training sequences.
      test_lengths: of the held-out ones.
      test_sequences: held out, of each length; the same ones for every seed.
      grow_steps: a curriculum: over this number of steps the counted answers grow from the first
        `grow_from` positions to the whole length; 0: all count from the start.
      grow_from: see `grow_steps`.

    Returns:
      The task. Its figures are `accuracy_32` (the share of right answers over all positions of
      length 32) and `last_32` (over the last answer of each sequence), for each length; it is
      solved when every accuracy is 1.

    Raises:
      ValueError: the vocabulary is too small, a length too short, or there is no test.
    """
    if vocab_size < problem.vocab_size:
        raise ValueError(
            f"task.vocab_size={vocab_size}: {problem.name} has {problem.vocab_size} tokens; "
            f"give task.vocab_size={problem.vocab_size}"
        )
    if not test_lengths or test_sequences < 1:
        raise ValueError(
            f"task.test_lengths={list(test_lengths)}, task.test_sequences={test_sequences}: "
            "give at least one length and one sequence"
        )

    def draw(number: int, sequences: int = batch_size):
        examples = sample(problem, seed=seed, step=number, batch_size=sequences, length=length)
        if number >= grow_steps:
            return examples
        return first_answers(examples, grow_from + (length - grow_from) * number // grow_steps)

    one = draw(0, 1)  # raises errors before anything is compiled
    check_tokens("task.test_sequences", test_sequences, max(test_lengths))
    profile = judge(model, problem, lengths=test_lengths, sequences=test_sequences)
    accuracies = [f"accuracy_{n}" for n in test_lengths]
    last = [f"last_{n}" for n in test_lengths]

    def evaluate(step: int, params: Params) -> dict[str, float]:
        del step
        return {name: value for p in profile(params) for name, value in p.figures().items()}

    def describe(figures: Mapping[str, float]) -> str:
        shown = (f"{figures[f'accuracy_{n}']:.1%} at T={n}" for n in test_lengths)
        return f"accuracy {', '.join(shown)}"

    def finish(folder: Path, params: Params, summary: dict[str, Any]) -> None:
        table = folder / "positions.csv"
        table.unlink(missing_ok=True)  # of a run that was resumed after its last step
        metrics.start(table, POSITION_COLUMNS)
        for one in profile(params):
            for position, value in enumerate(one.by_position(), start=1):
                row = {"length": one.length, "position": position}
                if not np.isnan(value):
                    row["accuracy"] = value
                metrics.append(table, row)
            summary.update(one.figures())

    return Task(
        model=model,
        loss=answer_loss(model),
        batches=by_step(draw),
        tokens_per_step=batch_size * length,
        batch_like=Examples(
            *(jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype) for x in one)
        ),
        columns=(*accuracies, *last),
        evaluate=evaluate,
        best=(f"accuracy_{max(test_lengths)}", "max"),
        describe=describe,
        finish=finish,
        about=f"{problem.name}, trained at length {length}, tested at "
        f"{', '.join(map(str, test_lengths))}",
        summary={"problem": problem.name},
        solved=lambda figures: all(figures[name] == 1 for name in accuracies),
    )
