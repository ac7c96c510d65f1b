"""A weight on its way through a jaxpr: transposed, cast and sliced without being built.

Transposes and casts are remembered and made on the array, once there is one. A slice is made
at once, on the parts, where the method can be sliced along that axis.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.weights.weight import Weight, cut, dense, shape_of


class Move(NamedTuple):
    """Something still to come: `("transpose", permutation)` or `("cast", dtype)`."""

    kind: str
    value: Any


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("weight",), meta_fields=("moves", "path")
)
@dataclasses.dataclass(frozen=True)
class Lazy:
    """A weight on its way through a jaxpr.

    Attributes:
      weight: a `Weight`.
      moves: to be made on the array, in order, when there is one.
      path: of the leaf that it came from, for reports.
    """

    weight: Weight
    moves: tuple[Move, ...]
    path: str

    def array(self) -> jax.Array:
        """The dense array."""
        return moved(dense(self.weight), self.moves)


def moved(array: jax.Array, moves: Sequence[Move]) -> jax.Array:
    """An array after its moves."""
    for kind, value in moves:
        array = array.transpose(value) if kind == "transpose" else array.astype(value)
    return array


def is_lazy(value: Any) -> bool:
    """Whether a value of a walk is lazy."""
    return isinstance(value, Lazy)


def array(value: Any) -> Any:
    """A value of a walk as an array."""
    return value.array() if is_lazy(value) else value


def final_axes(lazy: Lazy) -> tuple[int, ...]:
    """For each axis of the moved array the axis of the weight, counted from its end."""
    ndim = len(shape_of(lazy.weight).shape)
    axes = tuple(range(-ndim, 0))
    for kind, value in lazy.moves:
        if kind == "transpose":
            axes = tuple(axes[i] for i in value)
    return axes


def transposed(lazy: Lazy) -> bool:
    """Whether a transpose is still to come."""
    return any(kind == "transpose" for kind, _ in lazy.moves)


# Moves by the primitive that makes them: `(equation, operands) -> values`, None if it cannot.


def _transpose(eqn: Any, operands: list[Any]) -> list[Any]:
    (lazy,) = operands
    move = Move("transpose", tuple(eqn.params["permutation"]))
    return [Lazy(lazy.weight, (*lazy.moves, move), lazy.path)]


def _cast(eqn: Any, operands: list[Any]) -> list[Any] | None:
    (lazy,) = operands
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return [Lazy(lazy.weight, (*lazy.moves, Move("cast", dtype)), lazy.path)]


def _same(eqn: Any, operands: list[Any]) -> list[Any]:
    return list(operands)


def _slice(eqn: Any, operands: list[Any]) -> list[Any] | None:
    (lazy,) = operands
    shape = eqn.invars[0].aval.shape
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(shape)
    weight: Any = lazy.weight
    for i, (size, start, limit, stride) in enumerate(
        zip(shape, starts, limits, strides, strict=True)
    ):
        if (start, limit, stride) == (0, size, 1):
            continue
        take = functools.partial(_take, start=start, limit=limit, stride=stride)
        weight = cut(weight, final_axes(lazy)[i], take)
        if weight is None:
            return None
    return [Lazy(weight, lazy.moves, lazy.path)]


def _take(array, position, *, start, limit, stride):
    return lax.slice_in_dim(array, start, limit, stride, position)


def _dynamic_slice(eqn: Any, operands: list[Any]) -> list[Any] | None:
    lazy, *starts = operands
    if not is_lazy(lazy):
        return None
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    weight: Any = lazy.weight
    for i, (size, wanted, start) in enumerate(zip(shape, sizes, starts, strict=True)):
        if size == wanted:
            continue

        def take(array, position, start=start, wanted=wanted):
            return lax.dynamic_slice_in_dim(array, start, wanted, position)

        weight = cut(weight, final_axes(lazy)[i], take)
        if weight is None:
            return None
    return [Lazy(weight, lazy.moves, lazy.path)]


def _split(eqn: Any, operands: list[Any]) -> list[Any] | None:
    (lazy,) = operands
    start, outs = 0, []
    for size in eqn.params["sizes"]:
        take = functools.partial(_take, start=start, limit=start + size, stride=1)
        weight = cut(lazy.weight, final_axes(lazy)[eqn.params["axis"]], take)
        if weight is None:
            return None
        outs.append(Lazy(weight, lazy.moves, lazy.path))
        start += size
    return outs


def _squeeze(eqn: Any, operands: list[Any]) -> list[Any] | None:
    (lazy,) = operands
    dropped = eqn.params["dimensions"]
    ndim = len(shape_of(lazy.weight).shape)
    # Only leading axes are batches; the moves must not mix them with the others.
    if transposed(lazy) or any(axis >= ndim - 2 for axis in dropped):
        return None
    weight: Any = lazy.weight
    for axis in sorted(dropped, reverse=True):
        have = len(shape_of(weight).shape)
        weight = cut(weight, axis - have, lambda array, position: lax.squeeze(array, (position,)))
        if weight is None:
            return None
    return [Lazy(weight, lazy.moves, lazy.path)]


MOVES = {
    "transpose": _transpose,
    "convert_element_type": _cast,
    "copy": _same,
    "copy_p": _same,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "squeeze": _squeeze,
}
