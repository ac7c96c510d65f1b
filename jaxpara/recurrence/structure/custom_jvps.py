"""Rules of `custom_jvp`: which are known to be true derivatives, and what a rule does to tangents.

JAX has many functions with rules of its own, and not every rule is a derivative: the sign of
`slogdet` and the rank of `pinv` jump where their rules give 0, and `det` has a wrong one for some
singular matrices. So functions are trusted by name, each after a look at its value and rule. For
whatever is not listed nothing is known.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxpara import compat, jaxprs
from jaxpara.recurrence.structure.custom_vjps import like
from jaxpara.recurrence.structure.propagate import floating

# Function and rule, both of JAX's own: continuous, and the rule is the true derivative, of real
# numbers. Of complex ones `logaddexp` has a branch cut.
_TRUE = frozenset(
    {
        ("logaddexp", "_logaddexp_jvp"),  # softplus, log_sigmoid, mish
        ("logaddexp2", "_logaddexp2_jvp"),
        ("_i0", "_i0_jvp"),
        ("i0_impl", "i0_impl_jvp"),  # the same from JAX 0.12 on
        ("exp_neg_sq", "_exp_neg_sq_jvp"),  # in the derivative of erf
    }
)

# Functions of one argument whose rule was given to `defjvps`, which hides it.
_BY_DEFJVPS = {"relu": jax.nn.relu, "relu6": jax.nn.relu6}


def is_true(eqn: Any) -> bool:
    """Whether a `custom_jvp_call` is a known function with JAX's rule, its true derivative.

    Such a function may have kinks. `custom_jvp(jax.nn.relu)` with a rule of the user's, jitted or
    not, is none.
    """
    if any(not jnp.issubdtype(v.aval.dtype, jnp.floating) for v in eqn.outvars):
        return False
    function, rule = compat.jax_sources(eqn)
    if (function, rule) in _TRUE:
        return True
    original = _BY_DEFJVPS.get(function)
    if original is None:
        return False
    own = jax.ShapeDtypeStruct((), eqn.outvars[0].aval.dtype)
    called = _pushed_forms(lambda x: compat.bind(eqn, [x])[0], traceable(eqn.invars[0].aval))
    return called == _pushed_forms(original, own)


def _pushed_forms(function: Any, x: Any) -> list[Any]:
    jaxpr = jax.make_jaxpr(lambda x, t: jax.jvp(function, (x,), (t,)))(x, x)
    return _forms(jaxpr, ["x", "t"])


def _forms(jaxpr: Any, ins: Sequence[Any]) -> list[Any]:
    """What a jaxpr makes of its inputs element by element, as nested names: of any shape alike."""
    opened = compat.open_jaxpr(jaxpr)
    known = dict(zip(opened.invars, ins, strict=True))

    def read(atom: Any) -> Any:
        if isinstance(atom, core.Literal):
            return float(atom.val)
        return known.get(atom, atom)  # an array, which equals nothing else

    for eqn in opened.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if (inner := jaxprs.called(eqn)) is not None:
            outs = _forms(inner, operands)
        elif eqn.primitive.name in ("broadcast_in_dim", "pcast", "pvary", "reshard"):
            outs = operands[:1]
        elif eqn.primitive.name == "convert_element_type" and isinstance(operands[0], float):
            outs = operands[:1]
        else:
            outs = [(eqn.primitive.name, i, *operands) for i in range(len(eqn.outvars))]
        known.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in opened.outvars]


def pushed(eqn: Any) -> tuple[Any, int]:
    """The closed jaxpr of (operands, tangents of the floating ones) -> tangents, by the rule.

    Returns:
      It, and the number of operands.
    """
    operands = [traceable(v.aval) for v in eqn.invars]
    moving = [i for i, v in enumerate(eqn.invars) if floating(v.aval)]
    kept = [i for i, v in enumerate(eqn.outvars) if floating(v.aval)]

    def push(operands, tangents):
        def called(*moved):
            whole = list(operands)
            for i, value in zip(moving, moved, strict=True):
                whole[i] = value
            outs = compat.bind(eqn, whole)
            return [outs[i] for i in kept]

        return jax.jvp(called, [operands[i] for i in moving], tangents)[1]

    return jax.make_jaxpr(push)(operands, [operands[i] for i in moving]), len(operands)


def traceable(aval: Any) -> Any:
    """Something to trace with, on the mesh that `aval` was traced on."""
    axes = tuple(sorted(compat.varying_axes(aval)))
    if not axes:
        return like(aval)
    return lax.pcast(jnp.zeros(aval.shape, aval.dtype), axes, to="varying")
