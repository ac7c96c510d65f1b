"""What a solver is given and what it returns.

A `System` is a recurrence in scan order over a list of floating leaves,
`s_t, y_t = step(s_{t-1}, x_t)`, with whatever it closes over already bound. The
forward solve and the adjoint are both systems, so every solver serves both.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.recurrence.lanes import vary_like
from jaxpara.recurrence.structure.blocks import Groups
from pallas_kernels import certificate

Leaves = Sequence[jax.Array]


class Settings(NamedTuple):
    """Configuration shared by the solvers; hashable, so equal solvers share compilations.

    Attributes:
      chunks: number of time chunks; None picks about the square root of the length.
      tol: largest accepted error of a state, as the next Newton correction bounds it, relative
        to the magnitude that the element has had lately (see `excess` and `limit`).
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
      certain: the Jacobian is proved to be the derivative of the step, and the state is float32
        or wider: a correction bounds the error. Otherwise only bitwise agreement counts.
      reverse: whether scan order runs against the order of the mesh axis.
      unroll: as for `lax.scan`; only a sequential solve unrolls.
    """

    step: Callable[[Leaves, Any], tuple[Leaves, Any]]
    push: Callable[[Leaves, Any, Leaves], tuple[Leaves, Leaves]]
    init: Leaves
    xs: Any
    length: int
    groups: Groups
    certain: bool = False
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


def _wide(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def scales(
    peaks: Leaves,
    ends: Leaves,
    first: Leaves,
    window: int = certificate.WINDOW,
    *,
    one_by_one: bool = False,
) -> list[jax.Array]:
    """The magnitude that every element has had lately, `[n, *leaf]`.

    Its peak over the last `window` rows, and no more than `SLACK` times its larger magnitude at the
    last two ends.

    Args:
      peaks: the largest magnitude of every element on its way to each row, `[n, *leaf]`.
      ends: where it arrives, `[n, *leaf]`.
      first: the state before row 0.
      window: rows to look back on, rounded up to a power of two.
      one_by_one: walk the rows, which costs a CPU a third of what looking back in parallel does;
        `window` is then the farthest row that counts, and half of it the nearest that may not.
    """
    lately = _walked if one_by_one else _looked_back

    def one(peak, end, before):
        peak, end, before = (jnp.abs(_wide(v)) for v in (peak, end, before))
        arrived = jnp.concatenate([before[None], end])
        scale = lately(jnp.concatenate([before[None], jnp.maximum(peak, end)]), window)
        return jnp.minimum(scale[1:], certificate.SLACK * jnp.maximum(arrived[1:], arrived[:-1]))

    return [one(*leaves) for leaves in zip(peaks, ends, first, strict=True)]


def _looked_back(rows: jax.Array, window: int) -> jax.Array:
    """The largest of the last `window` rows, at each of them, in parallel."""
    shift = 1
    while shift < min(window, rows.shape[0]):
        earlier = jnp.concatenate([rows[:1]] * shift + [rows[:-shift]])
        rows, shift = jnp.maximum(rows, earlier), 2 * shift
    return rows


def _walked(rows: jax.Array, window: int) -> jax.Array:
    """The largest of the block of `window / 2` rows before, and of this one so far."""
    count, size = rows.shape[0], max(window // 2, 1)
    blocks = -(-count // size)
    # Magnitudes: zeros are never the largest.
    rows = jnp.pad(rows, [(0, blocks * size - count)] + [(0, 0)] * (rows.ndim - 1))
    rows = rows.reshape(blocks, size, *rows.shape[1:])
    peaks = jnp.max(rows, axis=1)
    before = jnp.concatenate([jnp.zeros_like(peaks[:1]), peaks[:-1]])

    def further(largest, row):
        largest = jnp.maximum(largest, row)
        return largest, largest

    found = lax.scan(further, before, jnp.moveaxis(rows, 1, 0))[1]
    return jnp.moveaxis(found, 0, 1).reshape(blocks * size, *rows.shape[2:])[:count]


def excess(deltas: Leaves, scale: Leaves, tol: float | None) -> jax.Array:
    """How far corrections exceed what counts as solved, see `pallas_kernels.certificate`.

    Args:
      deltas: corrections `[n, *leaf]`; infinite where one was dropped.
      scale: magnitudes `[n, *leaf]`, see `scales`.
      tol: as in `Settings`.

    Returns:
      `[n]`, the largest of each row in units of what is allowed: up to 1 it passes. A NaN counts as
      infinite.
    """
    total = jnp.zeros(deltas[0].shape[0], jnp.float32)
    for delta, size in zip(deltas, scale, strict=True):
        delta = jnp.abs(_wide(delta))
        units = jnp.where(delta == 0, 0, delta / (limit(delta.dtype, tol) * size))
        # The clause on `size` matters: max may drop a NaN on CPU.
        units = jnp.where(jnp.isfinite(size) & ~jnp.isnan(units), units, jnp.inf)
        largest = jnp.max(units, axis=tuple(range(1, units.ndim)), initial=0.0)
        total = jnp.maximum(vary_like(total, units), largest.astype(jnp.float32))
    return total


def limit(dtype: Any, tol: float | None) -> float:
    """Relative size of a correction that counts, after which it is applied once more.

    `COARSE` ulp; a `tol` is taken at its word where it is larger, or asks for less than `FINE` ulp.
    """
    return certificate.limits(dtype, tol)[1]


def residuals(ends: Leaves, starts: Leaves) -> tuple[jax.Array, jax.Array]:
    """Compares `ends[n, *leaf]` with the `starts[n, *leaf]` that they should equal.

    Returns:
      `exact[n]`, whether a row agrees bit for bit (a NaN agrees with nothing, and the two zeros
      not with each other: their reciprocals do not), and the largest residual, infinite where
      there is a NaN.
    """
    exact = jnp.ones(ends[0].shape[0], bool)
    worst = jnp.zeros((), jnp.float32)
    for end, start in zip(ends, starts, strict=True):
        equal = (end == start) & (jnp.signbit(end) == jnp.signbit(start))
        same = jnp.all(equal, axis=tuple(range(1, end.ndim)))
        exact = vary_like(exact, same) & same
        difference = jnp.abs(_wide(end) - _wide(start))
        finite = jnp.where(jnp.isnan(difference), jnp.inf, difference)
        worst = jnp.maximum(worst, jnp.max(finite, initial=0.0).astype(jnp.float32))
    return exact, worst


def opposite(ends: Leaves, starts: Leaves) -> jax.Array:
    """`[n]`, whether a row holds the other zero than its predecessor: no correction tells."""
    found = jnp.zeros(ends[0].shape[0], bool)
    for end, start in zip(ends, starts, strict=True):
        other = (end == 0) & (start == 0) & (jnp.signbit(end) != jnp.signbit(start))
        other = jnp.any(other, axis=tuple(range(1, end.ndim)))
        found = vary_like(found, other) | other
    return found


def magnitude(leaves: Leaves) -> list[jax.Array]:
    """Largest finite magnitude of each leaf, `[]` each."""

    def one(leaf):
        finite = jnp.where(jnp.isfinite(leaf), jnp.abs(leaf), jnp.zeros_like(leaf))
        return jnp.max(finite, initial=0.0)

    return [one(leaf) for leaf in leaves]
