"""One training step and the state it carries: pure, and made of a loss and an optimiser."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpara.arguments import need_loss, need_model, need_optimizer
from jaxpara.sizes import positive
from jaxpara.tree import combine, split
from jaxpara.types import Key, Loss, Model, Params, Step, TrainState

Trainable = Callable[[Params], Any]
"""From parameters to booleans in their structure, as `t.trainable` of a reparameterisation."""


def _every(params: Params) -> Any:
    return jax.tree.map(lambda leaf: True, params)


def init_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    key: Key,
    *,
    trainable: Trainable = _every,
) -> TrainState:
    """Makes fresh parameters, optimiser state, step 0, and a key for the steps to draw from.

    Args:
      model: its `init` makes the parameters.
      optimizer: any optax transformation.
      key: split for the parameters and for the steps.
      trainable: as for `make_step`; the optimiser keeps nothing for the other parameters.

    Returns:
      The state that `make_step`'s function takes. Its arrays are its own, so that it may be
      donated.

    Raises:
      TypeError: `model` is no `Model`, or `optimizer` none of optax.
    """
    call = "init_state(model, optimizer, key)"
    need_model(model, call)
    need_optimizer(optimizer, call)
    k_params, k_steps = jax.random.split(key)
    params = model.init(k_params)
    train, _ = split(params, trainable(params))
    return TrainState(params, optimizer.init(train), jnp.zeros((), jnp.int32), k_steps)


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    project: Callable[[Params], Params] | None = None,
    trainable: Trainable = _every,
) -> Step:
    """Makes a training step: gradient, update, projection.

    With `accumulate` the batch is cut into that many equal parts, whose gradients are averaged
    in a scan: the gradient of the whole batch in the memory of one part, exactly so if the loss
    is a mean over the batch. The key of step i is `fold_in(state.key, i)`.

    Args:
      loss: `(params, batch, key) -> (scalar, metrics)`.
      optimizer: any optax transformation.
      accumulate: number of parts; must divide the leading axis of every leaf of the batch.
      project: applied to the parameters after the update, e.g.
        `jaxpara.cells.clip_recurrent(0.5)`; None leaves them.
      trainable: `params -> booleans` in their structure, e.g. `t.trainable` of a
        reparameterisation. No gradient is taken of the other parameters, which may be integers.

    Returns:
      `step(state, batch) -> (state, metrics)`, not jitted: jit it with `donate_argnums=0`. The
      metrics are those of the loss, and `grad_norm` before any clipping.

    Raises:
      TypeError: `loss` is no function, or `optimizer` none of optax.
      ValueError: if `accumulate` is not positive; from the step, if it does not divide a batch.
    """
    need_loss(loss)
    need_optimizer(optimizer, "make_step(loss, optimizer)")
    positive(accumulate=accumulate)

    def gradient(params, frozen, batch, key):
        def whole(train, batch, key):
            return loss(combine(train, frozen), batch, key)

        value_and_grad = jax.value_and_grad(whole, has_aux=True)
        if accumulate == 1:
            (_, metrics), grads = value_and_grad(params, batch, key)
            return grads, metrics

        def cut(leaf):
            if leaf.shape[0] % accumulate:
                raise ValueError(
                    f"accumulate={accumulate} does not divide the batch of {leaf.shape[0]}: "
                    f"use a batch of {max(leaf.shape[0] // accumulate, 1) * accumulate}, "
                    "or another accumulate"
                )
            return leaf.reshape(accumulate, leaf.shape[0] // accumulate, *leaf.shape[1:])

        def part(total, xs):
            number, piece = xs
            (_, metrics), grads = value_and_grad(params, piece, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, total, (grads, metrics)), None

        parts = (jnp.arange(accumulate), jax.tree.map(cut, batch))
        first = jax.tree.map(lambda leaf: leaf[0], parts[1])
        (_, metrics), grads = jax.eval_shape(value_and_grad, params, first, key)
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (grads, metrics))
        total, _ = jax.lax.scan(part, zero, parts)
        return jax.tree.map(lambda leaf: leaf / accumulate, total)

    def step(state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        train, frozen = split(state.params, trainable(state.params))
        grads, metrics = gradient(train, frozen, batch, key)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, train)
            params = combine(optax.apply_updates(train, updates), frozen)
            if project is not None:
                params = project(params)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
        metrics = {**metrics, "grad_norm": norm}
        return TrainState(params, opt_state, state.step + 1, state.key), metrics

    return step
