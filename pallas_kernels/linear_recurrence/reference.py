"""The linear recurrence in plain JAX: what the kernels must equal."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

Arrays = Sequence[jax.Array]


def forward(a: Arrays, b: Arrays, init: Arrays, *, reverse: bool = False) -> list[jax.Array]:
    """All states by `lax.scan` over matrix products; arguments as for `linear_recurrence.forward`.

    Returns:
      K arrays `[T, B, D]`.
    """
    size = len(b)
    matrices = jnp.stack(a, -1).reshape(*a[0].shape, size, size)

    def step(s, row):
        matrix, offset = row
        s = jnp.einsum("...ij,...j->...i", matrix, s, precision=lax.Precision.HIGHEST) + offset
        return s, s

    states = lax.scan(step, jnp.stack(init, -1), (matrices, jnp.stack(b, -1)), reverse=reverse)[1]
    return [states[..., i] for i in range(size)]
