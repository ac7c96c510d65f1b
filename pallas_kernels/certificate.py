"""When a solve by multiple shooting counts as solved: the rule and its constants.

Chunks are rolled out by the true step from starts `s_c` to ends `e_c`, with products `P_c` of its
Jacobians. Boundaries leave residuals `r_{c+1} = e_c - s_{c+1}`, and the next Newton correction is

    d_0 = 0,    d_{c+1} = P_c d_c + r_{c+1}.

To first order `d` *is* the error of the starts. `r` is not: over neutral steps a drift of one ulp a
boundary adds up, and a guess that is constant in time has the residual of one step's drift.

1. `d` decides where the step's Jacobian is proved to be its derivative and the state is float32 or
   wider.
   - The solve counts when `|d_c| <= FINE` ulp of scale at every boundary. It also counts when
     `|d_c| <= COARSE` ulp in two passes in a row, where rounding inside the chunks keeps it.
   - Starts may be corrected by `d` once more before they are rolled out. What remains is then of
     second order, and `COARSE` ulp count at once, if `d` grows to no more than `LINEAR` times that
     on its way through a chunk.
   - Where they are not, as in kernels, the states of a chunk are off by `d` times the product so
     far, and arrive `P_c d_c` off. The latter is held to the same limits as `d`. On the way the
     largest magnitude of each entry of the product, times `|d|`, is held to `COARSE` ulp of the
     scale or, for an affine step, of the largest state on the way if that is larger.
   - Gaps show whether the correction before was as good as linear. Behind the last chunk of a
     window there is none: there a pass of a kernel must end where the one before predicted, unless
     the step is affine, whose correction is exact.
   - A gap or a part of `P d` below `LEAST` may be flushed to 0. In kernels it counts as a doubt of
     its size, scaled so that it is not flushed again, which grows through the products and adds to
     `d`. Elsewhere all of `d` is scaled (`RAISE`). What is below `FLOOR` counts as nothing by this
     rule.
   - Where a window of a kernel ends no `FLOOR` holds: the next one starts there, and nothing can
     correct it afterwards. The doubt is held to `COARSE` ulp of that state itself (`may_leave`).
   - No product vanishes unseen. In kernels `T` travels along: at most what the entries of a row of
     the product lack, because products below the floats are 0. It grows as they do, and by some
     `LEAST` at each step where the Jacobian leads from a part of the product, or from what one
     lacks, to the row; a reset lacks nothing. `T` times the magnitudes of those `d` that ever led
     to the row is a doubt. A Jacobian of 0 may itself be one below the floats: where one step takes
     a state below `FALL` times the largest before it, but not to 0, it leads too. An affine step
     has no `T`: its starts themselves went through the product, and gaps show where that vanished.
   - Outside of kernels `TINY` is added to the magnitude of each entry at every step of a chunk.
     Beside a product that counts it is nothing. Where the product falls below it and grows again,
     `TINY` grows along, and what it makes of `d` is too large to count. At the end of a chunk a
     small entry is 0 where the state is (`RESET`).
   - A pass may be judged by the products of the pass before, where `|d|` was within `COARSE` ulp
     there: a step that is flat at one start may be steep at another.
   - A `d` that is not finite, or beyond what a correction may be (`CAP`), never counts.
   - A correction may cross a kink, beyond which it says nothing. Outside of kernels the `d` of the
     corrected starts is therefore held to `COARSE` ulp after the last roll-out as well. Where
     nothing is rolled out, two passes in a row are needed. This holds for every step: the square
     root of a square is a kink, and a sigmoid may be as sharp as one.
   - A state may rest on a kink, where the derivative is that of one side. A step that holds a kink
     (`max`, `abs`, `relu`) takes its Jacobians beside its states, on both sides, by at least two
     limits of their scale. `d` must be within the limit by both. In kernels the step counts by 2.
   - Equal bits count only up to the first gap. Behind it `d` decides.
2. Elsewhere the solve counts when every `r_c` is 0, bit for bit, including the sign of zeros. Their
   reciprocals differ (see `meets`; rule 1 needs this as well). Narrower states round by as much as
   they move, and behind a rounding, a cast or a custom rule, except the few listed in jaxpara's
   `custom_jvps`, `d` means nothing.
3. A pass whose starts hold no correction by exact Jacobians (all starts the carry, or a guess)
   counts only by 2.
4. Steps that do not count within the budget are completed one by one.

The scale of an element is its largest magnitude over the last `WINDOW` ends, and at most `SLACK`
times that over the last two. A fixed absolute limit would accept anything for a small state. One
relative to the instant would refuse rounding at a zero crossing.

A state may fall by much more than rounding, into steps that are flat on both sides of a gap and so
hide it. `s_t = max(|h_t|, |J_t| s_{t-1})` is what the Jacobians leave of the magnitudes before. In
kernels `s` travels along, for a step that is not affine, and the scale is at most `SLACK` times
`s`. Elsewhere a gap beyond `SLACK` limits of the state itself must be within the limit of `s`,
which is computed for those rows only.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Units in the last place, relative to the scale.
FINE = 8
COARSE = 80
# Inside a chunk, in limits: corrections of 1e-3 leave 1e-6.
LINEAR = 100
# A correction beyond this multiple of the largest state is dropped.
CAP = 4.0
# The least normal float32. A device may flush what is smaller.
LEAST = 2.0**-126
# Scales what may be flushed to doubts, exactly.
PER_LEAST = 1 / LEAST
# A part of a state that one step makes so small may be what an entry below `LEAST` left of it: half
# of what `COARSE` allows.
FALL = 2.0**18 * LEAST
# A correction below this is within any limit: a few gaps that were flushed.
FLOOR = 4 * LEAST
# Solvers outside of kernels carry corrections times `RAISE`, so that those of a state that is a
# normal number are not flushed. From states beyond `LARGE` on they do not: it would overflow.
RAISE, LARGE = 2.0**24, 2.0**96
# Outside of kernels it stands at each step of a chunk for what became 0 in an entry of a product.
TINY = 2.0**-120
# Where the state ends in 0, an entry below this is what has become of `TINY` added to it.
RESET = 2.0**-94
# Ends that the scale looks back on, and what it may exceed the last two by.
WINDOW = 4
SLACK = 256.0


def limits(dtype: Any, tol: float | None = None) -> tuple[float, float]:
    """Relative limits of `|d|`, for a step with a proved Jacobian.

    Args:
      dtype: of the state; of several leaves, the coarsest.
      tol: the user's own in place of `FINE` ulp, or None.

    Returns:
      `(accept, stalled)`: what counts in one pass, and what counts in two passes in a row. A `tol`
      below `FINE` ulp asks for more than rounding may leave, and is taken at its word for both.
      Zeros below float32, where only bitwise agreement counts.
    """
    info = jnp.finfo(dtype)
    if info.bits < 32:
        return 0.0, 0.0
    eps = float(info.eps)
    accept = FINE * eps if tol is None else float(tol)
    return accept, max(accept, COARSE * eps) if accept >= FINE * eps else accept


def unvanishing(entry: jax.Array) -> jax.Array:
    """An entry of P, float32 or wider, with `TINY` added to its magnitude: signs might cancel."""
    return entry + jnp.where(entry < 0.0, -TINY, TINY)


def product(entry: jax.Array, end: jax.Array) -> jax.Array:
    """An entry of a chunk's P as corrections use it, outside of kernels.

    Args:
      entry: to which `TINY` was added at each step.
      end: the element of the state that it leads to, where the chunk ends.

    Returns:
      0 where nothing but `TINY` leads to a state that is 0: a reset, from which a correction must
      not move the next start. Elsewhere `entry`.
    """
    return jnp.where((end == 0.0) & (jnp.abs(entry) < RESET), 0.0 * end, entry)


def doubt_of_gap(end: jax.Array, start: jax.Array) -> jax.Array:
    """The doubt, in `LEAST`, of a gap or of a correction across it that was flushed: at most 1."""
    return jnp.minimum(jnp.abs(end * PER_LEAST - start * PER_LEAST), 1.0)


def doubt_of_part(entry: jax.Array, delta: jax.Array) -> jax.Array:
    """The doubt, in `LEAST`, of an entry of P times a correction, where it was flushed."""
    return jnp.minimum(jnp.abs(entry) * jnp.abs(delta * PER_LEAST), 1.0)


def grown(row: Sequence[jax.Array], sizes: Sequence[jax.Array]) -> jax.Array:
    """At least what corrections of these sizes become.

    Args:
      row: of P.
      sizes: not negative. Nothing grows from zero, through an infinite entry neither.

    Returns:
      The magnitude.
    """
    parts = [jnp.where(s == 0.0, s, jnp.abs(p) * s) for p, s in zip(row, sizes, strict=True)]
    return functools.reduce(operator.add, parts)


def lost(row: Sequence[jax.Array], corrections: Sequence[jax.Array]) -> jax.Array:
    """The doubt, in `LEAST`, of the products of a row of P and corrections that are flushed."""
    parts = []
    for p, d in zip(row, corrections, strict=True):
        small = (jnp.abs(p * d) < LEAST) & (jnp.abs(d) >= LEAST)
        parts.append(jnp.where(small, doubt_of_part(p, d), 0.0))
    return functools.reduce(operator.add, parts)


def scale_of(recent: Sequence[jax.Array], came: jax.Array | None) -> jax.Array:
    """To what a correction at an end is relative.

    Args:
      recent: magnitudes of the last `WINDOW` ends, the newest first.
      came: what earlier magnitudes have become there; None where that does not travel along.

    Returns:
      A magnitude.
    """
    scale = functools.reduce(jnp.maximum, recent)
    scale = jnp.minimum(scale, SLACK * jnp.maximum(*recent[:2]))
    return scale if came is None else jnp.minimum(scale, SLACK * came)


def doubt_of_lacking(
    lacking: jax.Array, sizes: Sequence[jax.Array], most: Sequence[jax.Array]
) -> jax.Array:
    """The doubt, in `LEAST`, of corrections by a row of P that may lack so much.

    Args:
      lacking: of the row.
      sizes: of the corrections.
      most: the largest magnitudes that the row's entries may have had; 0 where nothing ever led.
    """
    bound = lacking * PER_LEAST
    # Nothing grows from zero, by an infinite bound neither.
    parts = [
        jnp.where((size == 0.0) | (entry == 0.0), 0.0, bound * size)
        for size, entry in zip(sizes, most, strict=True)
    ]
    return functools.reduce(operator.add, parts)


def may_leave(new: jax.Array, doubt: jax.Array, limit: float) -> jax.Array:
    """Whether a window may end in a state with this doubt, in operations that every kernel has.

    Args:
      new: its last state, float32.
      doubt: in `LEAST`.
      limit: the second of `limits`.

    Returns:
      Booleans. A state that may itself be flushed is held to `FLOOR`.
    """
    size = jnp.abs(new)
    return doubt <= jnp.where(size < LEAST, FLOOR / LEAST, limit / LEAST * size)


def meets(end: jax.Array, start: jax.Array) -> jax.Array:
    """Whether ends are the next starts bit for bit, in operations that every kernel has.

    Args:
      end, start: float32, of one shape.

    Returns:
      Booleans. The two zeros are equal and do not meet: their reciprocals are not equal. A NaN
      meets nothing.
    """
    return (end == start) & (1.0 / end == 1.0 / start)
