"""The rounding modes, on integers: what is kept, what is cut off, and which neighbour is taken.

A magnitude is `kept * 2^shift + cut` with `0 <= cut < 2^shift`. Every number format below reduces
to this: floats on the bits of a float32 or float64, fixed point and integers on scaled ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpara.types import Key


class Cut(NamedTuple):
    """A magnitude about to lose its last bits; unsigned arrays of one shape, 32 or 64 bits wide.

    Attributes:
      kept: the bits that stay, as an integer.
      cut: the bits that go.
      shift: how many go, less than all.
      negative: the sign of the number.
      random: as many random bits for each, or None for the deterministic modes.
    """

    kept: jax.Array
    cut: jax.Array
    shift: jax.Array
    negative: jax.Array
    random: jax.Array | None


def _half(c: Cut) -> jax.Array:
    one = jnp.ones((), c.shift.dtype)
    return jnp.where(c.shift > 0, one << (jnp.maximum(c.shift, 1) - 1), one)


def _bits(c: Cut) -> jax.Array:
    """As many random bits as are cut off."""
    assert c.random is not None
    # A shift by all bits is undefined: nothing is cut there, and nothing is compared.
    width = 8 * c.random.dtype.itemsize
    return jnp.where(c.shift > 0, c.random >> jnp.minimum(width - c.shift, width - 1), 0)


def _coin(c: Cut) -> jax.Array:
    assert c.random is not None
    return (c.random & 1) == 1


def _odd(c: Cut) -> jax.Array:
    return (c.kept & 1) == 1


# name -> whether the magnitude goes up to the next one; asked only where something is cut off.
UP: dict[str, Callable[[Cut], jax.Array]] = {
    "nearest_even": lambda c: (c.cut > _half(c)) | ((c.cut == _half(c)) & _odd(c)),
    "nearest_away": lambda c: c.cut >= _half(c),
    "nearest_zero": lambda c: c.cut > _half(c),
    "up": lambda c: ~c.negative,
    "down": lambda c: c.negative,
    "zero": lambda c: jnp.zeros_like(c.negative),
    "away": lambda c: jnp.ones_like(c.negative),
    "odd": lambda c: ~_odd(c),
    "stochastic": lambda c: _bits(c) < c.cut,
    "random": _coin,
}
RANDOM = ("stochastic", "random")
# What these cut off they never give back, so they do not leave the range of a format either.
INWARD = {
    "zero": lambda negative: jnp.ones_like(negative),
    "odd": lambda negative: jnp.ones_like(negative),
    "up": lambda negative: negative,
    "down": lambda negative: ~negative,
}


def inward(rounding: str, negative: jax.Array) -> jax.Array:
    """Whether a magnitude beyond the largest one comes back to it.

    Args:
      rounding: the mode.
      negative: the signs.

    Returns:
      Truth values.
    """
    return INWARD.get(rounding, jnp.zeros_like)(negative)


def check_rounding(rounding: str) -> None:
    """Refuses an unknown mode.

    Args:
      rounding: the mode.

    Raises:
      ValueError: the mode is unknown.
    """
    if rounding not in UP:
        raise ValueError(f"rounding={rounding!r}: give one of {', '.join(map(repr, UP))}")


def random_bits(
    rounding: str, key: Key | None, shape: tuple[int, ...], dtype: Any = jnp.uint32
) -> jax.Array | None:
    """The random bits of a mode.

    Args:
      rounding: the mode.
      key: of the random modes; not used by the others.
      shape: of the numbers.
      dtype: unsigned, as wide as the numbers.

    Returns:
      Unsigned integers, or None.

    Raises:
      ValueError: an unknown mode, or a random one without a key.
    """
    check_rounding(rounding)
    if rounding not in RANDOM:
        return None
    if key is None:
        raise ValueError(f"rounding={rounding!r} is random: give key=jax.random.key(...)")
    return jax.random.bits(key, shape, dtype)


def rounded(c: Cut, rounding: str) -> jax.Array:
    """The magnitude after rounding, in units of `2^shift`.

    Args:
      c: what is kept and what is cut off.
      rounding: the mode.

    Returns:
      Unsigned integers.
    """
    up = (c.cut > 0) & UP[rounding](c)
    return c.kept + up.astype(c.kept.dtype)
