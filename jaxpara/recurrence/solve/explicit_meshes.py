"""Meshes with Explicit axes: the solve runs where they are Auto, the step where they are not.

With Explicit axes every array's type names its sharding, and JAX refuses operations whose result
it would have to guess: lanes that merge a batch and a channel axis, fresh zeros beside sharded
states, a tangent whose sharding is not its primal's. A solver is full of them, so it runs in a
region in which the compiler places its arrays. The user's step keeps the types that it was traced
with, and results leave with the shardings of `lax.scan`.
"""

import functools
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, get_abstract_mesh, use_abstract_mesh

from jaxpara import compat, jaxprs
from jaxpara.recurrence.solve.tangent_leaves import differentiable


def _axes(mesh: Any, kind: AxisType) -> tuple[str, ...]:
    return tuple(n for n, k in zip(mesh.axis_names, mesh.axis_types, strict=True) if k == kind)


def avals_of(jaxpr: Any) -> tuple[list[Any], list[Any]]:
    """Types of the inputs of a jaxpr, and of its outputs."""
    opened = compat.open_jaxpr(jaxpr)
    return [var.aval for var in opened.invars], [var.aval for var in opened.outvars]


def _mesh(avals: Sequence[Any]) -> Any:
    """The mesh of the context, else the one that some value is sharded over; it may be empty."""
    meshes = [get_abstract_mesh(), *(aval.sharding.mesh for aval in avals)]
    return next((mesh for mesh in meshes if not mesh.empty), meshes[0])


def explicit_mesh(avals: Sequence[Any]) -> Any | None:
    """The mesh around a call on such values if some of its axes are Explicit, else None."""
    mesh = _mesh(avals)
    return mesh if _axes(mesh, AxisType.Explicit) else None


def sharding(mesh: Any, aval: Any, *leading: None) -> NamedSharding:
    """The sharding of a traced value, behind these axes."""
    own = aval.sharding.spec
    return NamedSharding(mesh, own.update(partitions=(*leading, *own)))


def in_auto_axes(function: Callable[..., Any], mesh: Any, out_sharding: Any) -> Callable[..., Any]:
    """Runs `function` with the Explicit axes of a mesh as Auto ones.

    Args:
      function: of arrays, to a tree of arrays.
      mesh: the mesh that surrounds it.
      out_sharding: of every array that it returns, along the Explicit axes.
    """
    axes = _axes(mesh, AxisType.Explicit)
    run = jax.sharding.auto_axes(function, axes=axes, out_sharding=out_sharding)

    def within(*arguments: Any) -> Any:
        with use_abstract_mesh(mesh):
            return run(*arguments)

    return within


def evaluate(jaxpr: Any, arguments: Sequence[Any]) -> list[Any]:
    """Runs a closed jaxpr on flat arguments, with each axis of the mesh as it was in the trace.

    Where the solver around it has made axes Auto, the arguments take the shardings of the trace.
    """
    avals, _ = avals_of(jaxpr)
    explicit = {axis for aval in avals for axis in _axes(aval.sharding.mesh, AxisType.Explicit)}
    here = _axes(get_abstract_mesh(), AxisType.Auto)
    axes = tuple(axis for axis in here if axis in explicit)
    if not axes:
        return compat.evaluate(jaxpr, arguments)
    run: Any = jax.sharding.explicit_axes(
        lambda *arguments: compat.evaluate(jaxpr, arguments),
        axes=axes,
        in_sharding=tuple(aval.sharding.spec for aval in avals),
    )
    return run(*arguments)


def obstacle(jaxpr: Any, floats: Sequence[int]) -> str | None:
    """Why a step cannot be solved in parallel on its mesh, or None.

    Args:
      jaxpr: the closed jaxpr of the step.
      floats: positions of the floating carry leaves among its inputs.
    """
    mesh = explicit_mesh(avals_of(jaxpr)[0])
    if mesh is None:
        return None
    if _axes(mesh, AxisType.Manual):
        # JAX gives residuals of the Auto region that leave a shard_map the types of its mesh.
        axes = _axes(mesh, AxisType.Explicit)
        return f"the mesh axes {axes} are Explicit inside a shard_map over others"
    return _unbatched(jaxpr, tuple(floats), mesh)


@functools.lru_cache(maxsize=512)
def _unbatched(jaxpr: Any, floats: tuple[int, ...], mesh: Any) -> str | None:
    """What JAX says when it batches a step and its derivatives, or None if it can.

    Its batching rules do not all take Explicit axes: that of `lax.cond` does not.
    """

    def rows(aval: Any) -> jax.ShapeDtypeStruct:
        place = sharding(mesh, aval, None)
        return jax.ShapeDtypeStruct((2, *aval.shape), aval.dtype, sharding=place)

    def one(*arguments: Any) -> None:
        def step(*state: Any) -> list[Any]:
            inputs = list(arguments)
            for position, leaf in zip(floats, state, strict=True):
                inputs[position] = leaf
            return [out for out in evaluate(jaxpr, inputs) if differentiable(out)]

        state = [arguments[i] for i in floats]
        new, pull = jax.vjp(step, *state)
        jax.vmap(lambda *columns: pull(list(columns)))(*(leaf[None] for leaf in new))
        if not jaxprs.contains(jaxpr, "custom_vjp_call"):
            _, push = jax.linearize(step, *state)
            jax.vmap(push)(*(leaf[None] for leaf in state))

    probe = in_auto_axes(lambda *arguments: jax.vmap(one)(*arguments), mesh, jax.P())
    try:
        jax.eval_shape(lambda *arguments: probe(*arguments), *map(rows, avals_of(jaxpr)[0]))
    except Exception as error:  # JAX has one type for each kind of refusal
        said = textwrap.shorten(str(error), 100, placeholder=" ...")
        return f"on Explicit mesh axes JAX does not batch the step: {said}"
    return None


def no_kernel(jaxpr: Any = None) -> str | None:
    """Why a call here cannot run in a kernel, or None: the compiler does not divide kernels.

    Args:
      jaxpr: of the step, if there is one.
    """
    avals = [] if jaxpr is None else avals_of(jaxpr)[0]
    mesh = _mesh(avals)
    shared = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    ]
    named = any(part for aval in avals for part in aval.sharding.spec)
    if named or math.prod(mesh.shape[name] for name in shared) > 1:
        return f"arrays are sharded over the mesh axes {shared}; call it in jax.shard_map for one"
    return None
