"""The traced step of a recurrence, as a function of its floating leaves."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxpara import compat
from jaxpara.recurrence.solve import explicit_meshes
from jaxpara.recurrence.structure import safe_derivatives
from jaxpara.recurrence.structure.tangent_flow import Flow, flow

# The name under which our own solve appears in a jaxpr. Its inside is known to be
# pure and is not searched for effects, collectives or custom rules of the user.
SOLVE_NAME = "jaxpara_solve"


class Body(NamedTuple):
    """The traced step, hashable: `(consts, carry, x) -> (carry, y)` on flat leaves.

    Attributes:
      jaxpr: the closed jaxpr of the step.
      consts: number of hoisted constants.
      carries: number of carry leaves.
      floats: positions of the floating leaves among the carries.
      aliases: for each output, the position in `floats` of the new carry leaf that it
        is, or None.
    """

    jaxpr: Any
    consts: int
    carries: int
    floats: tuple[int, ...]
    aliases: tuple[int | None, ...]

    @property
    def others(self) -> tuple[int, ...]:
        """Positions of the integer, boolean and key leaves among the carries."""
        return tuple(i for i in range(self.carries) if i not in self.floats)

    @property
    def inputs(self) -> int:
        """How many leaves `on_floats` takes as `x`."""
        return len(compat.open_jaxpr(self.jaxpr).invars) - self.consts - len(self.floats)

    def __call__(self, consts, carry, x):
        """One step on lists of leaves: `(carry, ys)`."""
        out = explicit_meshes.evaluate(self.jaxpr, [*consts, *carry, *x])
        return out[: self.carries], out[self.carries :]

    def on_floats(self, consts, state, x):
        """One step of only the floating leaves: `(state, ys)`, the other leaves leading `x`.

        Its derivatives do not overflow on the way, see `safe_derivatives`. Proofs read `jaxpr`.
        """
        carry: list[Any] = [None] * self.carries
        for position, leaf in zip(self.floats, state, strict=True):
            carry[position] = leaf
        for position, leaf in zip(self.others, x, strict=False):
            carry[position] = leaf
        jaxpr = safe_derivatives.safe(self.jaxpr, SOLVE_NAME)
        out = explicit_meshes.evaluate(jaxpr, [*consts, *carry, *x[len(self.others) :]])
        new, ys = out[: self.carries], out[self.carries :]
        kept = [y for y, alias in zip(ys, self.aliases, strict=True) if alias is None]
        return [new[i] for i in self.floats], kept


@functools.lru_cache(maxsize=512)
def flow_of(body: Body) -> Flow:
    """How tangents flow through `body.on_floats`, inputs and outputs numbered as it has them."""
    outvars = compat.open_jaxpr(body.jaxpr).outvars[body.carries :]
    ys = [
        body.carries + i
        for i, (var, alias) in enumerate(zip(outvars, body.aliases, strict=True))
        if alias is None and jnp.issubdtype(var.aval.dtype, jnp.inexact)
    ]
    state = [body.consts + i for i in body.floats]
    return flow(body.jaxpr, body.consts, state, body.floats, ys, (SOLVE_NAME,))
