"""The loop of every parallel solver: attempt, test, correct, within a budget.

What counts as solved is the rule of `pallas_kernels.certificate`: bitwise agreement, or, where the
Jacobian is proved, a small next correction of values that are corrected already. Lanes (see
`lanes`) run side by side until the last one is done; a lane that is done keeps its values and its
counts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.recurrence.lanes import any_lane, select, vary_like
from jaxpara.recurrence.system import Leaves
from pallas_kernels import certificate


class Attempt(NamedTuple):
    """One evaluation of all steps.

    Attributes:
      exact: `[n]`, which of the values that were tried agree with their predecessors bit for bit.
      excess: `[n]`, how far their next corrections exceed what is allowed: up to 1 they pass.
        None where corrections bound nothing.
      residual: the largest, on all devices.
      corrected: the values to try next.
      deltas: what is wanted of the last attempt besides, such as the next corrections.
    """

    exact: jax.Array
    excess: jax.Array | None
    residual: jax.Array
    corrected: Leaves
    deltas: Leaves = ()


class Outcome(NamedTuple):
    """How the loop ended.

    Attributes:
      values: the ones that were tested last.
      done: whether the values passed.
      used: attempts until then.
      excess: of that attempt, the largest on all devices; infinite for the first one.
      opening: how many of the values hold before the first that does not.
      residual, deltas: of that attempt.
    """

    values: Leaves
    done: jax.Array
    used: jax.Array
    excess: jax.Array
    opening: jax.Array
    residual: jax.Array
    deltas: Leaves


def iterate(
    attempt: Callable[[Leaves], Attempt],
    values: Leaves,
    max_iters: int,
    like: Any,
    *,
    tol: float | None = None,
    everywhere: Callable[[jax.Array], jax.Array] = lambda flag: flag,
) -> Outcome:
    """Repeats `attempt` until it is done or the budget is used up.

    Args:
      attempt: tests values and corrects them.
      values: to begin with: a guess, which counts as solved by bitwise agreement alone.
      max_iters: the budget; at least one attempt is made.
      like: arrays that vary over the same mesh axes as the values.
      tol: as in `Settings`.
      everywhere: the largest of a number on all devices that share the solve.
    """
    budget = max(1, max_iters)
    stalled = stall(values, tol)

    def body(carry):
        number, now = carry
        exact, units, residual, corrected, deltas = attempt(now.values)
        open_ = everywhere(jnp.any(~exact).astype(jnp.float32))
        excess, holds = jnp.where(open_ > 0, jnp.inf, 0.0), exact
        if units is not None:
            near = everywhere(jnp.max(units, initial=0.0))
            excess = jnp.where((number > 0) & (open_ > 0), near, excess)
            holds = exact | ((number > 0) & (units <= 1))
        done = (excess <= 1) | (jnp.maximum(excess, now.excess) <= stalled)
        # The values that are returned must be the ones that were tested: products of
        # Jacobians of 1e4 would turn a passing correction into a visible error.
        keep = now.done | done | (number + 1 >= budget)
        return number + 1, Outcome(
            select(keep, now.values, corrected),
            now.done | done,
            jnp.where(now.done, now.used, now.used + 1),
            jnp.where(now.done, now.excess, excess),
            jnp.where(now.done, now.opening, leading(holds)),
            jnp.where(now.done, now.residual, residual),
            select(now.done, now.deltas, deltas),
        )

    zero, nothing = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    values = list(values)
    deltas = [jnp.zeros_like(v) for v in jax.eval_shape(attempt, values).deltas]
    fresh = Outcome(
        values, jnp.zeros((), bool), zero, nothing + jnp.inf, zero, nothing, deltas
    )
    _, end = lax.while_loop(
        lambda carry: any_lane(~carry[1].done) & (carry[0] < budget),
        body,
        (zero, vary_like(fresh, like)),
    )
    return end


def stall(leaves: Leaves, tol: float | None) -> float:
    """Excess up to which two corrections in a row are taken for the work of rounding."""
    coarse = max((leaf.dtype for leaf in leaves), key=lambda dtype: float(jnp.finfo(dtype).eps))
    accept, stalled = certificate.limits(coarse, tol)
    return stalled / accept if accept else 0.0


def leading(ok: jax.Array) -> jax.Array:
    """How many hold before the first that does not."""
    return jnp.sum(jnp.cumprod(ok.astype(jnp.int32)), dtype=jnp.int32)
