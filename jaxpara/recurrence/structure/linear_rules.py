"""Whether the custom rules in a step are derivatives: linear in the tangent or cotangent.

The implicit derivative solves one linear recurrence. A rule that is not linear, such as one that
clips gradients, has no such derivative. Only the way of `lax.scan`, step after step, gives what
its author means. A rule counts as linear if its equations prove it.
"""

import functools
from collections.abc import Collection, Sequence
from enum import IntEnum
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxpara import compat, jaxprs
from jaxpara.recurrence.structure import custom_jvps
from jaxpara.recurrence.structure.custom_vjps import backward, pushable
from jaxpara.recurrence.structure.propagate import UNKNOWN, floating


class Kind(IntEnum):
    """What a value is to the tangents or cotangents; the larger wins where two meet."""

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


_OTHER = "the step holds a custom_jvp or custom_vjp whose rule is not proved to be linear"
_CLOSES_OVER = "the step holds a custom_vjp that closes over the carry: pass it as an argument"


@functools.lru_cache(maxsize=256)
def obstacle(jaxpr: Any, carry: tuple[int, ...], skip: Collection[str]) -> str | None:
    """Why a step has no derivative, or custom rules that may be none; None if all are linear.

    Args:
      jaxpr: closed.
      carry: positions of the inputs by which the step must have a derivative.
      skip: names of jitted functions whose `custom_jvp` are linear.

    Returns:
      A reason where a primitive has no rule, where a custom rule is not linear or cannot be looked
      into, or where a `custom_vjp` closes over the carry.
    """
    try:
        found = jaxprs.equations(jaxpr, skip=skip)
        own = [e for e in found if e.primitive.name == "custom_jvp_call"]
        if not all(map(_linear_push, own)):
            return _OTHER
        moving = [i in carry for i in range(len(compat.open_jaxpr(jaxpr).invars))]
        if jaxprs.contains(jaxpr, "custom_vjp_call"):
            moving = pushable(jaxpr)
            if not all(moving[i] for i in carry):
                return _CLOSES_OVER
        try:
            pushed, _ = compat.jvp_jaxpr(jaxpr, moving)
        except UNKNOWN as error:  # as lax.scan, it runs until somebody differentiates it
            return f"the step has no derivative: {str(error).partition(chr(10))[0]}"
        rules = [e for e in jaxprs.equations(pushed) if e.primitive.name == "custom_lin"]
        return None if all(map(_linear, rules)) else _OTHER
    except UNKNOWN:
        return _OTHER


def linear_in(jaxpr: Any, fixed: int, *, rounding: bool = False) -> bool:
    """Whether the equations of a function prove it linear.

    Args:
      jaxpr: closed.
      fixed: how many of its first inputs are fixed; it is to be linear in the others together.
      rounding: casts to fewer bits count as linear.

    Returns:
      True if every output is.
    """
    count = len(compat.open_jaxpr(jaxpr).invars)
    outs = _flow(jaxpr, [Kind.FIXED] * fixed + [Kind.LINEAR] * (count - fixed), rounding)
    return all(kind in (Kind.ZERO, Kind.LINEAR) for kind in outs)


def _keeps(eqn: Any, rounding: bool) -> bool:
    """Whether a cast is linear: to more bits, or to fewer where that is allowed."""
    old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    both = all(floating(v.aval) for v in (eqn.invars[0], eqn.outvars[0]))
    return both and (rounding or jnp.finfo(new).nmant >= jnp.finfo(old).nmant)


def _filling(eqn: Any) -> bool:
    """Whether what a gather finds outside of its operand is not 0."""
    filled = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    return filled and eqn.params["fill_value"] != 0


def _linear_push(eqn: Any) -> bool:
    """Whether the rule of a `custom_jvp` is linear; JAX's own are.

    It may round, as the tangent of a cast does.
    """
    own = compat.jax_sources(eqn)[1]
    return bool(own) or linear_in(*custom_jvps.pushed(eqn), rounding=True)


def _linear(eqn: Any) -> bool:
    return linear_in(backward(eqn), eqn.params["num_res"])


def _together(kinds: Sequence[Kind]) -> Kind:
    """Of a sum: what is fixed and not zero would be added to what is linear."""
    met = {kind for kind in kinds if kind is not Kind.ZERO}
    return Kind.OTHER if len(met) > 1 else max(met, default=Kind.ZERO)


def _primitive(eqn: Any, operands: list[Kind], rounding: bool) -> Kind:
    name = eqn.primitive.name
    if name in _SUMS:
        choosing = _CHOOSING.get(name, lambda n: ())(len(operands))
        if any(operands[i] > Kind.FIXED for i in choosing):
            return Kind.OTHER
        if name == "convert_element_type" and operands[0] is Kind.LINEAR:
            return Kind.LINEAR if _keeps(eqn, rounding) else Kind.OTHER
        entering = [kind for i, kind in enumerate(operands) if i not in choosing]
        if name == "gather" and _filling(eqn):
            entering.append(Kind.FIXED)
        return _together(entering)
    if name in _PRODUCTS and Kind.OTHER not in operands:
        if Kind.ZERO in operands:
            return Kind.ZERO
        if operands.count(Kind.LINEAR) == 1:
            return Kind.LINEAR
    if name == "div" and operands[1] <= Kind.FIXED and operands[0] is not Kind.OTHER:
        return operands[0]
    if name == "triangular_solve" and operands[0] <= Kind.FIXED and operands[1] is not Kind.OTHER:
        return operands[1]
    return Kind.OTHER if max(operands, default=Kind.FIXED) > Kind.FIXED else Kind.FIXED


def _scan(eqn: Any, ins: list[Kind], rounding: bool) -> list[Kind]:
    body, consts, carries = compat.scan_parts(eqn)
    fixed, carry, xs = ins[:consts], ins[consts : consts + carries], ins[consts + carries :]
    while True:
        new = _flow(body, fixed + carry + xs, rounding)
        grown = [_together(pair) for pair in zip(carry, new[:carries], strict=True)]
        if grown == carry:
            return [*carry, *new[carries:]]
        carry = grown


def _cond(eqn: Any, ins: list[Kind], rounding: bool) -> list[Kind]:
    branches = [_flow(branch, ins[1:], rounding) for branch in eqn.params["branches"]]
    if ins[0] > Kind.FIXED:
        return [Kind.OTHER] * len(eqn.outvars)
    return [_together(outs) for outs in zip(*branches, strict=True)]


def _linear_solve(eqn: Any, ins: list[Kind], rounding: bool) -> list[Kind]:
    """The value of a linear solve is what its `solve` function computes."""
    given = eqn.params["const_lengths"]
    own = given.matvec + given.vecmat
    closed, right = ins[own : own + given.solve], ins[sum(given) :]
    return _flow(eqn.params["jaxprs"].solve, closed + right, rounding)


_CONTROL = {"scan": _scan, "cond": _cond, "custom_linear_solve": _linear_solve}


def _flow(jaxpr: Any, ins: Sequence[Kind], rounding: bool) -> list[Kind]:
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
            outs = _flow(inner, operands, rounding)
        elif name in _CONTROL:
            outs = _CONTROL[name](eqn, operands, rounding)
        else:
            outs = [_primitive(eqn, operands, rounding)] * len(eqn.outvars)
        kinds.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in opened.outvars]
