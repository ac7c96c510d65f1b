"""Is a step affine in its state? Proved from its equations, or not claimed.

By values, not by derivatives: `a h + stop_gradient(tanh(h))` and `a h + sign(h)` have derivatives
that do not depend on the state, and are not affine. An equation not listed here is not linear.
"""

from collections.abc import Collection, Sequence

import jax.numpy as jnp

from jaxpara.recurrence.structure.flat import Flat, Node, slots

# Linear in all their operands together.
_LINEAR = frozenset(
    {"add", "add_any", "broadcast_in_dim", "copy", "copy_p", "neg", "optimization_barrier"}
    | {"pcast", "pvary", "reshape", "sub"}
)


def affine_in(state: Collection[int], flat: Flat, nodes: Sequence[Node]) -> bool:
    """Whether the outputs of a flattened function are affine in some of its float32 inputs.

    Args:
      state: slots of those inputs.
      flat: the function.
      nodes: its equations that the outputs need.

    Returns:
      True only where every equation on the state is affine in it and rounds to nothing narrower
      than float32, so that the derivative that JAX takes is exact and the same at every state.
    """
    moving = set(state)
    for node in nodes:
        if not moving & set(slots(node.operands)):
            continue
        on_state = [isinstance(atom, int) and atom in moving for atom in node.operands]
        if not _linear(node, on_state, flat):
            return False
        moving.update(node.results)
    return all(flat.avals[slot].dtype == jnp.float32 for slot in moving)


def _linear(node: Node, on_state: Sequence[bool], flat: Flat) -> bool:
    """Whether an equation is linear in those of its operands that depend on the state."""
    if node.name == "mul":
        return not all(on_state)
    if node.name == "div":
        return not on_state[1]
    if node.name == "select_n":
        return not on_state[0]
    if node.name == "convert_element_type":
        return flat.avals[node.result].dtype == jnp.float32
    return node.name in _LINEAR
