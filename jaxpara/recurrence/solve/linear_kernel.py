"""Linear recurrences over leaves in a kernel: blocks of up to 4 x 4, one a lane."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpara.recurrence.kernel.elementwise import rows
from jaxpara.recurrence.lanes import vary_like
from jaxpara.recurrence.solve import explicit_meshes, jacobian_products
from jaxpara.recurrence.structure.jacobian_blocks import block_size
from jaxpara.recurrence.system import Leaves
from pallas_kernels import linear_recurrence
from pallas_kernels.dispatch import PLATFORMS

# Tried if no implementation is asked for; without "xla", whose place the caller's own path takes.
KERNELS = ("mosaic_gpu", "mosaic_tpu")


OFF = "no kernel runs"


def in_words(refusal: NotImplementedError) -> str:
    """Why no kernel takes a call, in one line: of several, what those of this platform say."""
    reasons = getattr(refusal, "reasons", None)
    if reasons is None:
        return " ".join(str(refusal).split())
    platform = jax.default_backend()
    here = {n: e for n, e in reasons.items() if platform in PLATFORMS.get(n, (platform,))}
    if not here:
        return f"there is none for the platform {platform!r}"
    return " ".join("; ".join(f"{name}: {error}" for name, error in here.items()).split())


@functools.cache
def say(refusal: str, instead: str) -> None:
    """Logs why a kernel does not run, once."""
    logging.getLogger("jaxpara").warning("%s, %s instead: %s", OFF, instead, refusal)


def solve(
    operator: Any, b: Leaves, init: Leaves, implementation: str | None, transpose: bool = False
) -> list[jax.Array] | None:
    """All `v_t` of `v_t = J_t v_{t-1} + b_t`, or None if no kernel takes the recurrence.

    Args:
      operator: an `linear_recurrences.Operator`.
      b: `[time, *leaf]`; init: `v_0`.
      implementation: as for `pallas_kernels.linear_recurrence.forward`.
      transpose: with `J_t^T`, and from the last step to the first.

    Returns:
      `[time, *leaf]` each.
    """
    shapes = [leaf.shape for leaf in init]
    size = max(block_size(group, shapes) for group in operator.groups)
    try:
        if size > linear_recurrence.LARGEST:
            raise NotImplementedError(f"blocks of {size}; kernels take {linear_recurrence.LARGEST}")
        if any(leaf.dtype.itemsize > 4 for leaf in (*b, *init)):
            raise NotImplementedError(f"{b[0].dtype}; kernels take float32 or narrower")
        if implementation != "xla" and (why := explicit_meshes.no_kernel()):
            raise NotImplementedError(why)
        run = functools.partial(_group, implementation=implementation, transpose=transpose)
        if operator.columns:
            return _columns(operator, b, init, run)
        if operator.materialised:
            return _blocks(operator, b, init, run)
        raise NotImplementedError("a Jacobian that is not materialised")
    except NotImplementedError as refusal:
        say(in_words(refusal), "chunked linear recurrence")
        return None


def _group(
    a: Sequence[Leaves], b: Leaves, init: Leaves, *, implementation: str | None, transpose: bool
) -> list[jax.Array]:
    """One group of coupled leaves `[time, *shape]`; `a[i][j]` is row i, column j."""
    shape = init[0].shape
    if not init[0].size:
        return list(b)
    lead = min(1, max(0, len(shape) - 1))
    flat = lambda leaf: rows(leaf, shape, lead)  # noqa: E731
    a, b, init = vary_like((a, b, init), a, b, init)
    matrix = zip(*a, strict=True) if transpose else a
    states = linear_recurrence.forward(
        [flat(entry) for row in matrix for entry in row],
        [flat(leaf) for leaf in b],
        [flat(leaf) for leaf in init],
        reverse=transpose,
        implementation=implementation or KERNELS,
    )
    states = vary_like(states, b)  # kernels say nothing about mesh axes
    return [s.reshape(s.shape[0], *shape) for s in states]


def _columns(operator: Any, b: Leaves, init: Leaves, run: Any) -> list[jax.Array]:
    found: dict[int, jax.Array] = {}
    for group in operator.groups:
        # Rows of one leaf hold a column for each leaf of its group, in the group's order.
        a = [[operator.data[i][:, j] for j in range(len(group.leaves))] for i in group.leaves]
        solved = run(a, [b[i] for i in group.leaves], [init[i] for i in group.leaves])
        found.update(zip(group.leaves, solved, strict=True))
    return [found[i] for i in range(len(init))]


def _blocks(operator: Any, b: Leaves, init: Leaves, run: Any) -> list[jax.Array]:
    groups = operator.groups
    offsets = jax.vmap(lambda *leaves: jacobian_products.to_lanes(groups, leaves))(*b)
    lanes = []
    for matrix, offset, start in zip(
        operator.data, offsets, jacobian_products.to_lanes(groups, init), strict=True
    ):
        every = range(start.shape[0])
        if not every:  # the entries of leaves without elements
            lanes.append(offset)
            continue
        a = [[matrix[:, i, j] for j in every] for i in every]
        solved = run(a, [offset[:, i] for i in every], [start[i] for i in every])
        lanes.append(jnp.stack(solved, axis=1))
    return jax.vmap(lambda *row: jacobian_products.from_lanes(groups, row, init))(*lanes)
