"""Nonlinear cells whose recurrent weights are vectors: unit i sees only its own past.

The Jacobian of a step is then diagonal (GRU, Elman), 2x2 (LSTM) or 4x4 (sLSTM) for each
unit. This makes Newton's method over time cheap [pararnn]. Units mix through the input
projection of the next layer.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxpara.recurrence.cells.common import assemble
from jaxpara.sizes import positive
from jaxpara.types import Cell


def para_gru(
    features: int,
    hidden: int,
    *,
    clip: float | None = None,
    scale: float = 0.5,
    time_constants: Sequence[float] = (1.0, 64.0),
) -> Cell:
    """A GRU with elementwise recurrent weights, the reset gate inside the candidate.

    `z = sigmoid(x_z + a_z h)`, `r = sigmoid(x_r + a_r h)`, `n = tanh(x_n + a_n r h)`,
    `h' = (1 - z) h + z n`, with `(x_z, x_r, x_n) = x W + b`.

    Args:
      features: size of an input.
      hidden: number of units.
      clip: if given, the recurrent weights are used as if within `±clip` (gradient straight
        through); None leaves them free.
      scale: recurrent weights start uniform in `±scale`.
      time_constants: the update gate's bias starts at `-log(tau)`, `tau` log-uniform between
        these two numbers of steps.

    Returns:
      A cell with carry `h[..., hidden]` and output `h`.

    Raises:
      ValueError: if a size, `clip` or `time_constants` is out of range.

    References: [gru], [pararnn].
    """
    positive(features=features, hidden=hidden)

    def step(a, h, gates):
        x_z, x_r, x_n = gates
        z = jax.nn.sigmoid(x_z + a["update"] * h)
        r = jax.nn.sigmoid(x_r + a["reset"] * h)
        n = jnp.tanh(x_n + a["candidate"] * (r * h))
        h = h + z * (n - h)
        return h, h

    return assemble(
        step,
        features,
        (hidden,),
        gates={"update": -1, "reset": 0, "candidate": 0},
        recurrent=("update", "reset", "candidate"),
        shape=(hidden,),
        half_width=scale,
        clip=clip,
        time_constants=time_constants,
    )


def para_lstm(
    features: int,
    hidden: int,
    *,
    clip: float | None = None,
    scale: float = 0.5,
    time_constants: Sequence[float] = (1.0, 64.0),
) -> Cell:
    """An LSTM with elementwise recurrences, coupled input gate and peepholes.

    `f = sigmoid(x_f + a_f h + p_f c)`, `g = tanh(x_g + a_g h)`, `c' = f c + (1 - f) g`,
    `o = sigmoid(x_o + a_o h + p_o c')`, `h' = o tanh(c')`: the input gate is `1 - f`, and the
    output gate sees the new `c'`.

    Args:
      features: size of an input.
      hidden: number of units.
      clip: if given, recurrent weights and peepholes are used as if within `±clip` (gradient
        straight through); None leaves them free.
      scale: recurrent weights and peepholes start uniform in `±scale`.
      time_constants: the forget gate's bias starts at `log(tau)`, `tau` log-uniform between
        these two numbers of steps.

    Returns:
      A cell with carry `(c, h)`, each `[..., hidden]`, and output `h`.

    Raises:
      ValueError: if a size, `clip` or `time_constants` is out of range.

    References: [lstm], [cifg], [peephole], [pararnn].
    """
    positive(features=features, hidden=hidden)

    def step(a, carry, gates):
        c, h = carry
        x_f, x_g, x_o = gates
        f = jax.nn.sigmoid(x_f + a["forget"] * h + a["peephole_forget"] * c)
        g = jnp.tanh(x_g + a["candidate"] * h)
        c = g + f * (c - g)
        o = jax.nn.sigmoid(x_o + a["output"] * h + a["peephole_output"] * c)
        h = o * jnp.tanh(c)
        return (c, h), h

    return assemble(
        step,
        features,
        (hidden,),
        gates={"forget": 1, "candidate": 0, "output": 0},
        states=2,
        recurrent=("forget", "candidate", "output", "peephole_forget", "peephole_output"),
        shape=(hidden,),
        half_width=scale,
        clip=clip,
        time_constants=time_constants,
    )


def elman(
    features: int,
    hidden: int,
    *,
    clip: float | None = None,
    scale: float = 0.5,
) -> Cell:
    """The simple recurrent network with an elementwise recurrence.

    `h' = tanh(x_h + a h)`.

    Args:
      features: size of an input.
      hidden: number of units.
      clip: if given, recurrent weights are used as if within `±clip` (gradient straight
        through); None leaves them free.
      scale: recurrent weights start uniform in `±scale`.

    Returns:
      A cell with carry `h[..., hidden]` and output `h`.

    Raises:
      ValueError: if a size or `clip` is out of range.

    References: [elman].
    """
    positive(features=features, hidden=hidden)

    def step(a, h, gates):
        (x_h,) = gates
        h = jnp.tanh(x_h + a["hidden"] * h)
        return h, h

    return assemble(
        step,
        features,
        (hidden,),
        gates={"hidden": 0},
        recurrent=("hidden",),
        shape=(hidden,),
        half_width=scale,
        clip=clip,
    )


def slstm(
    features: int,
    hidden: int,
    *,
    clip: float | None = None,
    scale: float = 0.5,
    time_constants: Sequence[float] = (1.0, 64.0),
) -> Cell:
    """The sLSTM: exponential input gate, normaliser state, stabiliser; elementwise recurrences.

    With `g = tanh(x_g + a_g h)`, `i = x_i + a_i h`, `f = log sigmoid(x_f + a_f h)`,
    `o = sigmoid(x_o + a_o h)`:
    `m' = max(f + m, i)`, `c' = exp(f + m - m') c + exp(i - m') g`,
    `n' = exp(f + m - m') n + exp(i - m')`, `h' = o c' / n'`.
    `h` does not depend on `m`, which only keeps `exp(i)` from overflowing.

    Args:
      features: size of an input.
      hidden: number of units.
      clip: if given, recurrent weights are used as if within `±clip` (gradient straight
        through); None leaves them free.
      scale: recurrent weights start uniform in `±scale`.
      time_constants: the forget gate's bias starts at `log(tau)`, `tau` log-uniform between
        these two numbers of steps.

    Returns:
      A cell with carry `(c, n, m, h)`, each `[..., hidden]`, and output `h`.

    Raises:
      ValueError: if a size, `clip` or `time_constants` is out of range.

    References: [xlstm].
    """
    positive(features=features, hidden=hidden)

    def step(a, carry, gates):
        c, n, m, h = carry
        x_g, x_i, x_f, x_o = gates
        g = jnp.tanh(x_g + a["candidate"] * h)
        log_input = x_i + a["input"] * h
        # n = 0 marks the empty start, where m is log 0 and not 0: else exp(i - m') underflows
        # for i < -87 and h is 0 / 0. From then on n >= 1. A branch on n would jump, and a solver
        # could not tell the error of a state from its next correction.
        empty = jnp.maximum(1 - 2 * n, 0) * float(jnp.finfo(n.dtype).max) ** 0.75
        log_keep = jax.nn.log_sigmoid(x_f + a["forget"] * h) + m - empty
        o = jax.nn.sigmoid(x_o + a["output"] * h)
        m = jnp.maximum(log_keep, log_input)
        keep, write = jnp.exp(log_keep - m), jnp.exp(log_input - m)
        c = keep * c + write * g
        n = keep * n + write
        h = o * c / n
        return (c, n, m, h), h

    return assemble(
        step,
        features,
        (hidden,),
        gates={"candidate": 0, "input": 0, "forget": 1, "output": 0},
        states=4,
        recurrent=("candidate", "input", "forget", "output"),
        shape=(hidden,),
        half_width=scale,
        clip=clip,
        time_constants=time_constants,
    )
