"""Multiple shooting: the unknowns are the states at the starts of C time chunks.

Every chunk is rolled out through the true step from its guessed start while the
running product `P` of its Jacobians is carried along (all chunks side by side); the
starts are then corrected in delta form,

    s'[c+1] = e[c] + P[c] (s'[c] - s[c]),

a scan over C summaries, until every end `e[c]` meets the next start `s[c+1]`.
Starts before the first open boundary are frozen, so each iteration makes at least
one more chunk exact and C iterations always suffice. Oversized or non-finite
corrections are dropped. The iterate returned is the one that passed the test; what
a budget leaves open is completed sequentially. [shooting] [pararnn]
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.recurrence import jacobian, timeaxis
from jaxpara.recurrence.complete import complete
from jaxpara.recurrence.iterate import Attempt, iterate, leading
from jaxpara.recurrence.lanes import select, vary_like
from jaxpara.recurrence.system import (
    Leaves,
    Settings,
    Solution,
    System,
    magnitude,
    residuals,
    stall,
)

# Corrections beyond this multiple of the largest state are dropped. States that
# really grow along the sequence (counters) still gain this factor an iteration.
_CAP = 4.0


def plan(steps: int, requested: int | None) -> tuple[int, int]:
    """Chunk count and chunk length for `steps`, about a square root each by default.

    Short chunks cost iterations and long ones sequential steps; a count that divides
    `steps` needs no mask and is preferred when it is within a factor of two.
    """
    if requested is None:
        target = max(1.0, math.sqrt(steps) if steps >= 256 else steps / 16)
        exact = [c for c in range(1, steps + 1) if steps % c == 0 and 0.5 <= c / target <= 2]
        count = min(exact, key=lambda c: abs(math.log(c / target)), default=round(target))
    else:
        count = min(requested, steps)
    length = -(-steps // count)
    # Rounding the length up may leave whole chunks empty: drop them.
    return -(-steps // length), length


def cut(xs: Any, steps: int, count: int, length: int) -> Any:
    """`[steps, ...]` to `[length, count, ...]`; missing steps repeat the last input."""

    def one(x):
        missing = count * length - steps
        if missing:
            x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (missing, *x.shape[1:]))])
        return jnp.swapaxes(x.reshape(count, length, *x.shape[1:]), 0, 1)

    return jax.tree.map(one, xs)


def valid_steps(steps: int, count: int, length: int) -> jax.Array | None:
    """Mask `[length, count]` of the steps that exist, or None if all do."""
    if steps == count * length:
        return None
    return jnp.arange(count * length).reshape(count, length).T < steps


def shoot(
    system: System,
    settings: Settings,
    guess: Leaves | None = None,
    *,
    finish: Callable[..., tuple[Any, jax.Array]] = complete,
) -> Solution:
    """Solves `system` by multiple shooting.

    Args:
      system: the recurrence; its `xs` are the local shard if `settings.axis` is set.
      settings: `chunks` (per device), `tol`, `max_iters` and `axis` are used.
      guess: chunk starts `[chunks, *leaf]` of an earlier solve, or None.
      finish: does what the budget left open; of the type of `complete`. Only a study of
        unfinished solves gives another.

    Raises:
      ValueError: `guess` does not have one start a chunk.
    """
    count, length = plan(system.length, settings.chunks)
    xs = cut(system.xs, system.length, count, length)
    valid = valid_steps(system.length, count, length)
    axis = timeaxis.along(settings.axis, system.reverse)
    init = vary_like(list(system.init), system.xs)
    starts: Leaves = first_guess(init, guess, count, axis)

    def attempt(starts: Leaves) -> Attempt:
        ends, matrices = _rollout_with_product(system, starts, xs, valid)
        over, worst = residuals([e[:-1] for e in ends], [s[1:] for s in starts], init, settings.tol)
        cap = [_CAP * m for m in magnitude(ends)]
        shift = [jnp.zeros_like(e[0]) for e in ends]
        excess, opening, first = jnp.max(over, initial=0.0), leading(over <= 1), init
        if axis is not None:
            local = _chain(system.groups, ends, matrices, starts, opening, shift, cap)
            leaving = _leave(system.groups, ends, matrices, local, starts, cap)
            product = _product(matrices)
            first, excess, worst = timeaxis.across(
                axis,
                system.groups,
                init,
                settings.tol,
                cap,
                _chain,
                ends=[e[-1] for e in ends],
                leaving=leaving,
                product=product,
                firsts=[s[0] for s in starts],
                excess=excess,
                worst=worst,
            )
            shift = [f - s[0] for f, s in zip(first, starts, strict=True)]
        rest = _chain(system.groups, ends, matrices, starts, opening, shift, cap)
        corrected = [jnp.concatenate([f[None], r]) for f, r in zip(first, rest, strict=True)]
        return Attempt(excess, opening, worst, corrected)

    stalled = stall(init, settings.tol)
    end = iterate(attempt, starts, settings.max_iters, init, stalled=stalled)
    starts = end.values
    rows = _rollout(system, starts, xs, valid)
    rows, fallback = finish(
        system, rows, xs, valid, starts, end.done, end.opening, axis, (count, length)
    )
    states, ys = jax.tree.map(
        lambda r: r.reshape(count * length, *r.shape[2:])[: system.length], rows
    )
    return Solution(states, ys, end.done, end.used, end.residual, fallback, starts)


def first_guess(init, guess, count, axis) -> list[jax.Array]:
    """Chunk starts `[count, *leaf]`: the initial state everywhere, or `guess`."""
    if guess is None:
        return [jnp.broadcast_to(i, (count, *i.shape)) for i in init]
    for g, i in zip(guess, init, strict=True):
        if g.shape != (count, *i.shape):
            raise ValueError(
                f"guess has a leaf of shape {g.shape}; this solve has {count} chunks and expects "
                f"{(count, *i.shape)}: pass SolveInfo.starts of a call with the same length, "
                "chunks and state"
            )
    # The true initial state stands before the first step, whatever the guess says.
    exact = True if axis is None else axis.rank() == 0
    # A state that is not finite would have to be pushed out chunk by chunk.
    guess = [jnp.where(jnp.isfinite(g), g, i) for g, i in zip(guess, init, strict=True)]
    return [
        vary_like(g.astype(i.dtype).at[0].set(jnp.where(exact, i, g[0])), i)
        for g, i in zip(guess, init, strict=True)
    ]


def _hold(valid, new, old):
    return new if valid is None else select(valid, new, old)


def _rollout_with_product(system: System, starts: Leaves, xs: Any, valid):
    """Ends `[count, *leaf]` and Jacobian products `[count, K, K, N]` of all chunks."""
    count = starts[0].shape[0]
    unit = jacobian.basis(system.groups, [s[0] for s in starts])
    unit = [jnp.broadcast_to(u, (count, *u.shape)) for u in unit]

    def step(carry, inputs):
        states, products = carry
        x, present = inputs
        new, pushed = jax.vmap(system.push)(states, x, products)
        return (_hold(present, new, states), _hold(present, pushed, products)), None

    carry = (list(starts), vary_like(unit, starts))
    (ends, products), _ = lax.scan(step, carry, (xs, valid))
    matrices = jax.vmap(lambda *p: jacobian.gather_columns(system.groups, p))(*products)
    return ends, matrices


def _rollout(system: System, starts: Leaves, xs: Any, valid):
    """Trajectory and outputs of all chunks, `[count, length, ...]`."""

    def step(states, inputs):
        x, present = inputs
        new, ys = jax.vmap(system.step)(states, x)
        new = _hold(present, new, states)
        return new, (new, ys)

    _, rows = lax.scan(step, list(starts), (xs, valid))
    return jax.tree.map(lambda r: jnp.swapaxes(r, 0, 1), rows)


def _chain(groups, ends, matrices, starts, opening, shift, cap) -> list[jax.Array]:
    """Corrected starts of chunks 1 to C-1, given the `shift` of chunk 0's start."""
    rows = ends[0].shape[0]
    frozen = jnp.arange(rows - 1) < opening

    def link(delta, inputs):
        end, matrix, start, hold = inputs
        moved = _move(groups, matrix, delta, end, cap)
        base = select(hold, start, end)
        new = [b + m for b, m in zip(base, moved, strict=True)]
        return [n - s for n, s in zip(new, start, strict=True)], new

    inputs = ([e[:-1] for e in ends], [m[:-1] for m in matrices], [s[1:] for s in starts], frozen)
    shift = vary_like(list(shift), ends, starts)
    return lax.scan(link, shift, inputs)[1]


def _move(groups, matrix, delta, like, cap) -> list[jax.Array]:
    """`P delta`, with what is not finite or exceeds `cap` dropped (a Picard update)."""
    moved = jacobian.from_lanes(
        groups, jacobian.apply(matrix, jacobian.to_lanes(groups, delta)), like
    )
    return [
        jnp.where(jnp.abs(m) <= c, m, jnp.zeros_like(m)) for m, c in zip(moved, cap, strict=True)
    ]


def _leave(groups, ends, matrices, corrected, starts, cap) -> list[jax.Array]:
    """The corrected end of the last chunk, which the next device starts from."""
    if starts[0].shape[0] == 1:
        return [e[-1] for e in ends]
    delta = [c[-1] - s[-1] for c, s in zip(corrected, starts, strict=True)]
    end = [e[-1] for e in ends]
    moved = _move(groups, [m[-1] for m in matrices], delta, end, cap)
    return [e + m for e, m in zip(end, moved, strict=True)]


def _product(matrices: Leaves) -> list[jax.Array]:
    """Product of all chunks' Jacobians, the last chunk leftmost."""

    def multiply(total, matrix):
        return jacobian.multiply(matrix, total), None

    return lax.scan(multiply, [m[0] for m in matrices], [m[1:] for m in matrices])[0]
