"""Time sharded over a mesh axis: what the devices tell one another.

Inside `shard_map` every device owns consecutive steps. One iteration needs one
all-gather of chunk summaries (the end and the start of the local trajectory, the
product of its Jacobians, a flag); the few numbers that follow from it are computed
by every device, so no second exchange is needed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.recurrence.blocks import Groups
from jaxpara.recurrence.system import Leaves, residuals


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


def along(axis: str | None, reverse: bool) -> Along | None:
    """The mesh axis of a solve, or None if time is not sharded."""
    return None if axis is None else Along(axis, reverse)


def preceding(axis: Along | None, first: Leaves, states: Leaves) -> list[jax.Array]:
    """The state before every step: `states` shifted by one, `first` in front.

    With time sharded, `first` stands before the first step of the first device only.
    """
    if axis is not None:
        first = axis.previous([s[-1] for s in states], list(first))
    return [jnp.concatenate([f[None], s[:-1]]) for f, s in zip(first, states, strict=True)]


def across(
    axis: Along,
    groups: Groups,
    init,
    tol,
    cap,
    chain,
    *,
    ends,
    leaving,
    product,
    firsts,
    excess,
    worst,
):
    """Tests the boundaries between devices and corrects each device's first state.

    Args:
      axis: the mesh axis.
      chain: the correction of one level, applied here to devices instead of chunks.
      ends: the state after the last local step; `leaving`: the same, corrected as if
        the device's first state were exact; `product`: its Jacobian.
      firsts: the state before the first local step.
      excess, worst: of the local boundaries.

    Returns:
      `(first, excess, worst)`: this device's corrected first state; excess and residual,
      the largest of all boundaries of all devices.
    """
    ends, leaving, product, firsts, excess, worst = axis.gather(
        (ends, leaving, product, firsts, excess, worst)
    )
    over, between = residuals([e[:-1] for e in ends], [f[1:] for f in firsts], init, tol)
    holds = jnp.cumprod((jnp.maximum(over, excess[:-1]) <= 1).astype(jnp.int32))
    still = [jnp.zeros_like(i) for i in init]
    corrected = chain(groups, leaving, product, firsts, jnp.sum(holds), still, cap)
    rows = [jnp.concatenate([i[None], c]) for i, c in zip(init, corrected, strict=True)]
    first = [lax.dynamic_index_in_dim(r, axis.rank(), keepdims=False) for r in rows]
    most = jnp.maximum(jnp.max(over, initial=0.0), jnp.max(excess))
    return first, most, jnp.maximum(between, jnp.max(worst))
