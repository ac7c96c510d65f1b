"""Derivatives that do not overflow or underflow on their way to an ordinary number.

JAX takes the derivative of `x / y` by `y` as `-x * y**-2`. In float32 `y**-2` is 0 from 1.8e19 on,
where value and derivative are normal numbers. A Jacobian of which a term is lost certifies a wrong
answer, and `y**-2` times an overflow is a NaN. So the step that solvers differentiate has rules of
our own in these places. They make a tangent relative to its operand before they scale it by the
value: `(x / y) * (dy / y)`. Values stay the same bit for bit.

Only of first order: these rules are differentiated by JAX's. A derivative below the normal numbers
is lost, as that of `1 / x` at 1e20 is, whatever scales it later. Where the value overflows, the
derivative is no number, also where JAX's is 0.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend import core

from jaxpara import compat, jaxprs
from jaxpara.recurrence.structure.custom_jvps import traceable

# The name under which an equation with a rule of ours appears in a jaxpr.
NAME = "jaxpara_safe_derivative"

# Equations whose jaxprs are entered. Functions with rules of their own keep them.
_ENTERED = frozenset("scan while cond jit pjit remat2 checkpoint closed_call core_call".split())


def ours(eqn: Any) -> bool:
    """Whether an equation is one that `safe` put in; the primitive alone is inside it."""
    return eqn.primitive.name == "custom_jvp_call" and compat.function_name(eqn) == NAME


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Runs one equation as `compat.bind` does, with a safe derivative."""
    if not _unsafe(eqn):
        return compat.bind(eqn, operands)
    given = _given(eqn)
    # Its literals are as wide as they are given, and constants: the rule outlives this trace.
    fixed = [
        None if value is None else np.asarray(value).astype(operand.dtype)
        for value, operand in zip(_fixed(eqn), operands, strict=True)
    ]
    return [_function(eqn, fixed)(*(operands[i] for i in given))]


@functools.lru_cache(maxsize=512)
def safe(jaxpr: Any, skip: str = "") -> Any:
    """The same function with safe derivatives.

    Args:
      jaxpr: open or closed.
      skip: jitted functions of this name stay as they are.

    Returns:
      A jaxpr of the same kind; `jaxpr` itself where it is safe.
    """
    old = compat.open_jaxpr(jaxpr).eqns
    new = [_rewritten(eqn, skip) for eqn in old]
    if all(a is b for a, b in zip(new, old, strict=True)):
        return jaxpr
    return compat.with_equations(jaxpr, new)


def _rewritten(eqn: Any, skip: str) -> Any:
    if eqn.primitive.name in _ENTERED and not (skip and eqn.params.get("name") == skip):
        inner = {key: _each(value, skip) for key, value in eqn.params.items()}
        changed = any(inner[key] is not value for key, value in eqn.params.items())
        return eqn.replace(params=inner) if changed else eqn
    if not _unsafe(eqn):
        return eqn
    function = _function(eqn, _fixed(eqn))
    given = [eqn.invars[i] for i in _given(eqn)]
    with compat.context(eqn):
        traced = jax.make_jaxpr(function)(*(traceable(v.aval) for v in given))
    (call,) = compat.open_jaxpr(traced).eqns
    return eqn.replace(invars=given, primitive=call.primitive, params=call.params)


def _each(value: Any, skip: str) -> Any:
    """A parameter with its jaxprs made safe."""
    if isinstance(value, tuple) and type(value) is tuple:
        items = tuple(_each(item, skip) for item in value)
        return value if all(a is b for a, b in zip(items, value, strict=True)) else items
    return safe(value, skip) if jaxprs.is_jaxpr(value) else value


def _fixed(eqn: Any) -> list[Any]:
    """Its operands that are numbers in the program; None for the others."""
    return [atom.val if isinstance(atom, core.Literal) else None for atom in eqn.invars]


def _given(eqn: Any) -> list[int]:
    return [i for i, number in enumerate(_fixed(eqn)) if number is None]


def _unsafe(eqn: Any) -> bool:
    """Whether JAX's derivative of an equation may be lost where its value is not."""
    name, fixed = eqn.primitive.name, _fixed(eqn)
    if name not in _RULES or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return False
    if name == "div":
        return fixed[1] is None
    if name == "integer_pow":
        return eqn.params["y"] < 0
    if name == "pow":
        return fixed[1] is None or bool(fixed[1] < 0)
    return True


def _function(eqn: Any, fixed: Sequence[Any]) -> Callable[..., jax.Array]:
    """An equation as a function, with a rule of ours, of what is not fixed."""
    given = _given(eqn)

    def whole(operands: Sequence[Any]) -> list[Any]:
        filled = list(fixed)
        for i, operand in zip(given, operands, strict=True):
            filled[i] = operand
        return filled

    # No `def`: what a type checker wraps around that has the name of its own that JAX reads.
    value = lambda *operands: compat.bind(eqn, whole(operands))[0]  # noqa: E731
    value.__name__ = value.__qualname__ = NAME
    function = jax.custom_jvp(value)

    def push(operands: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        out = function(*operands)
        moving = [None] * len(fixed)
        for i, tangent in zip(given, tangents, strict=True):
            moving[i] = None if isinstance(tangent, SymbolicZero) else tangent
        if all(tangent is None for tangent in moving):
            return out, jnp.zeros_like(out)  # JAX may ask all the same
        return out, _RULES[eqn.primitive.name](eqn, out, whole(operands), moving)

    function.defjvp(push, symbolic_zeros=True)
    return function


def _divided(tangent: Any, y: Any, factor: Any = 1) -> jax.Array:
    """`tangent * factor / y`, with one division for all tangents.

    The reciprocal of the largest numbers is no normal number; four times that is one.
    """
    return tangent * 0.25 * (4 * factor / y)


def _div(eqn: Any, out: Any, operands: Any, tangents: Any) -> jax.Array:
    del eqn
    (_, y), (dx, dy) = operands, tangents
    if dy is None:
        return lax.div(dx, y)
    if dx is None:
        return -out * _divided(dy, y)
    # Two terms, as JAX has them: XLA is half as slow again in a matrix of `(dx - out * dy) / y`.
    return lax.div(dx, y) - out * _divided(dy, y)


def _falling(power: Any) -> Callable[..., jax.Array]:
    """Of `x ** power(eqn)`, which is negative."""

    def rule(eqn: Any, out: Any, operands: Any, tangents: Any) -> jax.Array:
        return _divided(tangents[0] * out, operands[0], power(eqn))

    return rule


def _pow(eqn: Any, out: Any, operands: Any, tangents: Any) -> jax.Array:
    (x, y), (dx, dy) = operands, tangents
    if _fixed(eqn)[1] is not None:
        return _divided(dx * out, x, y)
    total = []
    if dx is not None:
        # Of an exponent that is not negative, the power of one less is no smaller than `out / x`.
        # It stays an integer if that is one: of `x ** 0.0` JAX's second derivative at 0 is a NaN.
        falls, power = y < 0, jnp.asarray(y, out.dtype)
        flat = y == 0 if jnp.issubdtype(jnp.result_type(y), jnp.integer) else False
        less = jnp.where(falls | flat, 1, y) - 1
        factor = jnp.where(falls, out, lax.pow(*jnp.broadcast_arrays(x, less)))
        total.append(power * lax.div(dx * factor, jnp.where(falls, x, 1)))
    if dy is not None:
        total.append(dy * jnp.log(jnp.where(x == 0, 1, x)) * out)
    return functools.reduce(jnp.add, total)


def _area(offset: int) -> Callable[..., jax.Array]:
    """Of `asinh` (1) and `acosh` (-1): `dx / sqrt(x**2 + offset)`."""

    def rule(eqn: Any, out: Any, operands: Any, tangents: Any) -> jax.Array:
        del eqn, out
        (x,), (dx,) = operands, tangents
        size = jnp.abs(x)
        large = size > float(jnp.finfo(x.dtype).eps) ** -0.5  # from here on the 1 is rounding
        near = jnp.where(large, 2, x)
        square = near * near + 1 if offset > 0 else (near - 1) * (near + 1)
        return _divided(dx, jnp.where(large, size, jnp.sqrt(square)))

    return rule


_RULES: dict[str, Callable[..., jax.Array]] = {
    "acosh": _area(-1),
    "asinh": _area(1),
    "div": _div,
    "integer_pow": _falling(lambda eqn: eqn.params["y"]),
    "pow": _pow,
    "rsqrt": _falling(lambda eqn: -0.5),
}
