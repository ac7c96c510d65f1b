"""Restarting the state inside a sequence: packed documents in one row."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxpara.recurrence.traced_scan import need_order


def with_reset(
    f: Callable[[Any, Any], tuple[Any, Any]], init: PyTree
) -> Callable[[Any, tuple[Any, Any]], tuple[Any, Any]]:
    """Makes a step that starts again from `init` wherever `reset_t` is true.

        h_t, y_t = f(init if reset_t else h_{t-1}, x_t)

    Use it with any scan: `jp.newton_scan(jp.with_reset(f, init), init, (reset, xs))`.
    Gradients reach `init` from every restart, and none crosses one.

    Args:
      f: the step, as for `lax.scan`.
      init: the state to restart from, with the carry's structure and shapes.

    Returns:
      A step over `(reset_t, x_t)`. `reset_t` is boolean: a scalar, or with leading
      batch axes that it shares with every leaf of the carry.

    Raises:
      TypeError: `f` and `init` are in each other's place; `reset` is not boolean.
      ValueError: the shape of `reset` does not lead the carry's.
    """
    need_order(f, init, "with_reset(step, init)")

    def step(carry, inputs):
        reset, x = inputs
        reset = jnp.asarray(reset)
        if reset.dtype != jnp.bool_:
            raise TypeError(f"reset has dtype {reset.dtype}; expected bool, one flag a step")

        def one(start, leaf):
            leaf = jnp.asarray(leaf)
            if leaf.shape[: reset.ndim] != reset.shape:
                raise ValueError(
                    f"reset has shape {reset.shape} at one step; a carry leaf has shape "
                    f"{leaf.shape}, which does not begin with it"
                )
            flag = reset.reshape(reset.shape + (1,) * (leaf.ndim - reset.ndim))
            return jnp.where(flag, jnp.asarray(start).astype(leaf.dtype), leaf)

        return f(jax.tree.map(one, init, carry), x)

    return step
