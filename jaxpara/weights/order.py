"""A product with a weight whose axes are split, joined or moved, as one with the weight itself.

    einsum("bd,dhk->bhk", x, w)  with w the weight [d, (h k)] reshaped  =  (x W) reshaped

The operand is put in order, the result is put back; nothing of the weight moves.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpara.weights.lazy import Atom, Lazy, axes_of, reshaped
from jaxpara.weights.weight import shape_of


class Ordered(NamedTuple):
    """A product with a weight in its own layout.

    Attributes:
      equation: the `dot_general`.
      operands: of it.
      restore: its result to that of the equation it was made from.
    """

    equation: Any
    operands: list[Any]
    restore: Callable[[jax.Array], jax.Array]


def in_order(walk: Any, eqn: Any, lazy: Lazy, side: int, other: Any) -> Ordered | None:
    """A `dot_general` with a lazy weight, in terms of the weight's own axes.

    Args:
      walk: that keeps the new equation.
      eqn: the old one.
      lazy: the weight.
      side: the operand that it is, 0 or 1.
      other: the other operand.

    Returns:
      The product; None where one axis of the weight is contracted in part and kept in part.
    """
    contracting, batch = eqn.params["dimension_numbers"]
    like = shape_of(lazy.weight)
    ndim = len(like.shape)
    kinds: dict[int, set[str]] = {i - ndim: set() for i in range(ndim)}
    for i, axis in enumerate(lazy.axes):
        kind = "sum" if i in contracting[side] else "batch" if i in batch[side] else "free"
        for atom in axis:
            kinds[atom.axis].add(kind)
    # An axis of size one may have no piece.
    kinds = {axis: kind or {"free"} for axis, kind in kinds.items()}
    if any(len(kind) != 1 for kind in kinds.values()):
        return None
    pieces = {axis: [] for axis in kinds}
    for atom in sorted(atom for axis in lazy.axes for atom in axis):
        pieces[atom.axis].append(atom)

    def of(kind: str) -> list[int]:
        return [axis for axis, found in kinds.items() if found == {kind}]

    # The operand's axes: pieces of the weight, and its own by their number.
    own: list[list[Any]] = [[i] for i in range(jnp.ndim(other))]
    for dims in (contracting, batch):
        for theirs, ours in zip(dims[1 - side], dims[side], strict=True):
            own[theirs] = list(lazy.axes[ours])
    mine = [axis for axis in own if axis and not isinstance(axis[0], Atom)]
    shared = [[pieces[axis] for axis in of(kind)] for kind in ("batch", "sum")]
    length = dict(zip(range(jnp.ndim(other)), jnp.shape(other), strict=True))
    x = _moved(other, own, [*shared[0], *mine, *shared[1]], length)
    before, after = len(shared[0]), len(shared[1])
    sums = tuple(range(x.ndim - after, x.ndim)), tuple(axis + ndim for axis in of("sum"))
    batches = tuple(range(before)), tuple(axis + ndim for axis in of("batch"))
    order = 1 if side == 1 else -1
    numbers = (sums[::order], batches[::order])
    key = id(eqn), lazy.axes, side
    if key not in walk.ordered:
        params = {**eqn.params, "dimension_numbers": numbers}
        if "out_sharding" in params:
            params["out_sharding"] = None
        walk.ordered[key] = eqn.replace(params=params)

    kept = [i for i in range(len(lazy.axes)) if i not in (*contracting[side], *batch[side])]
    new = [[*mine], [pieces[axis] for axis in of("free")]][::order]
    old = [[*mine], [list(lazy.axes[i]) for i in kept]][::order]
    lead = [list(lazy.axes[i]) for i in batch[side]]

    def restore(out: jax.Array) -> jax.Array:
        return _moved(out, [*shared[0], *new[0], *new[1]], [*lead, *old[0], *old[1]], length)

    plain = dataclasses.replace(lazy, axes=axes_of(like.shape))
    operands = [x, plain] if side == 1 else [plain, x]
    return Ordered(walk.ordered[key], operands, restore)


def _moved(array: Any, have: list[list[Any]], want: list[list[Any]], length: dict[int, int]) -> Any:
    """An array whose axes consist of pieces, with axes that consist of the same ones."""

    def size(piece: Any) -> int:
        return piece.size if isinstance(piece, Atom) else length[piece]

    flat = [piece for axis in have for piece in axis]
    array = reshaped(jnp.asarray(array), list(map(size, flat)))
    order = [flat.index(piece) for axis in want for piece in axis]
    if order != list(range(len(order))):
        array = array.transpose(order)
    return reshaped(array, [math.prod(map(size, axis)) for axis in want])
