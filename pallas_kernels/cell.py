"""The form in which a kernel receives the user's step: ready elementwise functions.

`jaxpara.recurrence.kernel.elementwise` prepares them from a traced step. Every function takes lists
of arrays of one common shape, whatever that shape is (a tile of the kernel's own), computes in
float32 and uses only elementwise primitives, so that a kernel body may call it on values in
registers. Values that the step keeps in a narrower type are rounded to it inside.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

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
