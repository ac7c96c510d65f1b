"""The optimiser of the experiments: AdamW with warm-up, cosine decay and clipping."""

from collections.abc import Callable

import jax
import optax

from jaxpara.sizes import finite, positive
from jaxpara.types import Params


def decay_mask(params: Params) -> Params:
    """True for the leaves named `kernel`: matrices, but not embeddings, norms or recurrences.

    Names decide, not the number of axes: the layers of a decoder are stacked, and a vector then
    has two axes.

    Args:
      params: any pytree; names are dict keys or attribute names.

    Returns:
      A pytree of booleans of the same structure, for the `mask` of an optax weight decay.

    References: [adamw].
    """

    def is_kernel(path, leaf):
        del leaf
        names = [getattr(step, "key", getattr(step, "name", None)) for step in path]
        while names and names[-1] == "base":
            names.pop()
        return names[-1:] == ["kernel"]

    return jax.tree_util.tree_map_with_path(is_kernel, params)


def schedule(
    learning_rate: float, steps: int, *, warmup: float = 0.05, floor: float = 0.03
) -> optax.Schedule:
    """Linear from 0 to the peak, then half a cosine down to a fraction of it.

    Args:
      learning_rate: the peak.
      steps: length of the whole run.
      warmup: fraction of the steps that rises.
      floor: the rate at the end, as a fraction of the peak.

    Returns:
      `step number -> learning rate`.

    Raises:
      ValueError: if `steps` is not positive, the rate not finite, or a fraction not in [0, 1].
    """
    positive(steps=steps)
    learning_rate = finite(learning_rate=learning_rate)
    for name, value in {"warmup": warmup, "floor": floor}.items():
        if not 0 <= finite(**{name: value}) <= 1:
            raise ValueError(f"{name}={value} is a fraction: give a number from 0 to 1")
    rising = max(round(warmup * steps), 1)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=rising,
        # optax counts the rising steps in, and wants at least one that falls.
        decay_steps=max(steps, rising + 1),
        end_value=floor * learning_rate,
    )


def optimizer(
    *,
    learning_rate: float = 6e-3,
    steps: int,
    warmup: float = 0.05,
    floor: float = 0.03,
    weight_decay: float = 0.05,
    b1: float = 0.9,
    b2: float = 0.98,
    clip: float = 1.0,
    mask: Callable[[Params], Params] = decay_mask,
) -> optax.GradientTransformation:
    """AdamW after a clip of the global norm, with a rate that warms up and then follows a cosine.

    Args:
      learning_rate: the peak of the schedule.
      steps: length of the whole run, which the schedule is stretched over.
      warmup: fraction of the steps that rises.
      floor: the rate at the end, as a fraction of the peak.
      weight_decay: decoupled decay, times the learning rate, of the masked leaves.
      b1: decay of the mean of gradients.
      b2: decay of the mean of their squares.
      clip: largest global norm of the gradient.
      mask: from the parameters to booleans that say which leaves decay.

    Returns:
      An optax transformation.

    Raises:
      ValueError: if `steps`, the rate, a fraction, or `clip` is out of range.

    References: [adamw].
    """
    if not clip > 0:
        raise ValueError(f"clip={clip} must be positive; use float('inf') for no clipping")
    rate = schedule(learning_rate, steps, warmup=warmup, floor=floor)
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=mask),
    )
