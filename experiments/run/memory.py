"""Estimates the memory of a training step from shapes, before anything is compiled.

It adds up parameters, gradients, optimiser state, the batch, and the values that JAX's
vector-Jacobian product keeps for the backward pass. XLA may fuse some of these away and adds
buffers of its own. The estimate finds steps that cannot run; it is not an exact limit.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.run.folders import RunError
from experiments.run.task import Task
from jaxpara import split
from jaxpara.train import init_state
from jaxpara.types import TrainState

CGROUP = Path("/sys/fs/cgroup/memory.max")
TOKEN_BYTES = 4


class Estimate(NamedTuple):
    """Bytes of a training step by purpose."""

    parameters: int
    gradients: int
    optimiser: int
    batch: int
    activations: int

    def text(self) -> str:
        """The sum and its parts."""
        parts = ", ".join(f"{name} {readable(size)}" for name, size in self._asdict().items())
        return f"{readable(sum(self))} ({parts})"


def readable(size: float) -> str:
    """Formats a number of bytes.

    Args:
      size: bytes.

    Returns:
      Three digits and a unit.
    """
    power = min(int(math.log(max(size, 1), 1024)), 5)
    return f"{size / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"


def tree_bytes(tree: Any) -> int:
    """Bytes of the arrays of a tree, or of their shapes.

    Args:
      tree: leaves have shape and dtype.

    Returns:
      The sum.
    """
    # A key's dtype has an item size as well.
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def machine_bytes() -> int | None:
    """Reads the memory available to a step: of the devices, or of the machine they share.

    Returns:
      Bytes of all local devices together; None if unknown.
    """
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    if all(limits) and jax.default_backend() != "cpu":
        return sum(limit for limit in limits if limit)
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    try:
        return min(whole, int(CGROUP.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # none, or "max"
        return whole


def estimate(task: Task, optimizer: optax.GradientTransformation, *, accumulate: int) -> Estimate:
    """Estimates the memory of one step of a task.

    Args:
      task: with `batch_like`.
      optimizer: of optax.
      accumulate: parts of a batch; only one at a time has activations.

    Returns:
      The estimate; nothing is computed.
    """
    some = {} if task.trainable is None else {"trainable": task.trainable}
    key = jax.eval_shape(lambda: jax.random.key(0))
    state: TrainState = jax.eval_shape(
        lambda key: init_state(task.model, optimizer, key, **some), key
    )
    part = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((-(-x.shape[0] // accumulate), *x.shape[1:]), x.dtype),
        task.batch_like,
    )

    def kept(params, batch, key):
        """Returns the backward pass: a function whose leaves are arrays."""
        floating = [p for p in jax.tree.leaves(params) if jnp.issubdtype(p.dtype, jnp.inexact)]

        def loss(floating):
            rest = iter(floating)
            own = jax.tree.map(
                lambda p: next(rest) if jnp.issubdtype(p.dtype, jnp.inexact) else p, params
            )
            return task.loss(own, batch, key)[0]

        return jax.vjp(loss, floating)[1]

    def trained(params):
        return params if task.trainable is None else split(params, task.trainable(params))[0]

    parameters = tree_bytes(state.params)
    held = tree_bytes(jax.eval_shape(kept, state.params, part, key))
    return Estimate(
        parameters=parameters,
        gradients=tree_bytes(jax.eval_shape(trained, state.params)),
        optimiser=tree_bytes(state.opt_state),
        batch=tree_bytes(task.batch_like),
        activations=max(held - parameters, 0),  # the backward pass holds parameters too
    )


def check_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int,
    have: Callable[[], int | None] = machine_bytes,
) -> None:
    """Refuses a step that needs more memory than is available.

    Args:
      task: what is trained; one without `batch_like` is not checked.
      optimizer: of optax.
      accumulate: parts of a batch.
      have: available bytes.

    Raises:
      RunError: gives the numbers, and what to make smaller.
    """
    there = have()
    if task.batch_like is None or there is None:
        return
    needed = estimate(task, optimizer, accumulate=accumulate)
    if sum(needed) <= there:
        return
    fixed = needed.parameters + needed.gradients + needed.optimiser
    rows = jax.tree.leaves(task.batch_like)[0].shape[0]
    fitting = int((there - fixed) / ((needed.batch + needed.activations) / rows))
    change = (
        f"give batch_size={max(fitting // 2, 1)} or accumulate=N"
        if fitting > 0
        else "give a smaller model"
    )
    raise RunError(
        f"batch_size={rows}: a training step needs about {needed.text()},\n"
        f"and there are {readable(there)}: {change}"
    )


def check_tokens(name: str, sequences: int, length: int) -> None:
    """Refuses held-out tokens that do not fit into memory, before they are drawn.

    Args:
      name: of the setting that gives their number.
      sequences: their number.
      length: tokens in each.

    Raises:
      RunError: gives the numbers.
    """
    there, needed = machine_bytes(), TOKEN_BYTES * sequences * length
    if there is not None and needed > there:
        raise RunError(
            f"{name}={sequences} of {length} tokens need {readable(needed)}, and there are "
            f"{readable(there)}: give {name}={max(there // (8 * TOKEN_BYTES * length), 1)}"
        )
