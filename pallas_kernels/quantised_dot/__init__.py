"""A matmul with integer weights, dequantised as they are multiplied."""

from collections.abc import Sequence

import jax

from pallas_kernels.quantised_dot import reference
from pallas_kernels.quantised_dot.reference import integer_dot

__all__ = ["integer_dot", "quantised_dot"]


def quantised_dot(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    offset: jax.Array | None = None,
    *,
    bits: int,
    precision=None,
    implementation: None | str | Sequence[str] = None,
) -> jax.Array:
    """`x @ (values * scale + offset)`."""
    return reference.quantised_dot(x, values, scale, offset, bits=bits, precision=precision)
