"""Time sharded over a mesh axis: the messages between the devices.

Inside `shard_map` every device owns consecutive steps. One iteration needs one
all-gather of chunk summaries (the end and the start of the local trajectory, the
product of its Jacobians, flags); the few numbers that follow from it are computed
by every device, so no second exchange is needed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.recurrence.structure.jacobian_blocks import Groups
from jaxpara.recurrence.system import Leaves


class Along(NamedTuple):
    """A mesh axis in scan order: `rank` 0 holds the steps that come first."""

    name: str
    reverse: bool

    @property
    def size(self) -> int:
        return lax.axis_size(self.name)

    def rank(self) -> jax.Array:
        index = lax.axis_index(self.name)
        return self.size - 1 - index if self.reverse else index

    def gather(self, tree):
        """Every leaf of every device, stacked in scan order."""
        rows = lax.all_gather(tree, self.name)
        return jax.tree.map(lambda r: r[::-1], rows) if self.reverse else rows

    def previous(self, tree, fill):
        """The value of the device before this one; `fill` on the first."""
        step = -1 if self.reverse else 1
        pairs = [(i, i + step) for i in range(self.size) if 0 <= i + step < self.size]
        moved = jax.tree.map(lambda leaf: lax.ppermute(leaf, self.name, pairs), tree)
        first = self.rank() == 0
        return jax.tree.map(lambda m, f: jnp.where(first, f, m), moved, fill)

    def agree(self, flags):
        """Scalars that are equal on all devices, as values that do not vary."""

        def one(flag):
            wide = flag.astype(jnp.int32) if flag.dtype == jnp.bool_ else flag
            return lax.pmax(wide, self.name).astype(flag.dtype)

        return jax.tree.map(one, flags)

    def from_rank(self, tree, rank):
        """The value of the device of that rank, on all of them."""
        mine = self.rank() == rank
        return jax.tree.map(
            lambda leaf: lax.psum(jnp.where(mine, leaf, jnp.zeros_like(leaf)), self.name), tree
        )


def require_axis(name: str) -> None:
    """Refuses a call with time sharded outside of a `shard_map` over that axis.

    Args:
      name: the mesh axis, as the user gave it.

    Raises:
      ValueError: no such axis is bound.
    """
    try:
        lax.axis_size(name)
    except NameError:
        raise ValueError(
            f"axis is {name!r}, and this call is not inside a jax.shard_map over an axis of that "
            f"name: make one, such as jax.shard_map(..., mesh=jax.make_mesh((4,), ({name!r},))), "
            "or leave axis= out"
        ) from None


def along(axis: str | None, reverse: bool) -> Along | None:
    """The mesh axis of a solve, or None if time is not sharded."""
    return None if axis is None else Along(axis, reverse)


def preceding(axis: Along | None, first: Leaves, states: Leaves) -> list[jax.Array]:
    """The state before every step: `states` shifted by one, `first` in front.

    With time sharded, `first` comes before the first step of the first device only.
    """
    if axis is not None:
        first = axis.previous([s[-1] for s in states], list(first))
    return [jnp.concatenate([f[None], s[:-1]]) for f, s in zip(first, states, strict=True)]


def first(
    axis: Along,
    groups: Groups,
    init: Leaves,
    cap,
    chain,
    left: Leaves,
    product: Leaves,
    lost: jax.Array,
    starts: Leaves,
) -> tuple[list[jax.Array], jax.Array]:
    """The corrected first state of this device, each device taken for one chunk.

    Args:
      axis: the mesh axis.
      groups: structure of the Jacobians.
      init: the state before the first step of the first device.
      cap: corrections beyond it are dropped.
      chain: corrects the starts of chunks, see `shooting`.
      left: the state after the last local step, corrected as if the first local one were exact.
      product: the Jacobian of all local steps.
      lost: whether a correction on the way to `left` was dropped.
      starts: of the local chunks.

    Returns:
      The state, and whether a correction on the way to it was dropped.
    """
    left, product, lost, firsts = axis.gather((left, product, lost, [s[0] for s in starts]))
    deltas, corrected = chain(groups, left, product, firsts, init, cap)
    here = lambda r: lax.dynamic_index_in_dim(r, axis.rank(), keepdims=False)  # noqa: E731
    dropped = jnp.stack([jnp.any(~jnp.isfinite(here(d))) for d in deltas])
    # What leaves the last device goes nowhere.
    return [here(c) for c in corrected], jnp.any(dropped) | jnp.any(lost[:-1])
