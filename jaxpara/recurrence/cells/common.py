"""What all cells share: the hoisted input projection, initialisation, clipping, running.

A cell is split: everything that does not depend on the carry, `x_t W + b`, is one matmul over
all time steps. Its result is a tuple of *separate* gate arrays `[time, batch, hidden]`. At
batch 64 and width 256 the gradient of `newton_scan` is then nearly twice as fast on a CPU as with
one `[time, batch, gates, hidden]` array that the step cuts. Small cells gain little or nothing.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpara.matmul import matmul
from jaxpara.recurrence.reset import with_reset
from jaxpara.recurrence.scan import newton_scan
from jaxpara.types import Carry, Cell, Key, Params, Scan

RECURRENT = "recurrent"  # the name of the subtree that `clip_recurrent` selects


def run(
    cell: Cell,
    params: Params,
    carry: Carry,
    x: Float[Array, "time *batch features"],
    *,
    scan: Scan = newton_scan,
    reset: Bool[Array, " time *batch"] | None = None,
) -> tuple[Carry, Any]:
    """Runs a cell over time: `project` once for all steps, then `step` in a scan.

    `carry_t, y_t = step(params, carry_{t-1}, project(params, x)_t)`, and where `reset[t]` is
    true `carry_{t-1}` is replaced by the cell's own start, so that packed documents do not see
    one another.

    Args:
      cell: the cell.
      params: its parameters.
      carry: the state before the first step, from `cell.start` or from an earlier call.
      x: the inputs; time leads, because that is the axis that a scan takes apart.
      scan: any function of `lax.scan`'s type.
      reset: true at the first step of a document.

    Returns:
      The carry after the last step, and the outputs `[time, *batch, hidden]`.

    Raises:
      TypeError: if `cell` is no cell.
      ValueError: if `reset` does not have the leading axes of `x`.
    """
    if not hasattr(cell, "project"):
        order = "; the cell comes first" if hasattr(params, "project") else ""
        raise TypeError(
            f"run got a {type(cell).__name__} in place of the cell{order}: expected "
            "run(cell, params, carry, x)"
        )
    gates = cell.project(params, x)
    if reset is None:
        return scan(lambda carry, gates_t: cell.step(params, carry, gates_t), carry, gates)
    if reset.shape != x.shape[:-1]:
        raise ValueError(
            f"reset has shape {reset.shape}, x has leading axes {x.shape[:-1]}: "
            "give one truth value for each time step and sequence"
        )
    restarting = with_reset(
        lambda carry, gates_t: cell.step(params, carry, gates_t),
        cell.start(params, x.shape[1:-1]),
    )
    return scan(restarting, carry, (reset, gates))


def clip_recurrent(bound: float) -> Callable[[Params], Params]:
    """A projection that keeps recurrent weights within a bound, for use after each step.

    `a <- min(max(a, -bound), bound)` for every leaf below a key named `"recurrent"`; other
    leaves are returned as they are, so a model without recurrences is unchanged. With
    elementwise recurrences and `bound = 0.5` Newton's method converges in a few iterations
    [pararnn]. For per-head matrices the bound holds for each entry and does not bound the
    norm.

    Args:
      bound: the largest absolute value, positive.

    Returns:
      A pure function from parameters to parameters, e.g. the `project` of
      `jaxpara.train.make_step`.

    Raises:
      ValueError: if `bound` is not positive.
    """
    if not bound > 0:
        raise ValueError(f"bound={bound} must be positive; to leave the weights free use no clip")

    def clip(path, leaf):
        names = [getattr(entry, "key", getattr(entry, "name", None)) for entry in path]
        return jnp.clip(leaf, -bound, bound) if RECURRENT in names else leaf

    return lambda params: jax.tree_util.tree_map_with_path(clip, params)


def assemble(
    step: Callable[[dict[str, jax.Array], Carry, tuple[jax.Array, ...]], tuple[Carry, Any]],
    features: int,
    units: tuple[int, ...],
    *,
    gates: Mapping[str, int],
    states: int = 1,
    recurrent: Sequence[str] = (),
    shape: tuple[int, ...] = (),
    half_width: float = 0.0,
    clip: float | None = None,
    time_constants: Sequence[float] = (1.0, 64.0),
) -> Cell:
    """Makes a cell from its equations.

    Args:
      step: `(recurrent weights by name, carry, gates) -> (carry, y)`, all in one dtype.
      features: size of an input.
      units: axes of a state and of a gate.
      gates: how the bias of each starts, in units of `log(tau)`: 1, 0 or -1.
      states: number of states in the carry; more than one make a tuple.
      recurrent: names of the recurrent weights.
      shape: of each of them.
      half_width: they start uniform in `±half_width`.
      clip: see `bounded`.
      time_constants: of `tau`, see `chrono`.
    """
    bound = bounded(clip)
    hidden = math.prod(units)

    def init(key):
        k_in, k_time, k_rec = jax.random.split(key, 3)
        log_tau = chrono(k_time, (hidden,), time_constants)
        params: dict[str, Any] = input_parameters(
            k_in, features, [sign * log_tau for sign in gates.values()]
        )
        if recurrent:
            params[RECURRENT] = recurrent_parameters(k_rec, recurrent, shape, half_width)
        return params

    def start(params, batch_shape):
        if not isinstance(batch_shape, Iterable) or getattr(batch_shape, "ndim", 1) == 0:
            raise TypeError(
                f"start got batch_shape={batch_shape!r}; expected a tuple, such as "
                f"cell.start(params, ({batch_shape!r},)), or () for one sequence"
            )
        # At least float32 whatever the parameters are stored in.
        dtype = jnp.promote_types(params["bias"].dtype, jnp.float32)
        zero = jnp.zeros((*batch_shape, *units), dtype)
        return zero if states == 1 else (zero,) * states

    def cell_step(params, carry, gates):
        # Storage may be narrow, the recurrence is not: everything takes the carry's dtype.
        dtype = jax.tree.leaves(carry)[0].dtype
        weights = {name: bound(params[RECURRENT][name]).astype(dtype) for name in recurrent}
        return step(weights, carry, tuple(gate.astype(dtype) for gate in gates))

    return Cell(init, start, projection(features, len(gates), units), cell_step)


def bounded(clip: float | None) -> Callable[[jax.Array], jax.Array]:
    """`a` clipped to `±clip` in value, with the gradient of the identity.

    Straight through, because a weight that has left the interval must still be able to
    return, and one that sits on the bound must not lose half its gradient to the tie.
    """
    if clip is None:
        return lambda a: a
    if not clip > 0:
        raise ValueError(f"clip={clip} must be positive, or None for free recurrent weights")
    return lambda a: (
        jnp.clip(jax.lax.stop_gradient(a), -clip, clip) + (a - jax.lax.stop_gradient(a))
    )


def chrono(
    key: Key, units: tuple[int, ...], time_constants: Sequence[float]
) -> Float[Array, "..."]:
    """`log(tau)` with `tau` log-uniform: a forget gate of this bias remembers `tau` steps."""
    shortest, longest = time_constants
    if not 0 < shortest <= longest:
        raise ValueError(
            f"time_constants={time_constants} must be (shortest, longest) in steps, "
            "both positive and in this order"
        )
    low, high = jnp.log(shortest), jnp.log(longest)
    return jax.random.uniform(key, units, jnp.float32, low, high)


def input_parameters(key: Key, features: int, biases: Sequence[jax.Array]) -> dict[str, jax.Array]:
    """Fan-in normal kernel `[features, gates * hidden]` and the concatenated gate biases."""
    bias = jnp.concatenate([b.reshape(-1) for b in biases])
    kernel = jax.random.normal(key, (features, bias.size), jnp.float32) * features**-0.5
    return {"kernel": kernel, "bias": bias}


def recurrent_parameters(
    key: Key, names: Sequence[str], shape: tuple[int, ...], half_width: float
) -> dict[str, jax.Array]:
    """Recurrent weights, uniform in `±half_width`, one array for each name."""
    return {
        name: jax.random.uniform(k, shape, jnp.float32, -half_width, half_width)
        for name, k in zip(names, jax.random.split(key, len(names)), strict=True)
    }


def projection(
    features: int, gates: int, units: tuple[int, ...]
) -> Callable[[Params, jax.Array], tuple[jax.Array, ...]]:
    """`x W + b` as one matmul, split into `gates` arrays `[..., *units]` in the dtype of `x`."""

    def project(params, x):
        if x.shape[-1] != features:
            raise ValueError(
                f"x has {x.shape[-1]} features (shape {x.shape}), the cell was made for "
                f"features={features}"
            )
        y = matmul(x, params["kernel"].astype(x.dtype)) + params["bias"].astype(x.dtype)
        return tuple(part.reshape(x.shape[:-1] + units) for part in jnp.split(y, gates, axis=-1))

    return project
