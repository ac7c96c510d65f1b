"""The recurrence in plain JAX, step by step: what the kernels must equal."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.cell import ElementwiseCell

Arrays = Sequence[jax.Array]


def _wide(arrays: Arrays) -> list[jax.Array]:
    return [a.astype(jnp.float32) for a in arrays]


def forward(
    cell: ElementwiseCell,
    init: Arrays,
    xs: Arrays,
    params: Arrays,
    *,
    reverse: bool = False,
    **settings: Any,
) -> tuple[list[jax.Array], jax.Array, jax.Array, jax.Array]:
    """All states by `lax.scan`; there is nothing to iterate, so the counts are zero.

    Args:
      cell, init, xs, params, reverse: as for `nonlinear_recurrence.forward`.
      settings: of the iteration; not used.

    Returns:
      `(states, iterations [B], residual [B], fallback_steps [B])`.
    """
    del settings
    fixed = _wide(params)
    dtypes = [i.dtype for i in init]

    def step(state, x):
        new = cell.step(state, _wide(x), fixed)
        # A cell with a narrow carry rounds in its step, so storing narrow loses nothing.
        return new, [n.astype(d) for n, d in zip(new, dtypes, strict=True)]

    rows = jnp.broadcast_shapes(*[a.shape for a in (*init, *params)])
    first = [jnp.broadcast_to(i, rows) for i in _wide(init)]
    states = lax.scan(step, first, list(xs), reverse=reverse)[1]
    zeros = jnp.zeros(rows[0], jnp.int32)
    return states, zeros, zeros.astype(jnp.float32), zeros


def backward(
    cell: ElementwiseCell,
    init: Arrays,
    xs: Arrays,
    params: Arrays,
    states: Arrays,
    cotangents: Arrays,
    *,
    reverse: bool = False,
    **settings: Any,
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array], jax.Array]:
    """Cotangents of everything that goes into the recurrence, by one `lax.scan` against it.

    Args:
      cell, init, xs, params, states, cotangents, reverse: as for
        `nonlinear_recurrence.backward`.
      settings: of the kernels; not used.

    Returns:
      `(d_init, d_xs, d_params float32 [B, D], fallback_steps [B])`.
    """
    del settings
    fixed = _wide(params)

    def previous(first, rows):
        parts = [rows[1:], first[None]] if reverse else [first[None], rows[:-1]]
        return jnp.concatenate(parts)

    before = [previous(i.astype(s.dtype), s) for i, s in zip(init, states, strict=True)]

    def step(carry, rows):
        flowing, sums = carry
        state, x, g = (_wide(r) for r in rows)
        total = [f + g_ for f, g_ in zip(flowing, g, strict=True)]
        d_state, d_x, d_params = cell.pull(state, x, fixed, total)
        sums = [s + d for s, d in zip(sums, d_params, strict=True)]
        return (d_state, sums), [d.astype(x_.dtype) for d, x_ in zip(d_x, rows[1], strict=True)]

    # Zeros that vary over the mesh axes of the states, as a carry inside shard_map must.
    zeros = jnp.where(False, states[0][0].astype(jnp.float32), 0.0)
    start = ([zeros] * cell.states, [zeros] * cell.params)
    rows = (before, list(xs), list(cotangents))
    (d_init, d_params), d_xs = lax.scan(step, start, rows, reverse=not reverse)
    d_init = [d.astype(i.dtype) for d, i in zip(d_init, init, strict=True)]
    return d_init, d_xs, d_params, jnp.zeros(zeros.shape[0], jnp.int32)
