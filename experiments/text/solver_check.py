"""Checks a parallel solver on the recurrences of a model: iterations, residuals, agreement.

A mixer that solves with `solve_scan` keeps the report of the solve in its state. Running the model
on a batch therefore returns every layer's report, without a change of the model.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxpara.nn.mixers import Mixer
from jaxpara.recurrence.scan import solve_scan
from jaxpara.train import next_token_loss
from jaxpara.types import Carry, Cell, Model, Params


class Observed(NamedTuple):
    """A recurrent mixer's state with the report of its last solve.

    Attributes:
      carry: of the cell.
      report: `iterations, residual, converged, fallback_steps`, scalars.
    """

    carry: Carry
    report: dict[str, Any]


def observed(
    cell: Callable[..., Cell], *, hidden: int | None = None, solver: Any = None, **options: Any
) -> Callable[[int], Mixer]:
    """Like `jaxpara.nn.mixers.recurrent`, but its state holds the report of its last solve.

    Args:
      cell: as there.
      hidden: as there.
      solver: as there.
      **options: keyword arguments of `cell`.

    Returns:
      A function from the decoder's width to a `Mixer` with the same parameters.
    """

    def make(width: int) -> Mixer:
        units = hidden or width
        made = cell(width, units, **options)

        def start(params, batch_size, max_length, dtype):
            del max_length, dtype
            return Observed(made.start(params, (batch_size,)), {})

        def run(params, state, x, reset):
            assert reset is None, "the check runs on unpacked windows"
            gates = made.project(params, x.swapaxes(0, 1))
            (carry, y), info = solve_scan(
                lambda carry, gates_t: made.step(params, carry, gates_t),
                state.carry,
                gates,
                solver=solver,
            )
            report = {
                "iterations": info.iterations,
                "residual": info.residual,
                "converged": info.converged,
                "fallback_steps": info.fallback_steps,
            }
            return Observed(carry, report), y.swapaxes(0, 1).astype(x.dtype)

        return Mixer(made.init, start, run, units)

    return make


def observer(
    model: Model, tokens: Int[Array, "batch time"]
) -> Callable[[Params], list[dict[str, Any]]]:
    """Makes a function that solves every recurrent layer on a fixed batch.

    Args:
      model: a decoder whose recurrent mixers are `observed`.
      tokens: the batch.

    Returns:
      `params -> reports`, one for each recurrent layer from the first to the last, as
      plain Python values.
    """
    assert model.start is not None and model.run is not None
    start, run = model.start, model.run

    @jax.jit
    def states(params: Params) -> Any:
        return run(params, start(params, *tokens.shape), tokens)[0]

    def observe(params: Params) -> list[dict[str, Any]]:
        pattern = jax.tree.leaves(
            jax.device_get(states(params)), is_leaf=lambda x: isinstance(x, Observed)
        )
        stacked = [part.report for part in pattern if isinstance(part, Observed)]
        # Each member of the pattern is stacked over its repetitions: restore the order of layers.
        periods = len(stacked[0]["iterations"]) if stacked else 0
        return [
            {name: value[period].item() for name, value in report.items()}
            for period in range(periods)
            for report in stacked
        ]

    return observe


def _median_ms(call: Callable[[], Any], repeats: int) -> float:
    jax.block_until_ready(call())  # compiles
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def compare(
    models: Mapping[str, Model],
    params: Params,
    batch: Int[Array, "batch time"],
    *,
    iterations: Sequence[int],
    repeats: int = 5,
) -> list[dict[str, Any]]:
    """Compares the first model with the others on one batch: logits, gradients, time.

    Args:
      models: by the name of their solver; the first is the reference.
      params: of all of them.
      batch: windows, one byte longer than what is predicted.
      iterations: of the parallel solve, one for each recurrent layer.
      repeats: timed calls, of which the median is taken; compilation is not timed.

    Returns:
      A row for each: largest absolute difference of the logits, largest difference of the
      gradient relative to the largest entry of each parameter's gradient, iterations, and
      milliseconds forward and with the gradient.
    """
    rows: list[dict[str, Any]] = []
    reference = None
    for name, model in models.items():
        loss, key = next_token_loss(model), jax.random.key(0)
        forward = jax.jit(model.apply)
        gradient = jax.jit(jax.grad(lambda p, loss=loss, key=key: loss(p, batch, key)[0]))
        found = forward(params, batch[:, :-1]), gradient(params)
        if reference is None:
            reference = found
        relative = jax.tree.map(
            lambda a, b: float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1e-30)),
            found[1],
            reference[1],
        )
        rows.append(
            {
                "solver": name,
                "value_difference": float(jnp.max(jnp.abs(found[0] - reference[0]))),
                "gradient_difference": max(jax.tree.leaves(relative)),
                "iterations": list(iterations) if rows else [],
                "forward_ms": _median_ms(lambda f=forward: f(params, batch[:, :-1]), repeats),
                "gradient_ms": _median_ms(lambda g=gradient: g(params), repeats),
            }
        )
    return rows
