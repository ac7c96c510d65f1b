"""The only file that knows how JAX versions differ (0.10.2 to 0.12).

Everything that needs a name which moved, or a private one, takes it from here.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core as jex_core
from jax.interpreters import ad

# In JAX 0.12 another name of `Jaxpr`, which its stubs do not export.
ClosedJaxpr = jex_core.ClosedJaxpr  # pyright: ignore[reportPrivateImportUsage]

# Of this JAX: major and minor.
RELEASE = jax.__version_info__[:2]


def scan_parts(eqn: Any) -> tuple[Any, int, int]:
    """`(body, number of constants, number of carries)` of a `scan` equation.

    JAX 0.10 and 0.11 count them in `num_consts` and `num_carry`; 0.12 keeps the
    operands as a tree `(consts, carry, xs)` and the body as an open jaxpr type.
    """
    if "num_carry" in eqn.params:
        return eqn.params["jaxpr"], eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return eqn.params["jaxpr"], len(list(consts)), len(list(carry))


def evaluate(jaxpr: Any, arguments: Sequence[Any]) -> list[Any]:
    """Runs a closed jaxpr on flat arguments."""
    outs = jex_core.jaxpr_as_fun(jaxpr)(*arguments)
    # JAX 0.10 returns a constant output as the Python number that the equation holds.
    return [
        out if isinstance(out, jax.Array) else jax.numpy.asarray(out, aval.dtype)
        for out, aval in zip(outs, jaxpr.out_avals, strict=True)
    ]


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Runs one equation of a jaxpr on operands, custom rules included."""
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = ((), params) if isinstance(params, dict) else params
    out = eqn.primitive.bind(*functions, *operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def context(eqn: Any) -> Any:
    """The context manager that an equation was traced in: its mesh, among others."""
    return eqn.ctx.manager


def is_tracer(value: Any) -> bool:
    """Whether a value is a tracer of a surrounding transform."""
    return isinstance(value, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]


def without_jit() -> bool:
    """Whether `jax.disable_jit` is on."""
    return jax.config.jax_disable_jit  # pyright: ignore[reportAttributeAccessIssue]


def function_name(eqn: Any) -> str:
    """The name of the function of a `custom_jvp_call`."""
    info = getattr(open_jaxpr(eqn.params["call_jaxpr"]).debug_info, "func_src_info", None)
    return (info or "").split(" at ")[0]


def jax_sources(eqn: Any) -> tuple[str, str]:
    """Names of function and rule of a `custom_jvp_call`, "" for what is not JAX's own.

    Told by where they are defined: JAX keeps nothing else of them. A rule that was given to
    `defjvps` counts as nobody's, since JAX wraps it in a function of its own.
    """
    home = os.path.join(os.path.dirname(jax.__file__), "_src", "")

    def name(holder: Any) -> str:
        info = getattr(getattr(holder, "debug_info", None), "func_src_info", None) or ""
        own = f" at {home}" in info and "custom_derivatives" not in info
        return info.split(" at ")[0] if own else ""

    return name(open_jaxpr(eqn.params["call_jaxpr"])), name(eqn.params.get("jvp_jaxpr_fun"))


def varying_axes(array: Any) -> frozenset[str]:
    """Mesh axes over which `array`, or its aval, varies in `shard_map` (empty elsewhere)."""
    aval = array if hasattr(array, "manual_axis_type") else jax.typeof(array)
    kind = getattr(aval, "manual_axis_type", None)
    return frozenset(getattr(kind, "varying", ()) or ())


def open_jaxpr(jaxpr):
    """The open jaxpr of an open or closed one (from 0.12 on they are one class)."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def with_equations(jaxpr: Any, eqns: Sequence[Any]) -> Any:
    """A jaxpr of the same kind, open or closed, with other equations."""
    if (opened := open_jaxpr(jaxpr)) is jaxpr:
        return jaxpr.replace(eqns=list(eqns))
    return jaxpr.replace(jaxpr=opened.replace(eqns=list(eqns)))


def jvp_jaxpr(closed, nonzero: list[bool]):
    """Push tangents of the inputs marked `nonzero` through a closed jaxpr.

    Returns the jaxpr of (inputs, tangents) -> (outputs, tangents of some outputs)
    and, for each output, whether its tangent is among them.
    """
    if (push := getattr(ad, "jvp_jaxpr", None)) is None:  # 0.10.2 keeps it private
        from jax._src.interpreters.ad import jvp_jaxpr as push
    return push(closed, nonzero, False)


def takes_tangents(closed, nonzero: list[bool]) -> bool:
    """Whether no `custom_vjp` in a closed jaxpr closes over what these tangents reach."""
    from jax._src.interpreters.ad import CustomVJPException

    try:
        jvp_jaxpr(closed, nonzero)
    except CustomVJPException:
        return False
    return True


def weakly_typed(array):
    """The same array, weakly typed, as `lax.scan` leaves a carry that began as a scalar."""
    from jax.extend.core.primitives import convert_element_type_p

    if jax.typeof(array).weak_type:
        return array
    return convert_element_type_p.bind(array, new_dtype=array.dtype, weak_type=True, sharding=None)


def trace_context() -> Any:
    """The settings of JAX on which a trace depends, as its own caches compare them."""
    from jax._src import config

    return config.trace_context()


def source_line(eqn: Any) -> str:
    """`file:line (function)` of the user's line that an equation comes from."""
    from jax._src import source_info_util

    return source_info_util.summarize(eqn.source_info)
