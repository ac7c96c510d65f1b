"""The form in which a kernel receives the user's step: ready elementwise functions.

`jaxpara.recurrence.kernel.elementwise` prepares them from a traced step. Every function takes lists
of arrays of one common shape, whatever that shape is (a tile of the kernel's own), computes in
float32 and uses only elementwise primitives, so that a kernel body may call it on values in
registers. Values that the step keeps in a narrower type are rounded to it inside.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import certificate

Arrays = Sequence[jax.Array]


class ElementwiseCell(NamedTuple):
    """`h_t = step(h_{t-1}, x_t, p)` on K state leaves, elementwise over lanes.

    Attributes:
      states: K, the number of state leaves; element i of each is one system of K equations.
      inputs: number of arrays that change with time.
      params: number of arrays that do not.
      step: `(states, inputs, params) -> states`.
      push: `(states, inputs, params, columns) -> (states, columns)`: the step together with its
        Jacobian applied to tangents; `columns[j][i]` is tangent j of state leaf i.
      pull: `(states, inputs, params, cotangents) -> (d_states, d_inputs, d_params)`: the vjp at
        the states *before* the step; nothing is summed over lanes.
      pull_state: `(states, inputs, params, cotangents) -> d_states`, the first part of `pull`.
      using: from functions of one array, by the name of their primitive (`"tanh"`), to the same
        cell made of them, for a backend with better functions; None where the cell takes none.
      rounds: `step` rounds new states to the dtype that the carry has; otherwise they are float32
        and rounded only where they are stored.
    """

    states: int
    inputs: int
    params: int
    step: Callable[[Arrays, Arrays, Arrays], list[jax.Array]]
    push: Callable[
        [Arrays, Arrays, Arrays, Sequence[Arrays]],
        tuple[list[jax.Array], list[list[jax.Array]]],
    ]
    pull: Callable[
        [Arrays, Arrays, Arrays, Arrays],
        tuple[list[jax.Array], list[jax.Array], list[jax.Array]],
    ]
    pull_state: Callable[[Arrays, Arrays, Arrays, Arrays], list[jax.Array]]
    using: Callable[[Mapping[str, Callable[[jax.Array], jax.Array]]], Any] | None = None
    rounds: bool = False


def moved(jacobian: Sequence[Arrays], tangent: Arrays) -> list[jax.Array]:
    """`J v`, from the columns of a Jacobian: `jacobian[j][i]` is d leaf i / d leaf j."""
    columns = [[entry * v for entry in column] for column, v in zip(jacobian, tangent, strict=True)]
    return [functools.reduce(operator.add, parts) for parts in zip(*columns, strict=True)]


def lacked(
    jacobian: Sequence[Arrays], columns: Sequence[Arrays], lacking: Arrays
) -> list[jax.Array]:
    """What the entries of each row of `J P` may lack, for products below the floats are 0.

    Args:
      jacobian, columns: of J and of P.
      lacking: what those of P may lack, by row.
    """
    grown = moved([[jnp.abs(entry) for entry in column] for column in jacobian], lacking)
    found = []
    for row, size in zip(zip(*jacobian, strict=True), grown, strict=True):
        parts = [(j != 0.0) & (p != 0.0) for c in columns for j, p in zip(row, c, strict=True)]
        # A sum of products with 0 lacks nothing: a reset.
        led = functools.reduce(operator.or_, parts)
        found.append(jnp.where(led, size + certificate.TINY, size))
    return found


def became(jacobian: Sequence[Arrays], sizes: Arrays, states: Arrays) -> list[jax.Array]:
    """What magnitudes become in a step that leads to `states`, their own included."""
    sizes = moved([[jnp.abs(entry) for entry in column] for column in jacobian], sizes)
    return [jnp.maximum(jnp.abs(new), size) for new, size in zip(states, sizes, strict=True)]
