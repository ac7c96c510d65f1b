"""The product of an array and a matrix over the array's last axis."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpara.types import AnyArray


def matmul(
    x: Float[AnyArray, "*batch features"],
    matrix: Float[AnyArray, "features outputs"],
    **options: Any,
) -> Float[Array, "*batch outputs"]:
    """`x W` as one product of two matrices, whatever axes lead.

    `x @ W` has the same values. But its gradient by `W` contracts several axes at once, for which
    XLA lays out its operands anew on a CPU: a SwiGLU trains 1.4 times faster this way.

    Args:
      x: any array.
      matrix: what it is multiplied with.
      **options: of `jnp.matmul`, such as `preferred_element_type`.
    """
    if any(jax.typeof(x).sharding.spec[1:-1]):  # such axes cannot be merged under Explicit meshes
        return jnp.matmul(x, matrix, **options)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return jnp.matmul(rows, matrix, **options).reshape(*x.shape[:-1], matrix.shape[-1])
