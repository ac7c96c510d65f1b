"""Multiple shooting: the unknowns are the states at the starts of C time chunks.

Every chunk is rolled out through the true step from its guessed start while the
running product `P` of its Jacobians is carried along (all chunks side by side); the
starts are then corrected in delta form,

    s'[c+1] = e[c] + P[c] (s'[c] - s[c]),

a scan over C summaries, until the next corrections are within rounding or every end
`e[c]` meets the next start `s[c+1]` bit for bit (see `pallas_kernels.certificate`).
An exact start with an exact predecessor stays as it is, so each iteration makes at
least one more chunk exact and C iterations always suffice. Oversized or non-finite
corrections are dropped. Starts that pass are corrected once more; the trajectory from
them is returned and certified in turn. What is open is completed sequentially, from the
chunk before the first open one.
[shooting], [pararnn]
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.recurrence.lanes import select, vary_like
from jaxpara.recurrence.solve import (
    chunk_links,
    earlier_sizes,
    jacobian_products,
    sharded_time,
)
from jaxpara.recurrence.solve.certified import (
    below,
    beside,
    carrying,
    exact,
    limit,
    magnitude,
    residual,
    scales,
    tested,
)
from jaxpara.recurrence.solve.complete import complete
from jaxpara.recurrence.solve.iterate import Attempt, iterate, leading
from jaxpara.recurrence.system import Leaves, Settings, Solution, System
from pallas_kernels import certificate


def plan(steps: int, requested: int | None) -> tuple[int, int]:
    """Chunk count and chunk length for `steps`, about a square root each by default.

    Short chunks cost iterations and long ones sequential steps; a count that divides
    `steps` needs no mask and is preferred when it is within a factor of two.
    """
    if requested is None:
        target = max(1.0, math.sqrt(steps) if steps >= 256 else steps / 16)
        even = [c for c in range(1, steps + 1) if steps % c == 0 and 0.5 <= c / target <= 2]
        count = min(even, key=lambda c: abs(math.log(c / target)), default=round(target))
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


class Kept(NamedTuple):
    """What the last attempt leaves to the check of what is returned.

    Attributes:
      carried: what corrections are multiplied by.
      errors: the corrections of the starts, infinite where one was dropped.
      scale: the magnitudes that they are relative to.
      products: of the Jacobians, on all sides of the states; none where corrections bound nothing.
    """

    carried: jax.Array
    errors: Leaves
    scale: Leaves
    products: Sequence[Leaves]


def shooting(
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
    axis = sharded_time.along(settings.axis, system.reverse)
    init = vary_like(list(system.init), system.xs)
    starts: Leaves = first_guess(init, guess, count, axis)

    def before(ends: Leaves) -> Leaves:
        """What the starts should be."""
        return sharded_time.preceding(axis, init, ends)

    def everywhere(number: jax.Array) -> jax.Array:
        return number if axis is None else jnp.max(axis.gather(number))

    def correct(
        ends: Leaves, matrices: Leaves, starts: Leaves, carried: jax.Array
    ) -> tuple[Leaves, Leaves]:
        """The next corrections of the starts, infinite where one was dropped; and the starts."""
        cap = [certificate.CAP * everywhere(m) for m in magnitude(ends)]
        chain = functools.partial(chunk_links.chain, carried=carried)
        first, lost = init, jnp.zeros((), bool)
        if axis is not None:
            device = chunk_links.leaving(system.groups, ends, matrices, starts, cap, carried)
            first, lost = sharded_time.first(axis, system.groups, init, cap, chain, *device, starts)
        deltas, corrected = chain(system.groups, ends, matrices, starts, first, cap)
        return [d.at[0].set(jnp.where(lost, jnp.inf, d[0])) for d in deltas], corrected

    def attempt(values: Leaves, number: jax.Array) -> Attempt:
        starts, lately = values[:leaves], values[leaves:]
        near = beside(system, starts, lately, number, settings.tol)
        ends, peaks, products = _rollout_with_product(system, starts, near, xs, valid)
        scale = scales(before(peaks), before(ends), init)
        if lately:  # what a state may be off must be less than what it was moved by
            allowed = [jnp.minimum(s, z) for s, z in zip(scale, lately, strict=True)]
        else:
            allowed = scale
        carried = carrying(ends, everywhere)
        deltas, corrected = correct(ends, products[0], starts, carried)
        agreed, within = agreeing(ends, starts), None
        if system.certain:
            sides = [deltas, *(correct(ends, p, starts, carried)[0] for p in products[1:])]
            within = proved(ends, starts, sides, allowed, carried)
        kept = Kept(carried, deltas, scale, products if system.certain else [])
        return Attempt(agreed, within, [*corrected, *(scale if lately else [])], kept)

    def proved(
        ends: Leaves, starts: Leaves, sides: list[Leaves], scale: Leaves, carried: jax.Array
    ) -> jax.Array:
        """`[chunks]`, which corrections are within the limit, on all sides of the states."""
        return _passing(before(ends), starts, sides, scale, settings.tol, carried)

    def agreeing(ends: Leaves, starts: Leaves) -> jax.Array:
        """`[chunks]`, which agree bit for bit, as do all before them.

        Behind a gap agreement says nothing: where the gap is closed, ends and starts move.
        """
        same = exact(before(ends), starts)
        if axis is None:
            return jnp.cumprod(same.astype(jnp.int32)) == 1
        return same & (everywhere(jnp.any(~same).astype(jnp.float32)) == 0)

    def upheld(
        rows: Leaves,
        ends: Leaves,
        peaks: Leaves,
        starts: Leaves,
        products: Sequence[Leaves],
        carried: jax.Array,
        meets: jax.Array,
    ) -> jax.Array:
        """`[chunks]`, which corrections are still within the limit, of what is returned.

        What a correction leaves where it crossed a kink is not of second order: gaps that are small
        one by one add up over the chunks. A gap that is large beside its own state must also be
        within what `earlier_sizes` leaves.
        """
        sides = [correct(ends, p, starts, carried)[0] for p in products]
        scale = scales(before(peaks), before(ends), init)
        counts, met = proved(ends, starts, sides, scale, carried), before(ends)
        own = map(jnp.minimum, scale, earlier_sizes.own(met, starts))
        doubtful = counts & ~meets & ~proved(ends, starts, sides, list(own), carried)

        def explained(chunks: jax.Array) -> jax.Array:
            states = _joined(rows, system.length)
            entered = sharded_time.preceding(axis, init, states)
            at = (chunks * length - 1, 2 * length, settings.tol, axis)
            left = earlier_sizes.travelled(system, entered, states, *at)
            arrived, begin, recent = ([v[chunks] for v in part] for part in (met, starts, scale))
            limits = map(jnp.minimum, recent, left)
            near = [[d[chunks] for d in side] for side in sides]
            return _passing(arrived, begin, near, list(limits), settings.tol, carried)

        return counts & ~earlier_sizes.unexplained(doubtful, explained, everywhere)

    leaves = len(init)
    values = list(starts)
    if system.kinks:
        values += [jnp.maximum(jnp.abs(s), jnp.roll(jnp.abs(s), 1, axis=0)) for s in starts]
    end = iterate(attempt, values, settings.max_iters, init, everywhere=everywhere)
    starts = end.values[:leaves]
    carried, errors, scale, products = end.kept
    rows, last, peaks, sound = _rollout(
        system, starts, errors, scale, xs, valid, settings.tol, carried
    )
    # The program that returns the states may round in another way than the one that was tested.
    meets, worst = agreeing(last, starts), residual(before(last), starts)
    if system.certain:
        meets |= upheld(rows[0], last, peaks, starts, products, carried, meets)
    holds = sound & jnp.concatenate([meets[1:], jnp.ones(1, bool)])
    fails = ~(jnp.all(holds) & meets[0])
    done = end.done & (everywhere(fails.astype(jnp.float32)) == 0)
    # An open start is the end of the chunk before it, which is redone. So is the one before where
    # something is open: its own start may have counted beside what was large then.
    opening = jnp.where(end.done, count, end.opening - 1)
    opening = jnp.maximum(jnp.minimum(opening, leading(holds)) - 1, 0)
    rows, fallback = finish(system, rows, xs, valid, starts, done, opening, axis, (count, length))
    states, ys = _joined(rows, system.length)
    return Solution(states, ys, done, end.used, everywhere(worst), fallback, starts)


def _passing(ends: Leaves, starts: Leaves, sides, scale: Leaves, tol, carried) -> jax.Array:
    """`[n]`, which rows have corrections within the limit by the Jacobians of all sides."""
    found = [tested(ends, starts, deltas, scale, tol, carried)[0] for deltas in sides]
    return functools.reduce(jnp.logical_and, found)


def _joined(rows: Any, steps: int) -> Any:
    """`[count, length, ...]` to `[steps, ...]`."""

    def one(leaf):
        count, length, *shape = leaf.shape
        return leaf.reshape(count * length, *shape)[:steps]

    return jax.tree.map(one, rows)


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
    # The true initial state comes before the first step, whatever the guess says.
    exact = True if axis is None else axis.rank() == 0
    # A state that is not finite would have to be pushed out chunk by chunk.
    guess = [jnp.where(jnp.isfinite(g), g, i) for g, i in zip(guess, init, strict=True)]
    return [
        vary_like(g.astype(i.dtype).at[0].set(jnp.where(exact, i, g[0])), i)
        for g, i in zip(guess, init, strict=True)
    ]


def _hold(valid, new, old):
    return new if valid is None else select(valid, new, old)


def _rollout_with_product(system: System, starts: Leaves, near: Sequence[Leaves], xs: Any, valid):
    """Ends and peaks `[count, *leaf]` of all chunks, and products of their Jacobians.

    The latter, `[count, K, K, N]` for each group, are of the chunks that start `near`: at the
    starts themselves, or on each side of them, see `beside`. No entry vanishes where the Jacobian
    is proved, but for those of a reset at the end of a chunk.
    """
    count = starts[0].shape[0]
    unit = jacobian_products.basis(system.groups, [s[0] for s in starts])
    unit = vary_like([jnp.broadcast_to(u, (count, *u.shape)) for u in unit], starts)

    def step(carry, inputs):
        states, peaks, sides = carry
        x, present = inputs
        moved = [_push(system, at or states, x, products) for at, products in sides]
        new = jax.vmap(system.step)(states, x)[0] if system.kinks else moved[0][0]
        new = _hold(present, new, states)
        sides = [
            (at and _hold(present, then, at), _hold(present, pushed, products))
            for (then, pushed), (at, products) in zip(moved, sides, strict=True)
        ]
        return (new, _higher(peaks, new), sides), None

    sides = [(list(at) if system.kinks else [], unit) for at in near]
    carry = (list(starts), [jnp.abs(s) for s in starts], sides)
    (ends, peaks, sides), _ = lax.scan(step, carry, (xs, valid))

    def gathered(end, columns):
        matrices = jacobian_products.gather_columns(system.groups, columns)
        if not system.certain:
            return matrices
        rows = jacobian_products.to_lanes(system.groups, end)
        return [certificate.product(m, r[:, None]) for m, r in zip(matrices, rows, strict=True)]

    return ends, peaks, [jax.vmap(gathered)(ends, products) for _, products in sides]


def _push(system: System, states: Leaves, x: Any, products: Leaves) -> tuple[Leaves, Leaves]:
    """The next states of all chunks, and the columns of their products."""
    new, columns = jax.vmap(system.push)(states, x, products)
    if system.certain:
        columns = [certificate.unvanishing(c) for c in columns]
    return new, columns


def _higher(peaks: Leaves, states: Leaves) -> list[jax.Array]:
    return [jnp.maximum(p, jnp.abs(s).astype(p.dtype)) for p, s in zip(peaks, states, strict=True)]


def _rollout(
    system: System, starts: Leaves, errors: Leaves, peaks: Leaves, xs: Any, valid, tol, carried
):
    """Rows, ends, peaks, and which chunks are sound.

    Rows are trajectory and outputs, `[count, length, ...]`. A chunk is sound if `errors`, the
    corrections that its start has just had (`carried` times), stay within `LINEAR` limits all the
    way: transient growth can lift them above what they are at both ends, and what is left of them
    is of second order only where the step is as good as linear. `peaks` are the magnitudes that
    they are relative to, and grow with the states.
    """
    errors = list(errors) if system.certain else []

    def step(carry, inputs):
        states, peaks, errors, fine = carry
        x, present = inputs
        new, ys = jax.vmap(system.step)(states, x)
        new = _hold(present, new, states)
        peaks = _higher(peaks, new)
        if errors:
            moved = jax.vmap(system.push)(states, x, [e[:, None] for e in errors])[1]
            errors = _hold(present, [m[:, 0] for m in moved], errors)
            fine = [
                f & _within(e, p, tol, carried) for f, e, p in zip(fine, errors, peaks, strict=True)
            ]
        return (new, peaks, errors, fine), (new, ys)

    fine = [jnp.isfinite(e) for e in errors]
    carry = vary_like((list(starts), list(peaks), errors, fine), starts, xs)
    (last, peaks, _, fine), rows = lax.scan(step, carry, (xs, valid))
    sound = vary_like(jnp.ones(starts[0].shape[0], bool), starts, xs)
    if errors:  # nothing grows from zero, whatever the Jacobian
        quiet = jax.vmap(lambda *e: chunk_links.quiet(system.groups, e))(*errors)
        for f, q in zip(fine, quiet, strict=True):
            sound &= jnp.all(f | q, axis=tuple(range(1, f.ndim)))
    return jax.tree.map(lambda r: jnp.swapaxes(r, 0, 1), rows), last, peaks, sound


def _within(error: jax.Array, peak: jax.Array, tol: float | None, carried) -> jax.Array:
    return below(error, certificate.LINEAR * limit(error.dtype, tol), peak, carried)
