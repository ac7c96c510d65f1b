"""A recurrence to be timed: a cell's step over random gates, its two passes, its floor.

The input projection is left out on purpose: it is one matmul in every implementation, and would
hide the cost of the recurrence.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxpara as jp

PASSES = ("forward", "forward_backward")


class Problem(NamedTuple):
    """A recurrence with its data.

    Attributes:
      step: `(params, carry, gates_t) -> (carry, y_t)`.
      params: the recurrent weights.
      init: the carry before the first step.
      gates: a tuple of `[time, batch, state]`, the projected inputs; of a `stacked` problem one
        array.
      cotangent: `[time, batch, state]`, of the outputs.
    """

    step: Callable[[Any, Any, Any], tuple[Any, jax.Array]]
    params: Any
    init: Any
    gates: Any
    cotangent: jax.Array


def make_problem(
    cell: str, time: int, batch: int, state: int, *, scale: float = 0.5, seed: int = 0
) -> Problem:
    """Makes a problem of a cell of `jaxpara.cells` with unit-normal gates, or the dense tanh step.

    Args:
      cell: its name, or "dense", whose weights have their own scale.
      time: steps.
      batch: sequences.
      state: width.
      scale: of the recurrent weights.
      seed: of all random numbers.

    Returns:
      The problem, in float32.

    Raises:
      ValueError: `jaxpara.cells` has no such cell.
    """
    if cell == "dense":
        return dense_problem(time, batch, state, seed=seed)
    make = getattr(jp.cells, cell, None)
    if make is None:
        made = (n for n, value in vars(jp.cells).items() if callable(value))
        known = ["dense", *(n for n in made if n not in ("run", "clip_recurrent"))]
        raise ValueError(f"suite.cell={cell!r} is not a cell; expected one of {known}")
    built = make(1, state, scale=scale)
    k_params, k_gates, k_cotangent = jax.random.split(jax.random.key(seed), 3)
    params = built.init(k_params)
    shapes = jax.eval_shape(built.project, params, jnp.zeros((time, batch, 1)))
    keys = jax.random.split(k_gates, len(jax.tree.leaves(shapes)))
    gates = jax.tree.unflatten(
        jax.tree.structure(shapes),
        [jax.random.normal(k, s.shape) for k, s in zip(keys, jax.tree.leaves(shapes), strict=True)],
    )
    return Problem(
        step=built.step,
        params={"recurrent": params["recurrent"]},
        init=built.start(params, (batch,)),
        gates=gates,
        cotangent=jax.random.normal(k_cotangent, (time, batch, state)),
    )


def stacked(problem: Problem) -> Problem:
    """Lays the gates side by side in one input, as a single projection returns them.

    Args:
      problem: with gates as separate arrays.

    Returns:
      The same recurrence.
    """
    gates, tree = jax.tree.flatten(problem.gates)

    def step(params, carry, x):
        return problem.step(params, carry, tree.unflatten(jnp.split(x, len(gates), axis=-1)))

    return problem._replace(step=step, gates=jnp.concatenate(gates, axis=-1))


def dense_problem(time: int, batch: int, state: int, seed: int = 0) -> Problem:
    """A dense tanh recurrence, whose Jacobian is one block for each sequence."""
    k_weight, k_gates, k_cotangent = jax.random.split(jax.random.key(seed), 3)

    def step(params, h, gates):
        h = jnp.tanh(h @ params["recurrent"] + gates[0])
        return h, h

    return Problem(
        step=step,
        params={"recurrent": jax.random.normal(k_weight, (state, state)) / (2 * state**0.5)},
        init=jnp.zeros((batch, state)),
        gates=(jax.random.normal(k_gates, (time, batch, state)),),
        cotangent=jax.random.normal(k_cotangent, (time, batch, state)),
    )


def through(scan: Callable[..., Any], step: Any) -> Callable[..., jax.Array]:
    """Makes the outputs of a problem by any function of `lax.scan`'s type.

    Args:
      scan: called as `scan(f, init, xs)`.
      step: the problem's.

    Returns:
      A function of `(params, init, gates)`.
    """
    return lambda params, init, gates: scan(
        lambda carry, gates_t: step(params, carry, gates_t), init, gates
    )[1]


def both_passes(solve: Callable[..., jax.Array]) -> dict[str, Callable[..., Any]]:
    """Makes the two timed passes.

    Args:
      solve: `(params, init, gates) -> outputs`.

    Returns:
      pass -> function of `(params, init, gates, cotangent)`: `forward` returns the outputs,
      `forward_backward` the outputs and the gradients of params, init and gates.
    """

    def forward(params, init, gates, cotangent):
        del cotangent
        return solve(params, init, gates)

    def forward_backward(params, init, gates, cotangent):
        ys, pull = jax.vjp(solve, params, init, gates)
        return ys, pull(cotangent)

    return {"forward": forward, "forward_backward": forward_backward}


def floor_bytes(problem: Problem, which: str) -> int:
    """Counts the bytes that must be moved: every input read once, every result written once.

    Forward: gates in, states out. The backward pass reads gates, states and the cotangent, and
    writes the gates' gradients.

    Args:
      problem: the recurrence.
      which: a pass.

    Returns:
      The number of bytes.
    """
    gates = sum(x.nbytes for x in jax.tree.leaves(problem.gates))
    states = len(jax.tree.leaves(problem.init)) * problem.cotangent.nbytes
    forward = gates + states
    backward = gates + states + problem.cotangent.nbytes + gates
    return forward if which == "forward" else forward + backward


def grid(
    lengths: Sequence[int], batches: Sequence[int], widths: Sequence[int]
) -> list[tuple[int, int, int]]:
    """Lists every combination, for a suite's `shapes`.

    Args:
      lengths: T.
      batches: B.
      widths: D.

    Returns:
      `(T, B, D)` triples.
    """
    return list(itertools.product(lengths, batches, widths))
