"""Loss and accuracy for problems with an answer, or none, at each position."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from experiments.tasks.problem import Examples, Problem, sample
from jaxpara.types import Loss, Model, Params

_JUDGE = 987_654_321  # seed of the held-out examples, the same for runs of every seed


def answer_loss(model: Model) -> Loss:
    """Makes the mean cross entropy over the positions that have an answer.

    Args:
      model: from tokens to logits over answers.

    Returns:
      `loss(params, examples, key) -> (nats, {"loss", "accuracy"})`; the key is not used.
    """

    def loss(params, batch, key):
        del key
        tokens, targets, mask = batch
        logits = model.apply(params, tokens)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        count = jnp.maximum(jnp.sum(mask), 1)
        mean = jnp.sum(jnp.where(mask, nats, 0.0)) / count
        right = (jnp.argmax(logits, -1) == targets) & mask
        return mean, {"loss": mean, "accuracy": jnp.sum(right) / count}

    return loss


def correct(
    model: Model,
    params: Params,
    tokens: Int[Array, "batch time"],
    targets: Int[Array, "batch time"],
) -> Bool[Array, "batch time"]:
    """Whether the likeliest answer is the right one, position by position."""
    return jnp.argmax(model.apply(params, tokens), -1) == targets


def last_answers(mask: Bool[np.ndarray, "batch time"]) -> Bool[np.ndarray, "batch time"]:
    """Masks the last answer of every sequence that has one.

    Args:
      mask: where answers are.

    Returns:
      A mask with at most one position in a row.
    """
    later = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
    return mask & (later == 1)


class Profile(NamedTuple):
    """The answers to held-out sequences of one length.

    Attributes:
      length: tokens in each.
      hit: bool `[sequences, length]`, where the answer was right.
      mask: where there is an answer.
    """

    length: int
    hit: np.ndarray
    mask: np.ndarray

    def figures(self) -> dict[str, float]:
        """The share of right answers over all positions, and over the last of each sequence."""
        return {
            f"accuracy_{self.length}": share(self.hit, self.mask),
            f"last_{self.length}": share(self.hit, last_answers(self.mask)),
        }

    def by_position(self) -> Float[np.ndarray, " time"]:
        """The share of right answers at each position; NaN if there are none."""
        count = self.mask.sum(axis=0)
        return np.where(count, (self.hit & self.mask).sum(axis=0) / np.maximum(count, 1), np.nan)


def judge(
    model: Model, problem: Problem, *, lengths: Sequence[int], sequences: int, batch_size: int = 64
) -> Callable[[Params], list[Profile]]:
    """Makes a function that answers held-out sequences of several lengths.

    Args:
      model: from tokens to logits.
      problem: its held-out sequences are drawn once, the same for every run.
      lengths: of the sequences.
      sequences: of each length.
      batch_size: of one call of the model.

    Returns:
      `params -> profiles`, one for each length.

    Raises:
      ValueError: a length is too short for the problem.
    """
    drawn = [
        sample(problem, seed=_JUDGE, step=0, batch_size=sequences, length=length, held_out=True)
        for length in lengths
    ]
    right = jax.jit(functools.partial(correct, model))

    def score(params: Params) -> list[Profile]:
        profiles = []
        for examples in drawn:
            tokens, targets, mask = examples
            cuts = [slice(i, i + batch_size) for i in range(0, sequences, batch_size)]
            hit = [right(params, tokens[cut], targets[cut]) for cut in cuts]
            profiles.append(Profile(tokens.shape[1], np.concatenate(hit), mask))
        return profiles

    return score


def share(hit: Bool[np.ndarray, "batch time"], mask: Bool[np.ndarray, "batch time"]) -> float:
    """The share of the masked positions that are right; NaN without any."""
    return float(hit[mask].mean()) if mask.any() else float("nan")


def first_answers(examples: Examples, positions: int) -> Examples:
    """Hides the answers after a number of positions: a shorter length in the same shape.

    A causal model learns the same as from sequences cut there, without compiling every length of a
    curriculum.

    Args:
      examples: of full length.
      positions: how many keep their answers.

    Returns:
      The examples with another mask.
    """
    kept = np.arange(examples.mask.shape[1]) < positions
    return examples._replace(mask=examples.mask & kept)
