"""Whether the derivative of a step tells how its value moves.

A Newton correction bounds the error of a solve only where the step's Jacobian is the derivative
of what the step computes. A `stop_gradient`, a custom rule (except the few listed in
`custom_jvps`), a rounding, a cast to fewer bits, an integer or a comparison on the way from the
carry to the carry breaks that link; inputs and outputs may hold any of them. So does a branch cut,
where a value jumps and its derivative does not (`atan2`, a complex logarithm). Kinks (`max`, `abs`,
`relu`) keep it: both sides have their own true derivative. But at a state that rests on one, the
derivative is that of one side and the next move may go to the other, so steps with kinks are told
apart. No proof sees how sharp a smooth function is: the square root of a square has a kink that is
not seen here.
"""

import functools
from collections.abc import Collection, Sequence
from enum import IntEnum
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxpara import compat, jaxprs
from jaxpara.recurrence.structure import custom_jvps
from jaxpara.recurrence.structure.linear_rules import linear_in

# Ways to multiply matrices that round nothing before they multiply.
_WIDE = frozenset({"DEFAULT", "F32_F32_F32", "F64_F64_F64"})


class Link(IntEnum):
    """How a value depends on the carry; the larger wins where two meet."""

    NONE = 0
    TRUE = 1
    KINKED = 2
    BROKEN = 3


# Continuous, and with JAX's derivative equal to the true one wherever that exists. What is not
# listed breaks the link: a primitive that nobody here has heard of proves nothing, and the largest
# of several elements has as many sides as there are equal ones, of which a solve looks at two.
# Factorisations are not here: a Cholesky factor reads one triangle, and JAX's derivative both, at
# half weight; the others have pivots, ranks and signs that jump.
_CONTINUOUS = frozenset(
    """
    abs acos acosh add add_any asin asinh atan atanh broadcast_in_dim cbrt clamp
    complex concatenate conj conv_general_dilated copy copy_p cos cosh cumlogsumexp
    cumprod cumsum div dot_general dynamic_slice dynamic_update_slice erf erf_inv erfc exp
    exp2 expand_dims expm1 fft gather imag integer_pow layout_constraint lgamma log log1p log2
    logistic max mesh_cast min mul neg one_minus_square optimization_barrier pad pcast pow pvary
    real reduce_prod reduce_sum reduce_window_sum reshape reshard
    rev rsqrt scatter scatter-add scatter_add select_n sharding_constraint sin sinh slice split
    sqrt square squeeze stack sub tan tanh tile transpose triangular_solve unstack
    """.split()
)

# Of those, what has a different derivative on each side of some value.
_KINKS = frozenset("abs clamp max min".split())

# Of complex numbers these have a branch cut, where they jump.
_CUT = frozenset("acos acosh asin asinh atan atanh log log1p log2 pow rsqrt sqrt".split())

# Operands that choose instead of entering: predicates and indices. They must not depend on the
# carry, or a small move jumps. Nor must the bounds of a clamp: where they cross, its value is the
# upper one, and its derivative counts neither.
_CHOOSING = {
    "clamp": lambda n: (0, 2),
    "select_n": lambda n: range(1),
    "gather": lambda n: range(1, n),
    "dynamic_slice": lambda n: range(1, n),
    "dynamic_update_slice": lambda n: range(2, n),
    "scatter": lambda n: range(1, 2),
    "scatter-add": lambda n: range(1, 2),
    "scatter_add": lambda n: range(1, 2),
}


def certain(jaxpr: Any, carry_in: tuple[int, ...], carry_out: tuple[int, ...]) -> bool:
    """Whether the carry reaches the new carry only by true derivatives, in float32 or wider.

    Args:
      jaxpr: of the step, open or closed.
      carry_in, carry_out: positions of the floating carry leaves among inputs and outputs.

    Returns:
      Whether that is proved.
    """
    return _link(jaxpr, carry_in, carry_out) is not Link.BROKEN


def kinked(jaxpr: Any, carry_in: tuple[int, ...], carry_out: tuple[int, ...]) -> bool:
    """Whether one of those derivatives may jump where a state moves a little.

    Args:
      jaxpr, carry_in, carry_out: as for `certain`, which holds.

    Returns:
      Whether the step holds a kink on the way.
    """
    return _link(jaxpr, carry_in, carry_out) is Link.KINKED


@functools.lru_cache(maxsize=512)
def _link(jaxpr: Any, carry_in: tuple[int, ...], carry_out: tuple[int, ...]) -> Link:
    opened = compat.open_jaxpr(jaxpr)
    if any(jnp.finfo(opened.invars[i].aval.dtype).bits < 32 for i in carry_in):
        return Link.BROKEN
    ins = [Link.TRUE if i in carry_in else Link.NONE for i in range(len(opened.invars))]
    outs = _flow(jaxpr, ins)
    return _worst([outs[i] for i in carry_out])


def _worst(links: Collection[Link]) -> Link:
    return max(links, default=Link.NONE)


def _fixpoint(step: Any, carry: list[Link]) -> list[Link]:
    while True:
        grown = [max(a, b) for a, b in zip(carry, step(carry), strict=True)]
        if grown == carry:
            return carry
        carry = grown


def _scan(eqn: Any, ins: list[Link]) -> list[Link]:
    body, consts, carries = compat.scan_parts(eqn)
    fixed, xs = ins[:consts], ins[consts + carries :]
    carry = _fixpoint(
        lambda c: _flow(body, fixed + c + xs)[:carries], ins[consts : consts + carries]
    )
    return carry + _flow(body, fixed + carry + xs)[carries:]


def _while(eqn: Any, ins: list[Link]) -> list[Link]:
    asks, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    body = eqn.params["body_jaxpr"]
    carry = _fixpoint(lambda c: _flow(body, ins[asks : asks + consts] + c), ins[asks + consts :])
    if _flow(eqn.params["cond_jaxpr"], ins[:asks] + carry)[0] is not Link.NONE:
        return [Link.BROKEN] * len(carry)
    return carry


def _cond(eqn: Any, ins: list[Link]) -> list[Link]:
    if ins[0] is not Link.NONE:
        return [Link.BROKEN] * len(eqn.outvars)
    branches = [_flow(branch, ins[1:]) for branch in eqn.params["branches"]]
    return [_worst(outs) for outs in zip(*branches, strict=True)]


def _linear_solve(eqn: Any, ins: list[Link]) -> list[Link]:
    # JAX differentiates the equation and the right side, not what `solve` closes over; the value is
    # what `solve` finds. They belong together only where the carry enters by the right side alone,
    # and linearly: a few steps of conjugate gradients are not linear.
    solve, given = eqn.params["jaxprs"].solve, eqn.params["const_lengths"]
    right, own = ins[sum(given) :], given.matvec + given.vecmat
    closed = ins[own : own + given.solve]
    moving = _worst(ins[: given.matvec] + closed) is not Link.NONE
    if moving or not linear_in(solve, len(closed)):
        return [Link.BROKEN] * len(eqn.outvars)
    outs = _flow(solve, closed + right)
    # Auxiliary outputs have no tangent.
    rest = [Link.BROKEN if link else Link.NONE for link in outs[len(right) :]]
    return outs[: len(right)] + rest


_CONTROL = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "custom_linear_solve": _linear_solve,
}


def _cast(eqn: Any, link: Link) -> Link:
    old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    if not (jnp.issubdtype(old, jnp.inexact) and jnp.issubdtype(new, jnp.inexact)):
        return Link.BROKEN
    wide = jnp.finfo(new).nmant >= jnp.finfo(old).nmant
    return link if wide and jnp.finfo(new).maxexp >= jnp.finfo(old).maxexp else Link.BROKEN


def _narrows(eqn: Any, operands: list[Link]) -> bool:
    """Whether an equation rounds what it is given, to a narrower result or on the way to it."""
    if "precision" in eqn.params and not _as_wide(eqn.params["precision"]):
        return True
    given = [v.aval.dtype for v, link in zip(eqn.invars, operands, strict=True) if link]
    most = max((jnp.finfo(d).nmant for d in given if jnp.issubdtype(d, jnp.inexact)), default=0)
    made = [v.aval.dtype for v in eqn.outvars if jnp.issubdtype(v.aval.dtype, jnp.inexact)]
    return any(jnp.finfo(d).nmant < most for d in made)


def _as_wide(precision: Any) -> bool:
    """Whether a matrix product keeps the bits of its operands; None is the platform's own way."""
    several = precision if isinstance(precision, tuple) else (precision,)
    return all(p is None or isinstance(p, lax.Precision) or str(p) in _WIDE for p in several)


def _primitive(eqn: Any, operands: list[Link]) -> Link:
    name, link = eqn.primitive.name, _worst(operands)
    if name == "convert_element_type":
        return _cast(eqn, link)
    if name not in _CONTINUOUS or _narrows(eqn, operands):
        return Link.BROKEN
    choosing = _CHOOSING.get(name, lambda n: ())(len(operands))
    if any(operands[i] is not Link.NONE for i in choosing):
        return Link.BROKEN
    if name in _CUT and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.complexfloating):
        return Link.BROKEN
    return max(link, Link.KINKED) if name in _KINKS else link


def _flow(jaxpr: Any, ins: Sequence[Link]) -> list[Link]:
    jaxpr = compat.open_jaxpr(jaxpr)
    links = dict(zip(jaxpr.invars, ins, strict=True))

    def read(atom: Any) -> Link:
        return Link.NONE if isinstance(atom, core.Literal) else links.get(atom, Link.NONE)

    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        worst = _worst(operands)
        if worst in (Link.NONE, Link.BROKEN):
            outs = [worst] * len(eqn.outvars)
        elif eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call"):
            outs = [Link.BROKEN] * len(eqn.outvars)
            if eqn.primitive.name == "custom_jvp_call" and custom_jvps.is_true(eqn):
                # The function is continuous even where the primitives it is made of are not
                # (a select).
                inside = _flow(eqn.params["call_jaxpr"], operands)
                outs = [min(link, Link.KINKED) for link in inside]
        elif (inner := jaxprs.called(eqn)) is not None:
            outs = _flow(inner, operands)
        elif eqn.primitive.name in _CONTROL:
            outs = _CONTROL[eqn.primitive.name](eqn, operands)
        else:
            outs = [_primitive(eqn, operands)] * len(eqn.outvars)
        links.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]
