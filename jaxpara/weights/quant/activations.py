"""Activations that are multiplied with a quantised weight, quantised as they come. [flexq]

One symmetric grid for each row of the operand and each group of entries along the contraction,
from the largest magnitude there: nothing is calibrated.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxpara.sizes import needed, whole
from jaxpara.types import AnyArray
from jaxpara.weights.precision import narrowed, quotient, wide
from jaxpara.weights.quant.grid import never_zero

NOT_QUANTISED = "its activations are not quantised"


def check_activations(bits: int | None) -> int | None:
    """Refuses bits that are not 2 to 8.

    Args:
      bits: of the activations; None for activations that are left as they are.

    Returns:
      The bits as an int, or None.

    Raises:
      ValueError: they are out of range.
    """
    bits = whole(activations=bits)
    if bits is not None and not 2 <= bits <= 8:
        raise ValueError(f"activations={bits}: give 2 to 8 bits, or None")
    return bits


def activation_integers(x: jax.Array, bits: int, groups: int) -> tuple[jax.Array, jax.Array]:
    """An operand as integers with scales.

    Args:
      x: `[.., rows]`.
      bits: 2 to 8.
      groups: of equal size, along the rows.

    Returns:
      int8 `[.., rows]` and scales `[.., groups]`, in float32 or wider, with `x` about integer times
      scale.
    """
    q = 2 ** (bits - 1) - 1
    # Sizes in full: of an array without rows no size can be told from the others.
    parts = wide(x).reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    scale = never_zero(jnp.max(jnp.abs(parts), axis=-1, keepdims=True) * (1 / q))
    values = jnp.clip(jnp.round(quotient(parts, scale)), -q, q).astype(jnp.int8)
    return values.reshape(x.shape), scale[..., 0]


def fake_activations(x: jax.Array, bits: int, groups: int) -> jax.Array:
    """The numbers that those integers represent; the gradient passes straight through.

    Args:
      x: floating; `bits, groups` as for `activation_integers`.

    Returns:
      `[.., rows]` in `x`'s dtype.
    """
    values, scale = activation_integers(lax.stop_gradient(x), bits, groups)
    parts = values.reshape(*x.shape[:-1], groups, x.shape[-1] // groups).astype(scale.dtype)
    on_grid = narrowed((parts * scale[..., None]).reshape(x.shape), x.dtype)
    return on_grid + (x - lax.stop_gradient(x))


def unit_grid(*, bits: int = 6) -> Callable[[Float[AnyArray, "..."]], Float[Array, "..."]]:
    """Rounds numbers from 0 to 1 to a fixed grid, as FlexQ does with probabilities.

    `p -> round(p (2^bits - 1)) / (2^bits - 1)`, and the gradient passes straight through. There is
    no scale: zero and one are on the grid, and numbers below half of its step become zero. Use it
    in `nn.mixers.attention(probabilities=...)`, or in an attention of your own.

    Args:
      bits: 2 to 16.

    Returns:
      A function of an array, in whose dtype the result is.

    Raises:
      ValueError: the bits are out of range.

    References: [flexq].
    """
    bits = needed(bits=bits)
    if not 2 <= bits <= 16:
        raise ValueError(f"bits={bits}: give 2 to 16")
    most = 2**bits - 1

    def on_grid(p: Float[AnyArray, "..."]) -> Float[Array, "..."]:
        wide = lax.stop_gradient(p).astype(jnp.promote_types(p.dtype, jnp.float32))
        return (jnp.round(wide * most) / most).astype(p.dtype) + (p - lax.stop_gradient(p))

    return on_grid
