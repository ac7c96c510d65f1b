"""The loop of every parallel solver: attempt, test, correct, within a budget.

Lanes (see `lanes`) run side by side until the last one is done; a lane that is done
keeps its values and its counts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.recurrence.lanes import any_lane, select, vary_like
from jaxpara.recurrence.system import Leaves


class Attempt(NamedTuple):
    """One evaluation of all steps.

    Attributes:
      excess: the largest residual of the values that were tried, on all devices, in units of what
        is allowed: up to 1 all pass.
      opening: how many of them hold before the first that does not.
      residual: the largest.
      corrected: the values to try next.
    """

    excess: jax.Array
    opening: jax.Array
    residual: jax.Array
    corrected: Leaves


class Outcome(NamedTuple):
    """How the loop ended.

    Attributes:
      values: the ones that were tested last.
      done: whether they passed.
      used: attempts until then.
      excess, opening, residual: of that attempt.
    """

    values: Leaves
    done: jax.Array
    used: jax.Array
    excess: jax.Array
    opening: jax.Array
    residual: jax.Array


def iterate(
    attempt: Callable[[Leaves], Attempt],
    values: Leaves,
    max_iters: int,
    like: Any,
    *,
    stalled: float = 1.0,
) -> Outcome:
    """Repeats `attempt` until it is done or the budget is used up.

    Args:
      attempt: tests values and corrects them.
      values: to begin with.
      max_iters: the budget; at least one attempt is made.
      like: arrays that vary over the same mesh axes as the values.
      stalled: two attempts in a row with an excess up to this are done as well, see `system.stall`.
    """
    budget = max(1, max_iters)

    def body(carry):
        number, now = carry
        excess, opening, residual, corrected = attempt(now.values)
        done = (excess <= 1) | (jnp.maximum(excess, now.excess) <= stalled)
        # The values that are returned must be the ones that were tested: products of
        # Jacobians of 1e4 would turn a passing residual into a visible error.
        keep = now.done | done | (number + 1 >= budget)
        return number + 1, Outcome(
            select(keep, now.values, corrected),
            now.done | done,
            jnp.where(now.done, now.used, now.used + 1),
            jnp.where(now.done, now.excess, excess),
            jnp.where(now.done, now.opening, opening),
            jnp.where(now.done, now.residual, residual),
        )

    zero, nothing = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    fresh = Outcome(list(values), jnp.zeros((), bool), zero, nothing + jnp.inf, zero, nothing)
    _, end = lax.while_loop(
        lambda carry: any_lane(~carry[1].done) & (carry[0] < budget),
        body,
        (zero, vary_like(fresh, like)),
    )
    return end


def leading(ok: jax.Array) -> jax.Array:
    """How many boundaries hold before the first that does not."""
    return jnp.sum(jnp.cumprod(ok.astype(jnp.int32)), dtype=jnp.int32)
