"""Whether a `custom_vjp` in a step is a derivative: linear in the cotangent.

The implicit adjoint solves one linear recurrence. A backward rule that is not linear, such as one
that clips gradients, has no such adjoint. Only the way of `lax.scan`, step after step, gives what
its author means. A rule counts as linear if its equations prove it.
"""

import functools
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxpara import compat, jaxprs
from jaxpara.recurrence.structure.custom_vjps import backward


class Kind(IntEnum):
    """What a value is to the cotangents; the larger wins where two meet."""

    ZERO = 0
    FIXED = 1
    LINEAR = 2
    OTHER = 3


# Linear in all of their operands together.
_SUMS = frozenset(
    """
    add add_any sub neg reduce_sum cumsum broadcast_in_dim reshape transpose squeeze expand_dims
    slice pad concatenate rev stack unstack split copy copy_p real imag convert_element_type
    optimization_barrier stop_gradient reduce_window_sum pvary pcast sharding_constraint reshard
    select_n gather dynamic_slice dynamic_update_slice scatter-add scatter_add
    """.split()
)
# Linear in each operand while the others are fixed.
_PRODUCTS = frozenset({"mul", "dot_general", "conv_general_dilated"})
# Operands that choose, by position; they must be fixed.
_CHOOSING = {
    "select_n": lambda n: range(1),
    "gather": lambda n: range(1, n),
    "dynamic_slice": lambda n: range(1, n),
    "dynamic_update_slice": lambda n: range(2, n),
    "scatter-add": lambda n: range(1, 2),
    "scatter_add": lambda n: range(1, 2),
}


@functools.lru_cache(maxsize=256)
def all_linear(jaxpr: Any) -> bool:
    """Whether every `custom_vjp` in the jaxpr of a step is proved to be linear.

    Args:
      jaxpr: closed.

    Returns:
      False where one is not, or where its rule cannot be looked into.
    """
    if not jaxprs.contains(jaxpr, "custom_vjp_call"):
        return True
    inputs = compat.open_jaxpr(jaxpr).invars
    floating = [_floating(var.aval) for var in inputs]
    try:
        pushed, _ = compat.jvp_jaxpr(jaxpr, floating)
        rules = [e for e in jaxprs.equations(pushed) if e.primitive.name == "custom_lin"]
        return all(map(_linear, rules))
    except (NotImplementedError, TypeError, ValueError):
        return False


def linear_in(jaxpr: Any, fixed: int) -> bool:
    """Whether the equations of a function prove it linear.

    Args:
      jaxpr: closed.
      fixed: how many of its first inputs are fixed; it is to be linear in the others together.

    Returns:
      True if every output is.
    """
    count = len(compat.open_jaxpr(jaxpr).invars)
    outs = _flow(jaxpr, [Kind.FIXED] * fixed + [Kind.LINEAR] * (count - fixed))
    return all(kind in (Kind.ZERO, Kind.LINEAR) for kind in outs)


def _floating(aval: Any) -> bool:
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.inexact)


def _widening(eqn: Any) -> bool:
    old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    both = all(_floating(v.aval) for v in (eqn.invars[0], eqn.outvars[0]))
    return both and jnp.finfo(new).nmant >= jnp.finfo(old).nmant


def _filling(eqn: Any) -> bool:
    """Whether what a gather finds outside of its operand is not 0."""
    filled = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    return filled and eqn.params["fill_value"] != 0


def _linear(eqn: Any) -> bool:
    return linear_in(backward(eqn), eqn.params["num_res"])


def _together(kinds: Sequence[Kind]) -> Kind:
    """Of a sum: what is fixed and not zero would be added to what is linear."""
    met = {kind for kind in kinds if kind is not Kind.ZERO}
    return Kind.OTHER if len(met) > 1 else max(met, default=Kind.ZERO)


def _primitive(eqn: Any, operands: list[Kind]) -> Kind:
    name = eqn.primitive.name
    if name in _SUMS:
        choosing = _CHOOSING.get(name, lambda n: ())(len(operands))
        if any(operands[i] > Kind.FIXED for i in choosing):
            return Kind.OTHER
        if name == "convert_element_type" and operands[0] is Kind.LINEAR and not _widening(eqn):
            return Kind.OTHER
        if name == "gather" and operands[0] is Kind.LINEAR and _filling(eqn):
            return Kind.OTHER
        return _together([kind for i, kind in enumerate(operands) if i not in choosing])
    if name in _PRODUCTS and operands.count(Kind.LINEAR) == 1 and Kind.OTHER not in operands:
        return Kind.LINEAR
    if name == "div" and operands[1] <= Kind.FIXED and operands[0] is not Kind.OTHER:
        return operands[0]
    if name == "triangular_solve" and operands[0] <= Kind.FIXED and operands[1] is not Kind.OTHER:
        return operands[1]
    return Kind.OTHER if max(operands, default=Kind.FIXED) > Kind.FIXED else Kind.FIXED


def _scan(eqn: Any, ins: list[Kind]) -> list[Kind]:
    body, consts, carries = compat.scan_parts(eqn)
    fixed, carry, xs = ins[:consts], ins[consts : consts + carries], ins[consts + carries :]
    while True:
        new = _flow(body, fixed + carry + xs)
        grown = [_together(pair) for pair in zip(carry, new[:carries], strict=True)]
        if grown == carry:
            return [*carry, *new[carries:]]
        carry = grown


def _cond(eqn: Any, ins: list[Kind]) -> list[Kind]:
    branches = [_flow(branch, ins[1:]) for branch in eqn.params["branches"]]
    if ins[0] > Kind.FIXED:
        return [Kind.OTHER] * len(eqn.outvars)
    return [_together(outs) for outs in zip(*branches, strict=True)]


def _flow(jaxpr: Any, ins: Sequence[Kind]) -> list[Kind]:
    opened = compat.open_jaxpr(jaxpr)
    kinds: dict[Any, Kind] = dict(zip(opened.invars, ins, strict=True))

    def read(atom: Any) -> Kind:
        if isinstance(atom, core.Literal):
            return Kind.FIXED if np.any(atom.val) else Kind.ZERO
        return kinds.get(atom, Kind.FIXED)

    for eqn in opened.eqns:
        operands = [read(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        if name == "custom_lin":
            fixed = eqn.params["num_res"]
            one = _together(operands[fixed:]) if _linear(eqn) else Kind.OTHER
            outs = [one] * len(eqn.outvars)
        elif (inner := jaxprs.called(eqn)) is not None:
            outs = _flow(inner, operands)
        elif name in ("scan", "cond"):
            outs = {"scan": _scan, "cond": _cond}[name](eqn, operands)
        else:
            outs = [_primitive(eqn, operands)] * len(eqn.outvars)
        kinds.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in opened.outvars]
