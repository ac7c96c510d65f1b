"""What a `custom_vjp` mixes, proved from its backward rule.

JAX keeps the rule as `custom_lin`, an equation that only a transpose can enter. So it is
transposed, and the way of the axes through the transpose is read backwards: where an axis of a
cotangent keeps its index on the way in, that axis keeps its index on the way out.
"""

from typing import Any

import jax

from jaxpara import compat, jaxprs
from jaxpara.recurrence.structure.axis_moves import Sources
from jaxpara.recurrence.structure.axis_patterns import axis_patterns, whole_axes
from jaxpara.recurrence.structure.propagate import UNKNOWN, floating, propagate


def backward(eqn: Any) -> Any:
    """The closed jaxpr of (residuals, output cotangents) -> operand cotangents."""
    count = eqn.params["num_res"]
    shapes = [like(v.aval) for v in eqn.invars]

    def pulled(residuals, cotangents):
        def pushed(*tangents):
            return compat.bind(eqn, [*residuals, *tangents])

        return jax.linear_transpose(pushed, *shapes[count:])(list(cotangents))

    out = [like(v.aval) for v in eqn.outvars]
    return jax.make_jaxpr(pulled)(shapes[:count], out)


def like(aval: Any) -> jax.ShapeDtypeStruct:
    """Its shape, on the Explicit mesh that it was traced on."""
    mesh = aval.sharding.mesh
    return jax.ShapeDtypeStruct(
        aval.shape, aval.dtype, sharding=None if mesh.empty else aval.sharding
    )


def pushable(jaxpr: Any) -> list[bool]:
    """Inputs of a closed jaxpr that have tangents: floating, and no `custom_vjp` closes over them.

    JAX refuses to differentiate by what such a function closes over.
    """
    inputs = [floating(var.aval) for var in compat.open_jaxpr(jaxpr).invars]
    if not jaxprs.contains(jaxpr, "custom_vjp_call") or compat.takes_tangents(jaxpr, inputs):
        return inputs
    count = len(inputs)
    return [
        taken and compat.takes_tangents(jaxpr, [i == k for k in range(count)])
        for i, taken in enumerate(inputs)
    ]


def custom_lin(eqn: Any, operands: list, domain: Any) -> list:
    """A rule for `propagate`: axes that the backward rule keeps, all others mixed."""
    try:
        return domain.move(eqn, operands, _table(eqn))
    except UNKNOWN:
        return domain.apply(eqn, operands)


RULES = {"custom_lin": custom_lin}


def _table(eqn) -> list[list[Sources | None]]:
    outs = [tuple(v.aval.shape) for v in eqn.outvars]
    count = eqn.params["num_res"]
    starts = [{k: whole_axes([(n,) for n in shape])} for k, shape in enumerate(outs)]
    found = propagate(backward(eqn), [None] * count + starts, axis_patterns(outs, set()), RULES)

    def sources(k: int, shape, value) -> Sources | None:
        if value is None or k not in value:
            return None
        back = {entry: axis for axis, entry in enumerate(value[k])}
        return tuple(back.get((p,)) for p in range(len(shape)))

    return [
        [None] * count + [sources(k, shape, value) for value in found]
        for k, shape in enumerate(outs)
    ]
