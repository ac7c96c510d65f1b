"""Cells whose units mix within heads: block-diagonal recurrent matrices [flashrnn].

Carries are `[..., heads, size]` with `size = hidden / heads`; `h R` below means
`h[k] R[k]` for each head k. With one unit a head it is the diagonal cell. With one head it is
the classical dense cell.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxpara.recurrence.cells.common import assemble
from jaxpara.sizes import positive
from jaxpara.types import Cell


def _head_size(hidden: int, heads: int) -> int:
    positive(hidden=hidden, heads=heads)
    if hidden % heads:
        divisors = [n for n in range(1, hidden + 1) if hidden % n == 0]
        raise ValueError(
            f"hidden={hidden} is not divisible by heads={heads}; use one of {divisors}"
        )
    return hidden // heads


def _mix(h: jax.Array, recurrent: jax.Array) -> jax.Array:
    return jnp.einsum("...ki,kij->...kj", h, recurrent)


def _flat(h: jax.Array) -> jax.Array:
    return h.reshape(*h.shape[:-2], -1)


def gru_heads(
    features: int,
    hidden: int,
    *,
    heads: int = 4,
    clip: float | None = None,
    scale: float = 0.5,
    time_constants: Sequence[float] = (1.0, 64.0),
) -> Cell:
    """A GRU with one recurrent matrix a head and gate, the reset gate inside the candidate.

    `z = sigmoid(x_z + h R_z)`, `r = sigmoid(x_r + h R_r)`, `n = tanh(x_n + (r h) R_n)`,
    `h' = (1 - z) h + z n`.

    Args:
      features: size of an input.
      hidden: number of units, a multiple of `heads`.
      heads: number of blocks.
      clip: if given, entries of the matrices are used as if within `±clip` (gradient straight
        through); None leaves them free.
      scale: entries start uniform in `±scale / sqrt(hidden / heads)`.
      time_constants: the update gate's bias starts at `-log(tau)`, `tau` log-uniform between
        these two numbers of steps.

    Returns:
      A cell with carry `h[..., heads, hidden / heads]` and output `[..., hidden]`.

    Raises:
      ValueError: if a size, `clip` or `time_constants` is out of range.

    References: [gru], [flashrnn].
    """
    positive(features=features)
    size = _head_size(hidden, heads)

    def step(recurrent, h, gates):
        x_z, x_r, x_n = gates
        z = jax.nn.sigmoid(x_z + _mix(h, recurrent["update"]))
        r = jax.nn.sigmoid(x_r + _mix(h, recurrent["reset"]))
        n = jnp.tanh(x_n + _mix(r * h, recurrent["candidate"]))
        h = h + z * (n - h)
        return h, _flat(h)

    return assemble(
        step,
        features,
        (heads, size),
        gates={"update": -1, "reset": 0, "candidate": 0},
        recurrent=("update", "reset", "candidate"),
        shape=(heads, size, size),
        half_width=scale * size**-0.5,
        clip=clip,
        time_constants=time_constants,
    )


def lstm_heads(
    features: int,
    hidden: int,
    *,
    heads: int = 4,
    clip: float | None = None,
    scale: float = 0.5,
    time_constants: Sequence[float] = (1.0, 64.0),
) -> Cell:
    """The classical four-gate LSTM with one recurrent matrix a head and gate.

    `i, f, o = sigmoid(x + h R)`, `g = tanh(x_g + h R_g)`, `c' = f c + i g`, `h' = o tanh(c')`.

    Args:
      features: size of an input.
      hidden: number of units, a multiple of `heads`.
      heads: number of blocks.
      clip: if given, entries of the matrices are used as if within `±clip` (gradient straight
        through); None leaves them free.
      scale: entries start uniform in `±scale / sqrt(hidden / heads)`.
      time_constants: the forget gate's bias starts at `log(tau)` and the input gate's at
        `-log(tau)`, `tau` log-uniform between these two numbers of steps.

    Returns:
      A cell with carry `(c, h)`, each `[..., heads, hidden / heads]`, and output
      `[..., hidden]`.

    Raises:
      ValueError: if a size, `clip` or `time_constants` is out of range.

    References: [lstm], [flashrnn].
    """
    positive(features=features)
    size = _head_size(hidden, heads)

    def step(recurrent, carry, gates):
        c, h = carry
        x_i, x_f, x_g, x_o = gates
        i = jax.nn.sigmoid(x_i + _mix(h, recurrent["input"]))
        f = jax.nn.sigmoid(x_f + _mix(h, recurrent["forget"]))
        g = jnp.tanh(x_g + _mix(h, recurrent["candidate"]))
        o = jax.nn.sigmoid(x_o + _mix(h, recurrent["output"]))
        c = f * c + i * g
        h = o * jnp.tanh(c)
        return (c, h), _flat(h)

    return assemble(
        step,
        features,
        (heads, size),
        gates={"input": -1, "forget": 1, "candidate": 0, "output": 0},
        states=2,
        recurrent=("input", "forget", "candidate", "output"),
        shape=(heads, size, size),
        half_width=scale * size**-0.5,
        clip=clip,
        time_constants=time_constants,
    )


def elman_heads(
    features: int,
    hidden: int,
    *,
    heads: int = 4,
    clip: float | None = None,
    scale: float = 0.5,
) -> Cell:
    """The simple recurrent network with one recurrent matrix a head.

    `h' = tanh(x_h + h R)`.

    Args:
      features: size of an input.
      hidden: number of units, a multiple of `heads`.
      heads: number of blocks.
      clip: if given, entries of the matrices are used as if within `±clip` (gradient straight
        through); None leaves them free.
      scale: entries start uniform in `±scale / sqrt(hidden / heads)`.

    Returns:
      A cell with carry `h[..., heads, hidden / heads]` and output `[..., hidden]`.

    Raises:
      ValueError: if a size or `clip` is out of range.

    References: [elman], [flashrnn].
    """
    positive(features=features)
    size = _head_size(hidden, heads)

    def step(recurrent, h, gates):
        (x_h,) = gates
        h = jnp.tanh(x_h + _mix(h, recurrent["hidden"]))
        return h, _flat(h)

    return assemble(
        step,
        features,
        (heads, size),
        gates={"hidden": 0},
        recurrent=("hidden",),
        shape=(heads, size, size),
        half_width=scale * size**-0.5,
        clip=clip,
    )
