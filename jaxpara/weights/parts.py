"""Only the parts that a method added to the parameters: small trees to save and to put back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpara import compat
from jaxpara.tree import by_path, path_of
from jaxpara.weights.matrices import matrices_of, put_back
from jaxpara.weights.pools import Pooled, is_pooled
from jaxpara.weights.trained import trainable, trains_itself
from jaxpara.weights.weight import Weight, is_weight


def _parts(weight: Weight) -> dict[str, Any]:
    weight = matrices_of(weight)[0]
    inner = {"base": _parts(weight.base)} if is_weight(weight.base) else {}
    return {**weight.parts, **inner}


def owned(tree: Any) -> Any:
    """The tree with copies of its arrays, which share no memory with anything else.

    Args:
      tree: any.

    Returns:
      The tree; values of a surrounding transform are left as they are.
    """

    def one(leaf):
        return leaf.copy() if isinstance(leaf, jax.Array) and not compat.is_tracer(leaf) else leaf

    return jax.tree.map(one, tree)


def adapters(state: Any, trained: Any = None) -> dict[str, Any]:
    """The trained parts beside frozen weights, without the weights.

    Args:
      state: from `t.attach`, trained or not.
      trained: booleans in the structure of the state, for a mask other than
        `t.trainable(state)`. Biases and other leaves that your mask added are saved too.

    Returns:
      Nested dictionaries of copied arrays in the structure of the parameters: the parts of every
      reparameterised leaf, `{"blocks": {"kernel": {"a": .., "b": ..}}}`, and trained leaves as they
      are; under a leaf `base` holds the parts of the method before, if any. Of a state with pools:
      these as `params`, and `pools`.

    Raises:
      ValueError: no leaf is reparameterised; the weight of a leaf was itself trained, so that
        its parts cannot give it back; or two arrays have the same path.
    """
    mask = trainable(state) if trained is None else trained
    if is_pooled(state):
        return {"params": adapters(state.params, mask.params), "pools": owned(dict(state.pools))}
    found: dict[str, Any] = {}
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_weight)
    marks = jax.tree.leaves(mask, is_leaf=is_weight)
    if not any(is_weight(leaf) for _, leaf in leaves):
        raise ValueError("adapters: no leaf of the state is reparameterised: t.attach makes some")
    for (keys, leaf), marked in zip(leaves, marks, strict=True):
        path = path_of(keys)
        if is_weight(leaf) and trains_itself(marked):
            raise ValueError(
                f"adapters: {leaf.method.name} trains the weight {path!r} itself, so its parts "
                "do not give it back: save the whole state, or what t.merge gives"
            )
        if not (is_weight(leaf) or marked):
            continue
        kept = owned(_parts(leaf) if is_weight(leaf) else leaf)
        *outer, last = path.split("/")
        if not path and len(leaves) == 1:
            return kept
        node: Any = found
        for name in outer:
            node = node.setdefault(name, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last in node:
            # Such as the part "b" of a leaf "a" beside a leaf "a/b".
            raise ValueError(f"adapters: two arrays have the path {path!r}: rename a leaf")
        node[last] = kept
    return found


def with_adapters(state: Any, adapters: dict[str, Any]) -> Any:
    """Puts saved parts and leaves back into a state: undoes `adapters`.

    Args:
      state: from `t.attach` on the weights that the parts belong to, with any key.
      adapters: as from `adapters`; arrays of any kind.

    Returns:
      The state, with copies of the arrays.

    Raises:
      ValueError: a part is missing, is not of this state, or has another shape, or two have the
        same path.
    """
    given = by_path(adapters)

    def taken(where: str, part: jax.Array) -> jax.Array:
        if where not in given:
            raise ValueError(f"with_adapters: there is no {where!r} in the given adapters")
        new = given.pop(where)
        if jnp.shape(new) != part.shape:
            raise ValueError(
                f"with_adapters: {where!r} has shape {jnp.shape(new)} and the state expects "
                f"{part.shape}: attach with the settings that it was trained with"
            )
        return jnp.array(new, part.dtype)

    def replaced(weight: Any, path: str) -> Any:
        if not is_weight(weight):
            return taken(path, weight) if path in given else owned(weight)
        matrices, axes = matrices_of(weight)
        if axes is not None:
            return put_back(replaced(matrices, path), axes)
        inside = f"{path}/" if path else ""
        parts = {name: taken(inside + name, part) for name, part in weight.parts.items()}
        return dataclasses.replace(weight, base=replaced(weight.base, inside + "base"), parts=parts)

    def of_params(keys, leaf):
        return replaced(leaf, path_of(keys))

    if is_pooled(state):
        pools = {name: taken(f"pools/{name}", pool) for name, pool in state.pools.items()}
        state = Pooled(state.params, pools)
    state = jax.tree_util.tree_map_with_path(of_params, state, is_leaf=is_weight)
    if given:
        raise ValueError(f"with_adapters: the state has no {', '.join(map(repr, sorted(given)))}")
    return state
