"""Linear recurrences `s_t = A_t s_{t-1} + b_t`, differentiable, in several ways."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Inexact

from jaxpara.recurrence.lanes import vary_over
from jaxpara.recurrence.solve import explicit_meshes, sharded_time
from jaxpara.recurrence.solve.general_rule import linear_solve
from jaxpara.recurrence.solve.linear_recurrences import METHODS, block_operator
from jaxpara.recurrence.structure.jacobian_blocks import Group, Groups
from jaxpara.recurrence.system import Settings
from pallas_kernels.dispatch import choose


def linear_recurrence(
    a: Inexact[ArrayLike, " time *blocks"],
    b: Inexact[ArrayLike, " time *state"],
    init: Inexact[ArrayLike, " *state"] | None = None,
    *,
    reverse: bool = False,
    implementation: str | None = None,
    axis: str | None = None,
) -> Inexact[Array, " time *state"]:
    """Solves `s_t = A_t s_{t-1} + b_t` and returns all states.

    Args:
      a: `[time, *state]` for a diagonal recurrence, or `[time, *batch, K, K]` with `b`
        of shape `[time, *batch, K]` for blocks (no batch axes: one dense matrix).
      b: `[time, *state]`.
      init: the state before the first step, `[*state]`; zero if None. Replicated if
        time is sharded.
      reverse: run from the last step to the first; `s_t = A_t s_{t+1} + b_t`.
      implementation: "sequential" (`lax.scan`), "associative"
        (`lax.associative_scan`), "chunked" (reduce, scan the chunk summaries, roll
        out, verify), "kernel" (one kernel on GPU and TPU, diagonal or blocks up to 4 x 4;
        "chunked" elsewhere; no kernel has run on a GPU or a TPU yet), or None for the best
        of the platform. Complex numbers are solved by the first two only.
      axis: mesh axis over which time is sharded, inside `shard_map`; chunked only.

    Returns:
      `[time, *state]`, the states after each step, in the dtype that holds `a`, `b` and `init`.

    Raises:
      TypeError: integers.
      ValueError: shapes that do not fit; an unknown implementation, or one that
        cannot run with time sharded; `axis` outside of a `shard_map` over it.

    Examples:
      >>> import jax.numpy as jnp, jaxpara as jp
      >>> jp.linear_recurrence(jnp.full(4, 0.5), jnp.ones(4)).tolist()
      [1.0, 1.5, 1.75, 1.875]
      >>> swap = jnp.broadcast_to(jnp.array([[0.0, 1.0], [1.0, 0.0]]), (3, 2, 2))
      >>> jp.linear_recurrence(swap, jnp.zeros((3, 2)), jnp.array([1.0, 2.0])).tolist()
      [[2.0, 1.0], [1.0, 2.0], [2.0, 1.0]]

    References: [blelloch], [pararnn]
    """
    a, b = jnp.asarray(a), jnp.asarray(b)
    groups = _groups(a, b)
    dtype = jnp.result_type(*(v for v in (a, b, init) if v is not None))
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"a, b and init have dtype {dtype}; convert one of them: a.astype(float)")
    start = jnp.asarray(0 if init is None else init, dtype)
    if init is None:
        start = jnp.broadcast_to(start, b.shape[1:])
    if start.shape != b.shape[1:]:
        raise ValueError(
            f"init has shape {start.shape}; b has shape {b.shape} and expects {b.shape[1:]}"
        )
    method = _method(implementation, axis, dtype)
    if b.shape[0] == 0:
        return b.astype(dtype)
    a, b = a.astype(dtype), b.astype(dtype)
    if axis is not None:
        sharded_time.require_axis(axis)
        start = vary_over(start, axis)
    return _solve(groups, Settings(linear=method, axis=axis), reverse, a, b, start)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _solve(groups: Groups, settings: Settings, reverse: bool, a, b, start):
    def run(a, b, start):
        if reverse:
            a, b = a[::-1], b[::-1]
        if a.ndim == b.ndim:
            matrices = a.reshape(a.shape[0], 1, 1, math.prod(a.shape[1:]))
        else:
            size = b.shape[-1]
            blocks = a.reshape(a.shape[0], math.prod(b.shape[1:-1]), size, size)
            matrices = jnp.moveaxis(blocks, 1, -1)
        operator = block_operator(groups, [matrices], [start])
        (states,) = linear_solve(operator, [b], [start], settings, reverse)
        return states[::-1] if reverse else states

    types = [jax.typeof(leaf) for leaf in (a, b, start)]
    mesh = explicit_meshes.explicit_mesh(types)
    if mesh is not None:
        run = explicit_meshes.in_auto_axes(run, mesh, explicit_meshes.sharding(mesh, types[1]))
    return run(a, b, start)


def _groups(a, b):
    if b.ndim < 1 or a.ndim < 1 or a.shape[0] != b.shape[0]:
        raise ValueError(
            f"a has shape {a.shape} and b {b.shape}; both expect leading time of equal length"
        )
    state = b.shape[1:]
    axes = tuple(range(len(state)))
    if a.shape == b.shape:
        return (Group((0,), (axes,)),)
    if b.ndim >= 2 and a.shape == (*b.shape, b.shape[-1]):
        return (Group((0,), (axes[:-1],)),)
    raise ValueError(
        f"a has shape {a.shape} and b {b.shape}; expected a of shape {b.shape} (diagonal) or "
        f"{(*b.shape, b.shape[-1]) if b.ndim >= 2 else '[time, K, K]'} (blocks)"
    )


def _method(implementation: str | None, axis: str | None, dtype: Any) -> str:
    names = METHODS[:2] if jnp.issubdtype(dtype, jnp.complexfloating) else METHODS
    if names != METHODS and (axis is not None or implementation in METHODS[2:]):
        raise ValueError(
            f"{dtype} cannot be solved with time sharded, nor by implementation={implementation!r};"
            f" use one of {names} on one device, or blocks of real and imaginary parts"
        )
    if axis is not None:
        if implementation not in (None, "chunked"):
            raise ValueError(
                f"implementation={implementation!r} cannot run with time sharded over {axis!r}; "
                'use "chunked" or None'
            )
        return "chunked"
    # Measured on CPUs: the plain scan beats every parallel form. On accelerators a step
    # of lax.scan costs a kernel launch.
    platform = jax.default_backend()
    order = names if platform == "cpu" else names[::-1]
    return choose({name: block_operator for name in order}, implementation, platform=platform)[0]
