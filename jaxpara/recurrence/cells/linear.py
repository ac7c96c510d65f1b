"""Controls: cells that are linear in their state, so that one Newton iteration solves them.

`h' = a(x) h + b(x)` with `0 < a < 1`. They cannot count modulo two [pararnn], which is why a
comparison needs them.
"""

import jax
import jax.numpy as jnp

from jaxpara.recurrence.cells.common import assemble, check_sizes
from jaxpara.types import Cell


def mingru(
    features: int,
    hidden: int,
    *,
    time_constants: tuple[float, float] = (1.0, 64.0),
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
    check_sizes(features=features, hidden=hidden)

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
    time_constants: tuple[float, float] = (1.0, 64.0),
) -> Cell:
    """A linear recurrence with an input-dependent decay in (0, 1).

    `a = sigmoid(x_a)`, `h' = a h + sqrt(1 - a^2) x_u`: white noise of unit variance keeps unit
    variance whatever the decay.

    Args:
      features: size of an input.
      hidden: number of units.
      time_constants: the decay's bias starts at `log(tau)`, `tau` log-uniform between these
        two numbers of steps.

    Returns:
      A cell with carry `h[..., hidden]` and output `h`.

    Raises:
      ValueError: if a size or `time_constants` is out of range.

    References: [mamba].
    """
    check_sizes(features=features, hidden=hidden)

    def step(_, h, gates):
        x_a, x_u = gates
        a = jax.nn.sigmoid(x_a)
        # sqrt(1 - a^2) by its factors: 1 - a = sigmoid(-x_a) neither cancels nor has an
        # infinite slope under the root.
        h = a * h + jnp.exp(0.5 * jax.nn.log_sigmoid(-x_a)) * jnp.sqrt(1 + a) * x_u
        return h, h

    gates = {"decay": 1, "input": 0}
    return assemble(step, features, (hidden,), gates=gates, time_constants=time_constants)
