"""A function whose derivatives are summed in float32, whatever narrower type it computes in.

JAX transposes a broadcast in bfloat16 to a sum in bfloat16, which stops growing at 256 equal
terms; over time, lanes and a batch there are more. `widened` replays the function's elementwise
equations in float32 and rounds every value to the type that it had. The values are the same. The
transposed program adds up in float32 and rounds each sum once, where it goes to a narrow operand.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara import compat, jaxprs
from jaxpara.recurrence.structure import safe_derivatives
from jaxpara.recurrence.structure.flat import RULED

# They move numbers and round none.
_MOVES = frozenset(
    {
        "broadcast_in_dim",
        "concatenate",
        "copy",
        "copy_p",
        "expand_dims",
        "mesh_cast",
        "pcast",
        "pvary",
        "reshape",
        "reshard",
        "rev",
        "select_n",
        "sharding_constraint",
        "slice",
        "squeeze",
        "transpose",
    }
)
# Elementwise: float32 arithmetic on narrow operands, rounded, is what they are everywhere.
_COMPUTES = frozenset(
    {
        "abs",
        "add",
        "add_any",
        "atan2",
        "clamp",
        "cos",
        "div",
        "exp",
        "exp2",
        "expm1",
        "integer_pow",
        "log",
        "log1p",
        "logistic",
        "max",
        "min",
        "mul",
        "neg",
        "pow",
        "rsqrt",
        "sin",
        "sqrt",
        "square",
        "sub",
        "tan",
        "tanh",
    }
)
_COMPARES = frozenset({"eq", "ge", "gt", "is_finite", "le", "lt", "ne"})
# Calls with a rule of their own, which laying them open would lose.
_RULED = RULED | {"custom_vmap_call"}
_CHECKPOINTS = frozenset({"checkpoint", "remat", "remat2"})


def narrow(dtype: Any) -> bool:
    """Whether a type is floating and narrower than float32."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4


def widened(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of trees of arrays, with sums of its derivatives in float32.

    Args:
      function: traced once a call. Loops, matrix products and functions with a derivative rule
        of their own run as they are; what is narrow goes into them narrow.

    Returns:
      The same function; itself where nothing in it is narrower than float32.
    """

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
        avals = (v.aval for e in jaxprs.equations(closed) for v in (*e.invars, *e.outvars))
        if not any(narrow(aval.dtype) for aval in avals if hasattr(aval, "dtype")):
            return function(*args)
        values = _run(closed, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(out), values)

    return call


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """To the nearest number of `dtype`, kept in float32; its tangent is not rounded."""
    return x.astype(dtype).astype(jnp.float32)


@_rounded.defjvp
def _(dtype, primals, tangents):
    return _rounded(primals[0], dtype), tangents[0]


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Replays a jaxpr on values that are kept twice: as they are, and in float32."""
    jaxpr = compat.open_jaxpr(jaxpr)
    known: dict[Any, tuple[Any, Any]] = {}

    def read(atom: Any, wide: bool) -> Any:
        if not hasattr(atom, "val"):
            return known[atom][wide]
        return _both(jnp.asarray(atom.val, atom.aval.dtype))[wide]

    for var, value in zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True):
        known[var] = _both(value)
    for eqn in jaxpr.eqns:
        with compat.context(eqn):  # casts of a value belong where it is made: it has a mesh
            for var, value in zip(eqn.outvars, _results(eqn, read), strict=True):
                dtype = var.aval.dtype
                known[var] = _both(value)
                if value.dtype != dtype:
                    known[var] = value.astype(dtype), value
    return [read(atom, False) for atom in jaxpr.outvars]


def _both(value: Any) -> tuple[Any, Any]:
    return value, value.astype(jnp.float32) if narrow(value.dtype) else value


def _results(eqn: Any, read: Callable[[Any, bool], Any]) -> list[Any]:
    """Its results, in float32 where they are narrow and it is elementwise."""
    name = eqn.primitive.name
    exact = [read(atom, False) for atom in eqn.invars]
    if not any(narrow(v.aval.dtype) for v in (*eqn.invars, *eqn.outvars) if _typed(v)):
        if not jaxprs.subjaxprs(eqn):
            return safe_derivatives.bind(eqn, exact)
    ruled = name in _RULED and not safe_derivatives.ours(eqn)
    inner = None if ruled else jaxprs.called(eqn)
    if inner is not None:
        run = functools.partial(_called, inner)
        if name in _CHECKPOINTS:
            kept = {key: eqn.params[key] for key in ("prevent_cse", "policy")}
            run = jax.checkpoint(run, **kept)
        return run(*exact)
    if name == "cond":
        branches = [functools.partial(_called, branch) for branch in eqn.params["branches"]]
        return lax.switch(exact[0], branches, *exact[1:])
    if name == "convert_element_type":
        return [_converted(read(eqn.invars[0], True), eqn)]
    if name not in _MOVES | _COMPUTES | _COMPARES:
        return compat.bind(eqn, exact)
    (result,) = safe_derivatives.bind(eqn, [read(atom, True) for atom in eqn.invars])
    dtype = eqn.outvars[0].aval.dtype
    return [_rounded(result, dtype) if name in _COMPUTES and narrow(dtype) else result]


def _converted(x: Any, eqn: Any) -> Any:
    dtype = eqn.outvars[0].aval.dtype
    if not narrow(dtype):
        return compat.bind(eqn, [x])[0]
    return _rounded(x, dtype) if x.dtype == jnp.float32 else compat.bind(eqn, [x])[0]


def _called(inner: Any, *args: Any) -> list[Any]:
    return _run(inner, getattr(inner, "consts", ()), args)


def _typed(atom: Any) -> bool:
    return hasattr(atom.aval, "dtype")
