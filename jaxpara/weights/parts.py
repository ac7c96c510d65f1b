"""What a method added to the parameters, alone: small trees to save, to send and to put back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpara.tree import path_of
from jaxpara.weights.matrices import matrices_of, put_back
from jaxpara.weights.weight import Pooled, Weight, is_pooled, is_weight


def _parts(weight: Weight) -> dict[str, Any]:
    weight = matrices_of(weight)[0]
    inner = {"base": _parts(weight.base)} if is_weight(weight.base) else {}
    return {**weight.parts, **inner}


def _frozen(weight: Any) -> bool:
    """Whether some method leaves the array below as it was."""
    return is_weight(weight) and (weight.method.freezes or _frozen(weight.base))


def adapters(state: Any) -> dict[str, Any]:
    """The parts of all reparameterised leaves, without the weights that they were added to.

    Args:
      state: from `t.attach`, trained or not.

    Returns:
      Nested dictionaries of arrays in the structure of the parameters, `{"blocks": {"kernel":
      {"a": .., "b": ..}}}`; under a leaf `base` holds the parts of the method before, if any.
      Of a state with pools: these as `params`, and `pools`.

    Raises:
      ValueError: no leaf is reparameterised, or one is whose own weight was trained too, which
        its parts cannot give back.
    """
    if is_pooled(state):
        return {"params": adapters(state.params), "pools": dict(state.pools)}
    found: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_weight):
        if not is_weight(leaf):
            continue
        path = path_of(keys)
        if not _frozen(leaf):
            raise ValueError(
                f"adapters: {leaf.method.name} trains the weight {path!r} itself, so its parts "
                "alone do not give it back: save the whole state, or what t.merge gives"
            )
        *outer, last = path.split("/")
        node = found
        for name in outer:
            node = node.setdefault(name, {})
        if last:
            node[last] = _parts(leaf)
        else:  # the tree is one leaf
            found = _parts(leaf)
    if not found:
        raise ValueError("adapters: no leaf of the state is reparameterised: t.attach makes some")
    return found


def with_adapters(state: Any, adapters: dict[str, Any]) -> Any:
    """A state with saved parts in the place of its own: undoes `adapters`.

    Args:
      state: from `t.attach` on the weights that the parts belong to; the key is of no matter.
      adapters: as from `adapters`; arrays of any kind.

    Returns:
      The state.

    Raises:
      ValueError: a part is missing, is not of this state, or has another shape.
    """
    given = {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(adapters)}

    def taken(where: str, part: jax.Array) -> jax.Array:
        if where not in given:
            raise ValueError(f"with_adapters: there is no {where!r} in what was given")
        new = given.pop(where)
        if jnp.shape(new) != part.shape:
            raise ValueError(
                f"with_adapters: {where!r} has shape {jnp.shape(new)} and the state wants "
                f"{part.shape}: attach with the settings that it was trained with"
            )
        return jnp.asarray(new, part.dtype)

    def replaced(weight: Any, path: str) -> Any:
        if not is_weight(weight):
            return weight
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
