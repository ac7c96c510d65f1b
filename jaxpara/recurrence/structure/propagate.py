"""Follows the entries of some inputs through a jaxpr, equation by equation.

An abstract interpreter of jaxprs that are linear in the followed values (tangents).
It knows control flow and calls, and leaves the inside of one primitive to a
`Domain`. Predicates and indices are not followed: they decide which linear map is
applied and are not part of it. Values that are not floating are not followed either.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxpara import compat, jaxprs


class NotAnalysable(Exception):
    """The jaxpr does something whose reach cannot be bounded (mutable references)."""


# Nothing is known then: no rule here, or no derivative, of which JAX's rules and users' tell by
# errors of all these types.
UNKNOWN = (NotAnalysable, NotImplementedError, TypeError, ValueError)


class Domain(NamedTuple):
    """What is remembered of a value; `None` always means that nothing reaches it.

    Attributes:
      apply: `(equation, operands) -> outputs` for one primitive.
      move: `(equation, operands, table) -> outputs` by a table as that of `axis_moves.moves`.
      join: `(a, b) -> c`, what may be reached along either way.
      unstack: the value of one slice of a scanned input.
      stack: the value of the stacked slices of a scanned output.
      mapped: `(run, scanned inputs) -> scanned outputs` where `run` maps slices to
        slices: what reaches a slice from the inputs' slices of the same step.
    """

    apply: Callable[[Any, list], list]
    move: Callable[[Any, list, Any], list]
    join: Callable[[Any, Any], Any]
    unstack: Callable[[Any, Any], Any]
    stack: Callable[[Any, Any], Any]
    mapped: Callable[[Callable[[list], list], list], list]


Rules = Mapping[str, Callable[[Any, list, Domain], list]]
"""Primitive or jit name -> `(equation, operands, domain) -> outputs`."""


def _join(domain: Domain, a, b):
    if a is None or b is None:
        return b if a is None else a
    return domain.join(a, b)


def _same(a, b) -> bool:
    if a is None or b is None:
        return a is b
    return bool((a == b).all()) if isinstance(a, np.ndarray) else a == b


def _fixpoint(domain, step, carry):
    """Grow the carry until one more step adds nothing."""
    while True:
        grown = [_join(domain, a, b) for a, b in zip(carry, step(carry), strict=True)]
        if all(_same(a, b) for a, b in zip(grown, carry, strict=True)):
            return carry
        carry = grown


def _while(eqn, ins, domain, known):
    skip, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    fixed, carry = ins[skip : skip + consts], ins[skip + consts :]
    body = eqn.params["body_jaxpr"]
    return _fixpoint(domain, lambda c: propagate(body, fixed + c, domain, known), carry)


def _scan(eqn, ins, domain, known):
    body, consts, carries = compat.scan_parts(eqn)
    fixed, carry = ins[:consts], ins[consts : consts + carries]
    xs = [
        None if value is None else domain.unstack(value, var.aval)
        for value, var in zip(ins[consts + carries :], eqn.invars[consts + carries :], strict=True)
    ]

    def step(c, x):
        return propagate(body, fixed + c + x, domain, known)

    carry = _fixpoint(domain, lambda c: step(c, xs)[:carries], carry)
    # The body is linear: what comes by way of the carry and what comes straight
    # from this step's slices add up, and only the former mixes the steps.
    nothing = [None] * (consts + carries)
    straight = domain.mapped(
        lambda x: propagate(body, nothing + x, domain, known)[carries:], ins[consts + carries :]
    )
    late = step(carry, [None] * len(xs))[carries:]
    ys = [
        _join(domain, a, None if b is None else domain.stack(b, var.aval))
        for a, b, var in zip(straight, late, eqn.outvars[carries:], strict=True)
    ]
    return carry + ys


def _cond(eqn, ins, domain, known):
    outs, *others = [propagate(b, ins[1:], domain, known) for b in eqn.params["branches"]]
    for other in others:
        outs = [_join(domain, a, b) for a, b in zip(outs, other, strict=True)]
    return outs


def _linear_solve(eqn, ins, domain, known):
    """The value of a custom linear solve is what its `solve` function computes."""
    lengths, inner = eqn.params["const_lengths"], eqn.params["jaxprs"]
    before = lengths.matvec + lengths.vecmat
    consts = ins[before : before + lengths.solve]
    rhs = ins[sum(lengths) :]
    return propagate(inner.solve, consts + rhs, domain, known)


CONTROL = {
    "while": _while,
    "scan": _scan,
    "cond": _cond,
    "custom_linear_solve": _linear_solve,
}


def floating(aval: Any) -> bool:
    """Whether a type is that of floating numbers, which have tangents."""
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.inexact)


def propagate(jaxpr: Any, ins: Sequence[Any], domain: Domain, known: Rules | None = None) -> list:
    """Push the inputs' values of an abstract domain through a jaxpr.

    Args:
      jaxpr: an open or closed jaxpr, linear in the inputs that are not None.
      ins: one value of the domain, or None, for each input.
      domain: what is remembered of a value.
      known: rules that override, by primitive name or by the name of a jitted
        function, what would be found by looking inside.

    Returns:
      One value of the domain, or None, for each output.

    Raises:
      NotAnalysable: something followed is written to a mutable reference.
    """
    jaxpr = compat.open_jaxpr(jaxpr)
    known = known or {}
    reach = {var: value for var, value in zip(jaxpr.invars, ins, strict=True) if value is not None}

    def read(atom):
        return None if isinstance(atom, core.Literal) else reach.get(atom)

    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        if all(value is None for value in operands):
            continue
        if any("Ref" in type(v.aval).__name__ for v in [*eqn.invars, *eqn.outvars]):
            raise NotAnalysable(f"{eqn.primitive.name} passes a followed value through a reference")
        name = eqn.primitive.name
        rule = known.get(name) or known.get(eqn.params.get("name", ""))
        if rule is not None:
            outs = rule(eqn, operands, domain)
        elif (inner := jaxprs.called(eqn)) is not None:
            outs = propagate(inner, operands, domain, known)
        elif name in CONTROL:
            outs = CONTROL[name](eqn, operands, domain, known)
        else:
            outs = domain.apply(eqn, operands)
        for var, value in zip(eqn.outvars, outs, strict=True):
            if value is not None and floating(var.aval):
                reach[var] = value
    return [read(v) for v in jaxpr.outvars]
