"""From chunk to chunk of multiple shooting: the corrections."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.recurrence.lanes import vary_like
from jaxpara.recurrence.solve import jacobian_products
from jaxpara.recurrence.solve.certified import gaps, lowered, moved_by
from jaxpara.recurrence.system import Leaves


def chain(groups, ends, matrices, starts, first, cap, carried) -> tuple[Leaves, Leaves]:
    """Corrections `[C, *leaf]` of the starts and the corrected starts, of which `first` is known.

    Corrections are `carried` times what they are, see `certified.gaps`. One that builds on one that
    was dropped is infinite: it bounds nothing.
    """

    def link(delta, inputs):
        end, matrix, start = inputs
        moved, fits, new = move(groups, matrix, delta, end, cap, carried)
        delta = [m + g for m, g in zip(moved, gaps(end, start, carried), strict=True)]
        bound = [jnp.where(f, d, jnp.inf) for f, d in zip(fits, delta, strict=True)]
        return delta, (bound, new)

    inputs = ([e[:-1] for e in ends], [m[:-1] for m in matrices], [s[1:] for s in starts])
    first = vary_like(list(first), ends, starts)
    shift = gaps(first, [s[0] for s in starts], carried)
    _, (deltas, new) = lax.scan(link, shift, inputs)
    join = lambda head, rest: [  # noqa: E731
        jnp.concatenate([h[None], r]) for h, r in zip(head, rest, strict=True)
    ]
    return join(shift, deltas), join(first, new)


def move(groups, matrix, delta, ends, cap, carried) -> tuple[Leaves, Leaves, Leaves]:
    """`P delta`, with what is not finite or exceeds `cap` dropped (a Picard update).

    Returns the update, where nothing was dropped, and the ends that it moves.
    """
    lanes = jacobian_products.to_lanes(groups, list(delta))
    moved = jacobian_products.from_lanes(groups, jacobian_products.apply(matrix, lanes), ends)
    still = quiet(groups, delta)
    fits = [
        q | (jnp.abs(lowered(m, carried)) <= c) for q, m, c in zip(still, moved, cap, strict=True)
    ]
    none = [q | ~f for q, f in zip(still, fits, strict=True)]
    moved = [jnp.where(n, jnp.zeros_like(m), m) for n, m in zip(none, moved, strict=True)]
    return moved, fits, [moved_by(e, m, carried) for e, m in zip(ends, moved, strict=True)]


def quiet(groups, delta: Leaves) -> list[jax.Array]:
    """Where no element of a block moves, so that its Jacobian, even an infinite one, is idle."""
    lanes = jacobian_products.to_lanes(groups, list(delta))
    still = [jnp.broadcast_to(jnp.all(v == 0, axis=0), v.shape) for v in lanes]
    like: Any = [jax.ShapeDtypeStruct(d.shape, jnp.bool_) for d in delta]
    return jacobian_products.from_lanes(groups, still, like)


def leaving(groups, ends, matrices, starts, cap, carried) -> tuple[Leaves, Leaves, jax.Array]:
    """The last end as if the first start were exact, and the Jacobian of all chunks.

    They make the whole device one chunk for the devices that follow. Third, whether the correction
    of that end was dropped.
    """
    first = [s[0] for s in starts]
    _, corrected = chain(groups, ends, matrices, starts, first, cap, carried)
    delta = gaps([c[-1] for c in corrected], [s[-1] for s in starts], carried)
    last, matrix = [e[-1] for e in ends], [m[-1] for m in matrices]
    _, fits, end = move(groups, matrix, delta, last, cap, carried)
    lost = ~functools.reduce(jnp.logical_and, map(jnp.all, fits))
    return end, _product(matrices), lost


def _product(matrices: Leaves) -> list[jax.Array]:
    """Product of all chunks' Jacobians, the last chunk leftmost."""

    def multiply(total, matrix):
        return jacobian_products.multiply(matrix, total), None

    return lax.scan(multiply, [m[0] for m in matrices], [m[1:] for m in matrices])[0]
