"""Parts that several weights have in common, kept once beside the parameters."""

import dataclasses
import functools
from typing import Any

import jax

from jaxpara.weights.unlifted import Unlifted
from jaxpara.weights.weight import is_weight


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("params", "pools"), meta_fields=()
)
@dataclasses.dataclass(frozen=True, repr=False)
class Pooled(Unlifted):
    """Parameters some of whose weights have parts in common.

    Attributes:
      params: the tree; its weights name their pools, see `Weight.shared`.
      pools: arrays that are kept here once, by name.
    """

    params: Any
    pools: dict[str, Any]


def is_pooled(node: Any) -> bool:
    """Whether a node is a `Pooled`, as `is_leaf` of `jax.tree` functions."""
    return isinstance(node, Pooled)


def resolved(state: Any) -> Any:
    """The tree in which every weight has its parts, those from pools too.

    Args:
      state: any tree, with a `Pooled` in it or not.

    Returns:
      The tree. Each weight of a pool holds it, so its gradient is the sum over these weights.
    """

    def of(pools):
        def one(leaf):
            if not is_weight(leaf):
                return leaf
            common = {part: pools[name] for part, name in leaf.shared}
            return dataclasses.replace(leaf, base=one(leaf.base), parts={**leaf.parts, **common})

        return one

    def opened(node):
        if not is_pooled(node):
            return node
        return jax.tree.map(of(node.pools), node.params, is_leaf=is_weight)

    return jax.tree.map(opened, state, is_leaf=lambda node: is_pooled(node) or is_weight(node))


def whole(state: Any) -> Any:
    """As `resolved`, where every part of a weight is needed.

    Args:
      state: from `attach`.

    Returns:
      The tree.

    Raises:
      ValueError: a weight has the holes that `jp.split` leaves.
    """
    tree = resolved(state)
    for node in filter(is_weight, jax.tree.leaves(tree, is_leaf=is_weight)):
        leaves = jax.tree.leaves(node, is_leaf=lambda leaf: leaf is None)
        if any(leaf is None for leaf in leaves):
            raise ValueError(
                "this state lacks the leaves that jp.split put into its other part: give "
                "jp.combine(trained, frozen)"
            )
    return tree


def unresolved(weight: Any) -> Any:
    """A weight without the parts that are in pools: undoes `resolved`."""
    if not is_weight(weight):
        return weight
    common = dict(weight.shared)
    own = {name: part for name, part in weight.parts.items() if name not in common}
    return dataclasses.replace(weight, base=unresolved(weight.base), parts=own)
