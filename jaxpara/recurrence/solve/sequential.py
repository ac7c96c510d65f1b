"""The sequential solver: `lax.scan` over the true step, with an implicit adjoint."""

import jax.numpy as jnp
from jax import lax

from jaxpara.recurrence.system import Leaves, Settings, Solution, System


def sequential(system: System, settings: Settings, guess: Leaves | None = None) -> Solution:
    """Runs the recurrence step by step.

    Raises:
      ValueError: time is sharded over a mesh axis.
    """
    del guess  # Nothing to start from: every state is computed once.
    if settings.axis is not None:
        raise ValueError(
            f"a sequential solve cannot run with time sharded over {settings.axis!r}; "
            "use shooting(axis=...) or gather the sequence first"
        )

    states, ys, diagnostics = only_kept(system, tuple(range(len(system.init))))
    return Solution(states[1], ys, *diagnostics)


def only_kept(system: System, keep: tuple[int, ...]):
    """Runs the recurrence step by step and stores only the states of the leaves `keep`.

    Returns:
      `((end, kept states), outputs, diagnostics)`, the last as in `Solution`.
    """

    def step(state, x):
        state, ys = system.step(state, x)
        return list(state), ([state[i] for i in keep], ys)

    init = list(system.init)
    end, (kept, ys) = lax.scan(step, init, system.xs, unroll=system.unroll)
    zero = jnp.zeros((), jnp.int32)
    starts = [leaf[None] for leaf in init]
    return (end, kept), list(ys), (jnp.ones((), bool), zero, jnp.zeros(()), zero, starts)
