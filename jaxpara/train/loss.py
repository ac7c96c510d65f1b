"""The loss and the evaluation of a sequence model: nats for each next token."""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Integer

from jaxpara.arguments import need_model
from jaxpara.types import AnyArray, Key, Loss, Model, Params


def _nats(
    model: Model,
    params: Params,
    windows: Integer[AnyArray, "batch time_plus_one"],
    key: Key | None = None,
) -> Float[Array, "batch time"]:
    """`-log p(token_{t+1} | tokens up to t)` at every position of every window."""
    if windows.ndim != 2 or windows.shape[1] < 2:
        raise ValueError(
            f"windows have shape {windows.shape}; give [batch, time + 1] tokens, at least two "
            "in a row: the last ones are targets only"
        )
    options = {} if key is None else {"key": key}
    logits = model.apply(params, windows[:, :-1], **options)
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])


def next_token_loss(model: Model) -> Loss:
    """Mean cross entropy of the next token: `-mean_t log p(x_{t+1} | x_1 .. x_t)`.

    Args:
      model: a sequence model with logits as outputs.

    Returns:
      `loss(params, windows[batch, time + 1], key) -> (nats, metrics)`, with the metrics
      `loss` (nats for each token) and `bits_per_token`. The key goes to a model whose `apply` has
        a `key=`, as reparameterised ones have for dropout and stochastic rounding.

    Raises:
      TypeError: `model` is no `Model`.
      ValueError: from the loss, if windows are not `[batch, time + 1]` with time positive.
    """

    need_model(model, "next_token_loss(model)")
    random = "key" in inspect.signature(model.apply).parameters

    def loss(params, windows, key):
        mean = jnp.mean(_nats(model, params, windows, key if random else None))
        return mean, {"loss": mean, "bits_per_token": mean / jnp.log(2.0)}

    return loss


def evaluate(
    model: Model,
) -> Callable[[Params, Integer[AnyArray, "batch time_plus_one"]], dict[str, jax.Array]]:
    """Sums over windows, each read from the start state, so that batches can be added up.

    Bits for each token are `nats / tokens / log(2)`, once everything is summed.

    Args:
      model: a sequence model with logits as outputs.

    Returns:
      `(params, windows[batch, time + 1]) -> {"nats", "tokens"}`: the summed cross entropy of
      every token but the first of each window, and their number.

    Raises:
      TypeError: `model` is no `Model`.
      ValueError: from that function, if windows are not `[batch, time + 1]` with time positive.
    """

    need_model(model, "evaluate(model)")

    def totals(params, windows):
        nats = _nats(model, params, windows)
        return {"nats": jnp.sum(nats), "tokens": jnp.asarray(nats.size)}

    return totals
