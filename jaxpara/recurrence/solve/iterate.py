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


class Attempt(NamedTuple):
    """One evaluation of all steps.

    Attributes:
      exact: `[n]`, which of the values that were tried agree with their predecessors bit for bit.
        Where corrections bound something, without those behind a gap: closing it moves them.
      passing: `[n]`, which have a next correction within what is allowed. None where corrections
        bound nothing.
      corrected: the values to try next.
      kept: what else is wanted of the last attempt, such as the next corrections: any pytree.
    """

    exact: jax.Array
    passing: jax.Array | None
    corrected: Leaves
    kept: Any = ()


class Outcome(NamedTuple):
    """How the loop ended.

    Attributes:
      values: the ones that counted, corrected; or, without success, the ones tested last, of
        which the opening rows are corrected.
      done: whether they counted.
      used: attempts until then.
      opening: how many of the tested values hold before the first that does not.
      kept: of the last attempt.
    """

    values: Leaves
    done: jax.Array
    used: jax.Array
    opening: jax.Array
    kept: Any


def iterate(
    attempt: Callable[[Leaves, jax.Array], Attempt],
    values: Leaves,
    max_iters: int,
    like: Any,
    *,
    everywhere: Callable[[jax.Array], jax.Array],
    twice: bool = False,
) -> Outcome:
    """Repeats `attempt` until it is done or the budget is used up.

    What counts is corrected once more by the correction that proved it, so that its error is of
    second order. That correction is within rounding: it can spoil nothing, as products of Jacobians
    of 1e4 would do with an untested one. Values that hold no correction yet count by bitwise
    agreement only.

    Args:
      attempt: tests values and corrects them; given the values and the number of the attempt.
      values: to begin with.
      max_iters: the budget; at least one attempt is made.
      like: arrays that vary over the same mesh axes as the values.
      everywhere: the largest of a number on all devices that share the solve.
      twice: what a correction proves must be proved again behind that correction, which may have
        crossed a kink; for callers that do not test what they return themselves.
    """
    budget = max(1, max_iters)

    def body(carry):
        number, before, now = carry  # before: which rows held in the last attempt
        exact, passing, corrected, kept = attempt(now.values, number)
        holds = held = exact
        if passing is not None:
            held = exact | passing
            holds = exact | (held & (before if twice else number > 0))
        done = everywhere(jnp.any(~holds).astype(jnp.float32)) == 0
        # Without success the rows that hold are corrected all the same: others start from them.
        rows = jnp.arange(holds.shape[0]) < leading(holds)
        fix = ~now.done & (done | (number + 1 < budget) | rows)
        return (
            number + 1,
            held,
            Outcome(
                select(fix, corrected, now.values),
                now.done | done,
                jnp.where(now.done, now.used, now.used + 1),
                jnp.where(now.done, now.opening, leading(holds)),
                jax.tree.map(lambda old, new: jnp.where(now.done, old, new), now.kept, kept),
            ),
        )

    zero = jnp.zeros((), jnp.int32)
    values = list(values)
    shapes = jax.eval_shape(attempt, values, zero)
    kept = jax.tree.map(jnp.zeros_like, shapes.kept)
    fresh = Outcome(values, jnp.zeros((), bool), zero, zero, kept)
    none = vary_like(jnp.zeros(shapes.exact.shape, bool), like)
    _, _, end = lax.while_loop(
        lambda carry: any_lane(~carry[2].done) & (carry[0] < budget),
        body,
        (zero, none, vary_like(fresh, like)),
    )
    return end


def leading(ok: jax.Array) -> jax.Array:
    """How many hold before the first that does not."""
    return jnp.sum(jnp.cumprod(ok.astype(jnp.int32)), dtype=jnp.int32)
