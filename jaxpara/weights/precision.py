"""The dtypes in which weights are computed, and the rounding to those in which they are kept.

Norms, scales, squares and sums of parts are computed in float32, or in float64 for float64
weights. A result is rounded once to the weight's own dtype. Squares are taken of numbers that were
divided by a power of two near the largest one, so none overflows or vanishes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def wide_dtype(dtype: Any) -> Any:
    """float32, or the dtype itself where it is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def wide(x: jax.Array) -> jax.Array:
    """An array in the dtype in which norms and scales are computed."""
    return x.astype(wide_dtype(x.dtype))


def multiplied_as(x: Any, weight: Any) -> Any:
    """The dtype in which a dense product multiplies: the operand's own only if both have it.

    Args:
      x: dtype of the operand, integers and truth values included.
      weight: dtype of the weight.

    Returns:
      The dtype.
    """
    return x if x == weight else jnp.promote_types(x, weight)


def narrowed(x: jax.Array, dtype: Any) -> jax.Array:
    """Numbers rounded to a narrower dtype, in every program alike.

    XLA drops a cast to bfloat16 or float16 that is followed by one back to float32, in one program
    and not in another: a quantiser after it would see other numbers. Here the float32 numbers are
    rounded before they are cast.

    Args:
      x: float32 or float64.
      dtype: a floating dtype; its own gives `x`.

    Returns:
      The nearest numbers, ties to even; the derivative is that of a cast.
    """
    return x if x.dtype == dtype else _narrowed(x, jnp.dtype(dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _narrowed(x: jax.Array, dtype: Any) -> jax.Array:
    have, want = jnp.finfo(x.dtype), jnp.finfo(dtype)
    out = lax.reduce_precision(x, have.nexp, want.nmant)
    if want.nexp < have.nexp:
        # Below its smallest normal number the dtype has multiples of its smallest one.
        least = jnp.asarray(want.smallest_subnormal, dtype).astype(x.dtype)
        out = jnp.where(
            jnp.abs(x) < jnp.asarray(want.tiny, x.dtype), jnp.round(x / least) * least, out
        )
    return out.astype(dtype)


@_narrowed.defjvp
def _(dtype, primals, tangents):
    return _narrowed(*primals, dtype), tangents[0].astype(dtype)


def unit_of(size: jax.Array) -> jax.Array:
    """A power of two near a magnitude, by which numbers are divided without rounding.

    Args:
      size: magnitudes, float32 or float64.

    Returns:
      Powers of two that leave room for squares and sums; one where the magnitude is zero or not
      finite.
    """
    exact, fraction, most = {4: (jnp.uint32, 23, 100), 8: (jnp.uint64, 52, 900)}[
        size.dtype.itemsize
    ]
    bits = lax.bitcast_convert_type(size, exact)
    unit = lax.bitcast_convert_type((bits >> fraction) << fraction, size.dtype)
    bounded = jnp.clip(
        unit, jnp.asarray(2.0**-most, unit.dtype), jnp.asarray(2.0**most, unit.dtype)
    )
    return jnp.where((size > 0) & (size < jnp.inf), bounded, 1)


def share_of(size: jax.Array) -> jax.Array:
    """What numbers near the end of the range are multiplied by, so that a few of them fit.

    Args:
      size: magnitudes, float32 or float64.

    Returns:
      A small power of two near the end of the range, one elsewhere.
    """
    far = size > jnp.asarray(jnp.finfo(size.dtype).max / 2**16, size.dtype)
    return jnp.where(far, jnp.asarray(2.0**-10, size.dtype), 1)


def quotient(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x / scale` for scales up to the end of the range.

    XLA multiplies by `1 / scale` in some programs, and flushes a reciprocal that is too small for a
    normal number to zero.

    Args:
      x: float32 or float64.
      scale: of the same dtype, not zero.

    Returns:
      The quotients.
    """
    share = share_of(jnp.abs(scale))
    return (x * share) / (scale * share)


def mean_size(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The mean magnitude along axes, which are kept.

    Args:
      x: float32 or float64.
      axes: of `x`.

    Returns:
      The means, of sums that do not overflow.
    """
    size = jnp.abs(x)
    unit = unit_of(jnp.max(size, axis=axes, keepdims=True))
    return unit * jnp.mean(size / unit, axis=axes, keepdims=True)


def norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The Euclidean norm along axes, which are kept.

    Args:
      x: float32 or float64.
      axes: of `x`.

    Returns:
      The norms; one that the dtype does not hold is its largest number.
    """
    unit = unit_of(jnp.max(jnp.abs(x), axis=axes, keepdims=True))
    shares = x / unit
    # Squares are rounded before the sum in every program, as in `weight.dense`.
    return unfused(unit * jnp.sqrt(jnp.sum(unfused(shares * shares), axis=axes, keepdims=True)))


def unfused(x: jax.Array) -> jax.Array:
    """A product that is rounded before it is added to something, in every program.

    XLA's CPU compiler makes a multiply-add of the two in one program and not in another, and an
    `optimization_barrier` does not keep it from that in JAX 0.10.2; two comparisons in between do.

    Args:
      x: the product, floating.

    Returns:
      The same, infinities as the largest finite numbers.
    """
    most = jnp.finfo(x.dtype).max
    return lax.clamp(jnp.asarray(-most, x.dtype), x, jnp.asarray(most, x.dtype))
