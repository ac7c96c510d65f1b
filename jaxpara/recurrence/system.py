"""What a solver is given and what it returns.

A `System` is a recurrence in scan order over a list of floating leaves,
`s_t, y_t = step(s_{t-1}, x_t)`, with whatever it closes over already bound. The
forward solve and the adjoint are both systems, so every solver serves both.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpara.recurrence.blocks import Groups
from jaxpara.recurrence.lanes import vary_like

Leaves = Sequence[jax.Array]


class Settings(NamedTuple):
    """Configuration shared by the solvers; hashable, so equal solvers share compilations.

    Attributes:
      chunks: number of time chunks; None picks about the square root of the length.
      tol: largest accepted residual, relative to the largest magnitude that the same
        element of the state has had lately (see `residuals`); None picks a few ulp of its dtype.
      max_iters: iterations before the rest is completed sequentially.
      linear: how pointwise solvers solve their linear recurrence, and how the
        adjoint is solved: "sequential", "associative", "chunked" or "kernel"; "auto" until the
        call is known, see `cost.linear_method`.
      axis: mesh axis over which time is sharded, inside `shard_map`.
      structure: overrides the proved structure of the Jacobian.
      debug: compare one random vjp of the step with the structure and raise.
      window: steps that a kernel solves together; None lets it choose.
      implementation: of the kernels, as for `pallas_kernels.nonlinear_recurrence.forward`;
        None is the kernel of the platform.
      limit: times and bytes of the sequential path that the solver may take, see `cost`.
    """

    chunks: int | None = None
    tol: float | None = None
    max_iters: int = 8
    linear: str = "chunked"
    axis: str | None = None
    structure: Any = None
    debug: bool = False
    window: int | None = None
    implementation: str | None = None
    limit: float | None = None


class System(NamedTuple):
    """One recurrence in scan order. See the module's docstring.

    Attributes:
      step: `(state, x_t) -> (state, y_t)`, all lists of leaves.
      push: `(state, x_t, tangents[K, *leaf]) -> (state, tangents)`: the step together
        with its Jacobian applied to `K` tangents.
      init: the state before the first step; replicated when time is sharded.
      xs: inputs with leading (local) time.
      length: number of (local) steps.
      groups: proved structure of the Jacobian.
      reverse: whether scan order runs against the order of the mesh axis.
      unroll: as for `lax.scan`; only a sequential solve unrolls.
    """

    step: Callable[[Leaves, Any], tuple[Leaves, Any]]
    push: Callable[[Leaves, Any, Leaves], tuple[Leaves, Leaves]]
    init: Leaves
    xs: Any
    length: int
    groups: Groups
    reverse: bool = False
    unroll: int | bool = 1


class Solution(NamedTuple):
    """States after each step `[time, *leaf]`, outputs, and how they were found."""

    states: Leaves
    ys: Any
    converged: jax.Array
    iterations: jax.Array
    residual: jax.Array
    fallback_steps: jax.Array
    starts: Leaves


class Solver(NamedTuple):
    """A parallel solver: a function and its settings.

    Attributes:
      solve: `(System, Settings, guess) -> Solution`.
      settings: see `Settings`.
    """

    solve: Callable[..., Solution]
    settings: Settings = Settings()


def tolerance(dtype: Any, tol: float | None) -> float:
    """Relative residual at which a state counts as `lax.scan`'s.

    Eight ulp from float32 on; two below, where one ulp is already 1e-3 to 1e-2.
    """
    if tol is not None:
        return tol
    eps = float(jnp.finfo(dtype).eps)
    return (8 if jnp.finfo(dtype).bits >= 32 else 2) * eps


def stall(leaves: Leaves, tol: float | None) -> float:
    """Excess up to which two Newton iterations in a row are taken for the work of rounding.

    Where Newton still gained, a relative residual of 1e-5 would be squared by the next iteration.
    What stays there is rounding inside the chunks: an element that passes zero at their ends
    carries that of the larger values that it had between them. A tolerance below eight ulp asks
    for more than that and gets it.

    Args:
      leaves: of the state.
      tol: see `tolerance`.

    Returns:
      In units of the tolerance; 1 is the ordinary test.
    """
    coarse = max((jnp.finfo(leaf.dtype) for leaf in leaves), key=lambda info: float(info.eps))
    own, eps = tolerance(coarse.dtype, tol), float(coarse.eps)
    return max(1.0, 80 * eps / own) if coarse.bits >= 32 and own >= 8 * eps else 1.0


def _wide(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def residuals(
    ends: Leaves,
    starts: Leaves,
    first: Leaves,
    tol: float | None,
    window: int = 4,
    slack: float = 256.0,
) -> tuple[jax.Array, jax.Array]:
    """Compares `ends[n, *leaf]` with the `starts[n, *leaf]` that they should equal.

    The allowed difference of an element is `tol` times the largest magnitude that it
    has had in the last `window` rows (`first` is the state before row 0), and no more
    than `tol * slack` times that of this row and the one before: a fixed
    absolute tolerance would accept anything for small states, a purely relative one
    would reject rounding at zero crossings, and with the whole past in the window one
    early spike would let everything after it pass.

    Returns:
      `excess[n]`, the largest difference of each row in units of what is allowed: up to 1 it
      passes; and the largest residual. A NaN counts as infinite in both.
    """
    rows = ends[0].shape[0]
    excess = jnp.zeros(rows, jnp.float32)
    worst = jnp.zeros((), jnp.float32)
    for end, start, before in zip(ends, starts, first, strict=True):
        allowed = tolerance(end.dtype, tol)
        end, start, before = _wide(end), _wide(start), _wide(before)
        difference = jnp.abs(end - start)
        scale = jnp.concatenate([jnp.abs(before)[None], jnp.abs(end)])
        near = slack * jnp.maximum(scale[1:], scale[:-1])
        shift = 1
        while shift < min(window, rows + 1):
            earlier = jnp.concatenate([scale[:1]] * shift + [scale[:-shift]])
            scale, shift = jnp.maximum(scale, earlier), 2 * shift
        scale = jnp.minimum(scale[1:], near)
        # The clause on `end` matters: max may drop a NaN on CPU.
        finite = jnp.where(jnp.isnan(difference), jnp.inf, difference)
        units = jnp.where(finite == 0, 0, finite / (allowed * scale))
        units = jnp.where(jnp.isfinite(end) & ~jnp.isnan(units), units, jnp.inf)
        largest = jnp.max(units, axis=tuple(range(1, units.ndim)), initial=0.0)
        excess = jnp.maximum(vary_like(excess, units), largest.astype(jnp.float32))
        worst = jnp.maximum(worst, jnp.max(finite, initial=0.0).astype(jnp.float32))
    return excess, worst


def magnitude(leaves: Leaves) -> list[jax.Array]:
    """Largest finite magnitude of each leaf, `[]` each."""

    def one(leaf):
        finite = jnp.where(jnp.isfinite(leaf), jnp.abs(leaf), jnp.zeros_like(leaf))
        return jnp.max(finite, initial=0.0)

    return [one(leaf) for leaf in leaves]
