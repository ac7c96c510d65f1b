"""Controls: cells that are linear in their state, so that one Newton iteration solves them.

`h' = a(x) h + b(x)`. With `0 < a < 1` they cannot count modulo two [pararnn]. A comparison
therefore needs them as controls. With decays of both signs they can count modulo two.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxpara.recurrence.cells.common import assemble
from jaxpara.sizes import positive
from jaxpara.types import Cell


def min_gru(
    features: int,
    hidden: int,
    *,
    time_constants: Sequence[float] = (1.0, 64.0),
) -> Cell:
    """The minGRU: a GRU whose gate and candidate do not see the state.

    `z = sigmoid(x_z)`, `h' = (1 - z) h + z x_n`.

    Args:
      features: size of an input.
      hidden: number of units.
      time_constants: the gate's bias starts at `-log(tau)`, `tau` log-uniform between these
        two numbers of steps.

    Returns:
      A cell with carry `h[..., hidden]` and output `h`.

    Raises:
      ValueError: if a size or `time_constants` is out of range.

    References: [mingru].
    """
    positive(features=features, hidden=hidden)

    def step(_, h, gates):
        x_z, x_n = gates
        h = h + jax.nn.sigmoid(x_z) * (x_n - h)
        return h, h

    gates = {"update": -1, "candidate": 0}
    return assemble(step, features, (hidden,), gates=gates, time_constants=time_constants)


def linear(
    features: int,
    hidden: int,
    *,
    decays: Sequence[float] = (0.0, 1.0),
    time_constants: Sequence[float] = (1.0, 64.0),
) -> Cell:
    """A linear recurrence with an input-dependent decay between two bounds.

    `a = low + (high - low) sigmoid(x_a)`, `h' = a h + sqrt(1 - a^2) x_u`: white noise of unit
    variance keeps unit variance whatever the decay.

    Args:
      features: size of an input.
      hidden: number of units.
      decays: low and high; with `(-1, 1)` an input can flip the state, and parity is within reach
        [negative_eigenvalues].
      time_constants: the decay's bias starts at `log(tau)`, `tau` log-uniform between these
        two numbers of steps.

    Returns:
      A cell with carry `h[..., hidden]` and output `h`.

    Raises:
      ValueError: if a size, `decays` or `time_constants` is out of range.

    References: [mamba], [negative_eigenvalues].
    """
    positive(features=features, hidden=hidden)
    low, high = decays
    if not -1 <= low < high <= 1:
        raise ValueError(f"decays={decays} must be (low, high) with -1 <= low < high <= 1")

    def root(least, x):
        # sqrt(least + (high - low) sigmoid(x)). Where the least is 0 this neither cancels nor has
        # an infinite slope under the root.
        if least == 0:
            return (high - low) ** 0.5 * jnp.exp(0.5 * jax.nn.log_sigmoid(x))
        return jnp.sqrt(least + (high - low) * jax.nn.sigmoid(x))

    def step(_, h, gates):
        x_a, x_u = gates
        a = low + (high - low) * jax.nn.sigmoid(x_a)
        # 1 - a^2 by its factors 1 - a and 1 + a.
        h = a * h + root(1 - high, -x_a) * root(1 + low, x_a) * x_u
        return h, h

    gates = {"decay": 1, "input": 0}
    return assemble(step, features, (hidden,), gates=gates, time_constants=time_constants)
