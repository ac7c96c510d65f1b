"""`s_t = A_t s_{t-1} + b_t` for many small systems side by side: the affine cell of the
nonlinear kernels, whose one correction is exact.

Time-major: K*K arrays `[T, B, D]` for A, row by row, K arrays for b, initial states `[B, D]`;
K <= 4, one system a lane.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from pallas_kernels import nonlinear_recurrence
from pallas_kernels.linear_recurrence.cell import LARGEST as LARGEST
from pallas_kernels.linear_recurrence.cell import affine_cell as affine_cell

Arrays = Sequence[jax.Array]


class LinearGradients(NamedTuple):
    """Cotangents `[T, B, D]` of A and b, and `[B, D]` of the initial state."""

    a: list[jax.Array]
    b: list[jax.Array]
    init: list[jax.Array]


def forward(
    a: Arrays,
    b: Arrays,
    init: Arrays,
    *,
    reverse: bool = False,
    chunks: int | None = None,
    window: int | None = None,
    implementation: str | Sequence[str] | None = None,
) -> list[jax.Array]:
    """All states.

    Args:
      a: K*K arrays, `a[K * i + j]` being the entry of row i and column j.
      b: K arrays.
      init: K arrays.
      reverse: from the last step to the first.
      chunks, window, implementation: as for `nonlinear_recurrence.forward`.

    Returns:
      K arrays `[T, B, D]` in the type of `init`.

    Raises:
      ValueError: the numbers of arrays do not fit.
      NoImplementation: none takes the call.
    """
    return nonlinear_recurrence.forward(
        _checked(a, b, init),
        init,
        [*a, *b],
        [],
        reverse=reverse,
        affine=True,
        chunks=chunks,
        window=window,
        implementation=implementation,
    ).states


def backward(
    a: Arrays,
    b: Arrays,
    init: Arrays,
    states: Arrays,
    cotangents: Arrays,
    *,
    reverse: bool = False,
    chunks: int | None = None,
    window: int | None = None,
    implementation: str | Sequence[str] | None = None,
) -> LinearGradients:
    """Gradients of `sum(states * cotangents)`.

    Args:
      a, b, init, reverse, chunks, window, implementation: as for `forward`.
      states: what `forward` gave.
      cotangents: of the states.

    Returns:
      What `LinearGradients` says.

    Raises:
      ValueError, NoImplementation: as for `forward`.
    """
    found = nonlinear_recurrence.backward(
        _checked(a, b, init),
        init,
        [*a, *b],
        [],
        states,
        cotangents,
        reverse=reverse,
        chunks=chunks,
        window=window,
        implementation=implementation,
    )
    return LinearGradients(found.xs[: len(a)], found.xs[len(a) :], found.init)


def _checked(a: Arrays, b: Arrays, init: Arrays):
    size = len(b)
    if len(a) != size * size or len(init) != size:
        raise ValueError(
            f"a has {len(a)} arrays, b {size} and init {len(init)}; for K = {size} expected "
            f"{size * size}, {size} and {size}"
        )
    return affine_cell(size)
