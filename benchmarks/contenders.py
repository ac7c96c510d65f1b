"""The implementations of a recurrence that are compared in time.

Each is a function of `(consts, init, xs, cotangents)`. In `forward` it returns the states; in
`forward_backward` it returns the states and the cotangents of `init`, `xs` and the parameters.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxpara as jp
from benchmarks import recurrences
from benchmarks.points import KERNEL, SCAN, SOLVER, Point
from benchmarks.recurrences import Recurrence
from jaxpara.recurrence import rule
from jaxpara.recurrence.solve import linear_kernel
from pallas_kernels import linear_recurrence, nonlinear_recurrence

# Requested by name: a kernel that cannot take a call then fails instead of being replaced.
BACKENDS = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu", "cpu": "xla"}


class Result(NamedTuple):
    """The result of a pass.

    Attributes:
      states: `[T, B, D]` each.
      d_init: `[B, D]` each; none in forward.
      d_xs: `[T, B, D]` each.
      d_params: `[B, D]` each, by sequence, in the order of the recurrence's consts; or none.
      iterations: `[B]`, or none.
      fallback_steps: `[B]`, or none.
    """

    states: list[jax.Array]
    d_init: Sequence[jax.Array] = ()
    d_xs: Sequence[jax.Array] = ()
    d_params: Sequence[jax.Array] = ()
    iterations: jax.Array | None = None
    fallback_steps: jax.Array | None = None


def without_counts(result: Result) -> Result:
    """Drops what a training step does not need from a result: two small launches fewer.

    Args:
      result: of a kernel.

    Returns:
      The same arrays.
    """
    return result._replace(iterations=None, fallback_steps=None)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Fails if a traced kernel is replaced: a row of something else must not be called fused.

    Raises:
      NotImplementedError: at its end, if `newton_scan` reported that a kernel was off.
    """
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("jaxpara")
    linear_kernel.say.cache_clear()  # a repeated message would not be logged again
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    refusals = [line for line in said if line.startswith(linear_kernel.OFF)]
    if refusals:
        raise NotImplementedError(" ".join(refusals[0].split()))


def contender(point: Point, implementation: str) -> Callable[..., Result]:
    """Finds the implementation that a point names.

    Args:
      point: what is measured.
      implementation: of the kernel, by name.

    Returns:
      A function of `(consts, init, xs, cotangents)`.

    Raises:
      ValueError: no such implementation.
    """
    recurrence = recurrences.make(point.op, point.shape.width)
    backward = point.which == "forward_backward"
    if point.implementation == KERNEL and recurrence.affine:
        return _linear_kernel(recurrence, backward, implementation)
    if point.implementation == KERNEL:
        return _kernel(recurrence, point, backward, implementation)
    if point.implementation == SCAN:
        return _scan(recurrence, jax.lax.scan, backward)
    if point.implementation.startswith(SOLVER):
        solver = rule.PATHS[point.implementation.removeprefix(SOLVER)]

        def scan(f, init, xs):
            return jp.newton_scan(f, init, xs, solver=solver, derivative="reverse")

        return _scan(recurrence, scan, backward)
    raise ValueError(f"implementation={point.implementation!r} is not one that can be timed")


def _scan(recurrence: Recurrence, scan: Callable[..., Any], backward: bool):
    """Uses a float32 carry for any storage, like the kernels."""

    def solve(consts, init, xs):
        def step(h, x):
            h = recurrence.step(consts, h, [v.astype(jnp.float32) for v in x])
            return h, [v.astype(xs[0].dtype) for v in h]

        return scan(step, [h.astype(jnp.float32) for h in init], xs)[1]

    def run(consts, init, xs, cotangents):
        if not backward:
            return Result(solve(consts, init, xs))
        states, pull = jax.vjp(solve, consts, init, xs)
        _, d_init, d_xs = pull(cotangents)  # the parameters' are sums over sequences
        return Result(states, d_init, d_xs)

    return run


def _linear_kernel(recurrence: Recurrence, backward: bool, implementation: str):
    entries = recurrence.leaves.states**2

    def run(consts, init, xs, cotangents):
        del consts
        a, b = xs[:entries], xs[entries:]
        states = linear_recurrence.forward(a, b, init, implementation=implementation)
        if not backward:
            return Result(states)
        found = linear_recurrence.backward(
            a, b, init, states, cotangents, implementation=implementation
        )
        return Result(states, found.init, [*found.a, *found.b])

    return run


def _kernel(recurrence: Recurrence, point: Point, backward: bool, implementation: str):
    prepared = recurrences.prepared(recurrence, point.shape, point.dtype)
    order = recurrences.order_of_params(prepared, recurrence, point.shape)

    def run(consts, init, xs, cotangents):
        inputs, params = prepared.operands(consts, xs)
        states, iterations, _, fallback = nonlinear_recurrence.forward(
            prepared.cell,
            init,
            inputs,
            params,
            certain=recurrence.certain,  # as `newton_scan` proves; all else is its default
            implementation=implementation,
        )
        if not backward:
            return Result(states, iterations=iterations, fallback_steps=fallback)
        d_init, d_xs, d_params, more = nonlinear_recurrence.backward(
            prepared.cell, init, inputs, params, states, cotangents, implementation=implementation
        )
        in_order = [d_params[order.index(i)] for i in range(len(d_params))]
        return Result(states, d_init, d_xs, in_order, iterations, fallback + more)

    return run
