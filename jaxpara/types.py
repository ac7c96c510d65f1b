"""The seams: the function types that the wings exchange.

Nothing here has behaviour. A solver has the type of `lax.scan`, an optimiser is
optax's, and a model is a NamedTuple of pure functions, so that everything that
knows these types also works with code that never heard of jaxpara.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
"""An array of a user, who may hold it in NumPy."""

Params = Any
Carry = Any
Key = jax.Array


class Model(NamedTuple):
    """A pure-function model.

    Attributes:
      init: `key -> params`.
      apply: `(params, *inputs) -> outputs`; for a sequence model the inputs are
        `tokens[batch, time]` and it equals `run` from `start`.
      start: `(params, batch_size, max_length) -> state`; sequence models only.
      run: `(params, state, tokens) -> (state, outputs)`; sequence models only.
      inputs: arrays or shapes that `apply` takes after the parameters, if the model knows some: for
        what looks at its jaxpr before there are data, as a reparameterisation does.

    Laws of a sequence model: `run` over `a ++ b` equals `run` over `a`, then over
    `b`; `apply` equals `run` from `start`; decoding is `run` on one token.
    """

    init: Callable[..., Params]
    apply: Callable[..., Any]
    start: Callable[..., Any] | None = None
    run: Callable[..., Any] | None = None
    inputs: tuple[Any, ...] | None = None


class Cell(NamedTuple):
    """One recurrent cell, split where the matmul over all time steps is hoisted.

    Attributes:
      init: `key -> params`.
      start: `(params, batch_shape) -> carry`.
      project: `(params, x[..., features]) -> projected`, independent of the carry
        and therefore applied to all time steps at once.
      step: `(params, carry, projected_t) -> (carry, y_t)`, only the recurrence.
    """

    init: Callable[[Key], Params]
    start: Callable[[Params, tuple[int, ...]], Carry]
    project: Callable[[Params, Any], Any]
    step: Callable[[Params, Carry, Any], tuple[Carry, Any]]


class TrainState(NamedTuple):
    """What a training step carries: parameters, optimiser state, step number, key."""

    params: Params
    opt_state: Any
    step: jax.Array
    key: Key


@runtime_checkable
class Scan(Protocol):
    """Exactly `lax.scan`: the type of every solver once its data are given."""

    def __call__(
        self,
        f: Callable[[Carry, Any], tuple[Carry, Any]],
        init: Carry,
        xs: Any = None,
        length: int | None = None,
        reverse: bool = False,
        unroll: int | bool = 1,
    ) -> tuple[Carry, Any]: ...


Transform = Callable[[Model], Model]
Loss = Callable[[Params, Any, Key], tuple[jax.Array, dict[str, jax.Array]]]
Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
