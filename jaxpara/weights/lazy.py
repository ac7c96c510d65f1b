"""A weight on its way through a jaxpr: transposed, reshaped, cast and sliced without being built.

Where the axes of the weight have gone is remembered, and the array is put in that order once
there is one. A slice is made at once, on the parts, where the method can be sliced along that axis.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.weights.weight import Weight, cut, dense, shape_of


class Atom(NamedTuple):
    """A piece of an axis of a weight.

    Attributes:
      axis: of the weight, counted from its end.
      part: which piece; pieces in the order of the axis are sorted, `()` is the whole axis.
      size: of the piece.
      name: what else is known of it; goes where the atom goes.
    """

    axis: int
    part: tuple[int, ...]
    size: int
    name: Any = None


Axes = tuple[tuple[Atom, ...], ...]
"""Of what each axis of an array consists, slowest first; nothing is an axis of size one."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight",),
    meta_fields=("axes", "casts", "path"),
)
@dataclasses.dataclass(frozen=True)
class Lazy:
    """A weight on its way through a jaxpr.

    Attributes:
      weight: a `Weight`.
      axes: of the array that it represents, in terms of the weight's.
      casts: dtypes, in order, still to be taken.
      path: of the leaf that it came from, for reports.
    """

    weight: Weight
    axes: Axes
    casts: tuple[Any, ...]
    path: str

    def array(self) -> jax.Array:
        """The dense array."""
        return arranged(cast(dense(self.weight), self.casts), self.axes)


def lazy(weight: Weight, path: str) -> Lazy:
    """A weight before anything happened to it.

    Args:
      weight: the weight.
      path: of its leaf.

    Returns:
      The lazy value.
    """
    return Lazy(weight, axes_of(shape_of(weight).shape), (), path)


def axes_of(shape: Sequence[int]) -> Axes:
    """The axes of an array of this shape that is a weight in its own layout."""
    return tuple((Atom(i - len(shape), (), size),) for i, size in enumerate(shape))


def cast(array: jax.Array, casts: Sequence[Any]) -> jax.Array:
    """An array after its casts."""
    for dtype in casts:
        array = array.astype(dtype)
    return array


def arranged(array: jax.Array, axes: Axes) -> jax.Array:
    """A weight's array in another order of its pieces.

    Args:
      array: with the axes of the weight.
      axes: the wanted ones.

    Returns:
      The array; untouched if it is in order already.
    """
    here = sorted(atom for axis in axes for atom in axis)
    order = tuple(here.index(atom) for axis in axes for atom in axis)
    array = reshaped(array, [atom.size for atom in here])
    array = array if order == tuple(range(len(order))) else array.transpose(order)
    return reshaped(array, sizes(axes))


def reshaped(array: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The array in this shape; untouched if it has it."""
    return array if array.shape == tuple(shape) else array.reshape(shape)


def sizes(axes: Axes) -> tuple[int, ...]:
    """The shape of an array with these axes."""
    return tuple(math.prod(atom.size for atom in axis) for axis in axes)


def is_lazy(value: Any) -> bool:
    """Whether a value of a walk is lazy."""
    return isinstance(value, Lazy)


def array(value: Any) -> Any:
    """A value of a walk as an array."""
    return value.array() if is_lazy(value) else value


def is_plain(lazy: Lazy) -> bool:
    """Whether each axis of the array is one whole axis of the weight."""
    return all(len(axis) == 1 and axis[0].part == () for axis in lazy.axes)


def final_axes(lazy: Lazy) -> tuple[int, ...]:
    """For each axis of the array, of a plain one, the axis of the weight, from its end."""
    return tuple(axis[0].axis for axis in lazy.axes)


# What slicing does to the weight itself.


def sliced(lazy: Lazy, position: int, one: Any, size: int) -> Lazy | None:
    """The lazy value after a slice of one of its axes.

    Args:
      lazy: the value.
      position: of the axis.
      one: see `cut`.
      size: of the slice.

    Returns:
      The value; None where the axis is not one of the weight's, or its method cannot be sliced.
    """
    if len(lazy.axes[position]) != 1 or lazy.axes[position][0].part != ():
        return None
    atom = lazy.axes[position][0]
    weight: Any = cut(lazy.weight, atom.axis, one)
    if weight is None:
        return None
    axes = list(lazy.axes)
    axes[position] = (atom._replace(size=size),)
    return dataclasses.replace(lazy, weight=weight, axes=tuple(axes))


def dropped(lazy: Lazy, position: int, one: Any) -> Lazy | None:
    """The lazy value without one of its axes, which must be a batch of the weight.

    Args:
      lazy: the value.
      position: of the axis.
      one: see `cut`; drops the axis.

    Returns:
      The value, or None.
    """
    axis = lazy.axes[position]
    if not axis:
        return dataclasses.replace(lazy, axes=lazy.axes[:position] + lazy.axes[position + 1 :])
    # Only leading axes are batches.
    if len(axis) != 1 or axis[0].part != () or axis[0].axis >= -2:
        return None
    gone = axis[0].axis
    weight: Any = cut(lazy.weight, gone, one)
    if weight is None:
        return None
    left = lazy.axes[:position] + lazy.axes[position + 1 :]
    return dataclasses.replace(lazy, weight=weight, axes=_renumbered(left, gone, 1))


def _renumbered(axes: Axes, beyond: int, by: int) -> Axes:
    """Axes whose atoms before the weight's axis `beyond` have moved."""
    return tuple(
        tuple(a._replace(axis=a.axis + by) if a.axis < beyond else a for a in axis) for axis in axes
    )


def split_atom(lazy: Lazy, atom: Atom, first: int) -> tuple[Lazy, Atom, Atom] | None:
    """The lazy value with an atom in two.

    Args:
      lazy: the value.
      atom: of it.
      first: size of the slower piece, which divides the atom's.

    Returns:
      The value and the pieces. A batch of the weight becomes two; None if its method forbids it.
    """
    pair = (first, atom.size // first)
    if atom.axis < -2 and atom.part == ():

        def one(array, position):
            return array.reshape(*array.shape[:position], *pair, *array.shape[position + 1 :])

        weight: Any = cut(lazy.weight, atom.axis, one)
        if weight is None:
            return None
        places = (atom.axis - 1, atom.axis)
        new = tuple(
            Atom(place, (), size, _named(atom.name, i))
            for i, (place, size) in enumerate(zip(places, pair, strict=True))
        )
        lazy = dataclasses.replace(lazy, weight=weight)
        axes = _renumbered(lazy.axes, atom.axis, -1)
    else:
        new = tuple(
            Atom(atom.axis, (*atom.part, i), size, _named(atom.name, i))
            for i, size in enumerate(pair)
        )
        axes = lazy.axes
    axes = tuple(tuple(b for a in axis for b in (new if a == atom else (a,))) for axis in axes)
    return dataclasses.replace(lazy, axes=axes), new[0], new[1]


def _named(name: Any, i: int) -> Any:
    return None if name is None else (*name, i)


# Moves by the primitive that makes them: `(equation, operands) -> values`, None if it cannot.


def _transpose(eqn: Any, operands: list[Any]) -> list[Any]:
    (lazy,) = operands
    axes = tuple(lazy.axes[i] for i in eqn.params["permutation"])
    return [dataclasses.replace(lazy, axes=axes)]


def _cast(eqn: Any, operands: list[Any]) -> list[Any] | None:
    (lazy,) = operands
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return [dataclasses.replace(lazy, casts=(*lazy.casts, dtype))]


def _same(eqn: Any, operands: list[Any]) -> list[Any]:
    return list(operands)


def _reshape(eqn: Any, operands: list[Any]) -> list[Any] | None:
    """Axes split and joined; None where a new axis has no whole pieces."""
    lazy, *sizes = operands
    wanted = eqn.params["new_sizes"]
    if sizes or eqn.params.get("dimensions") is not None or 0 in wanted:
        return None
    # Axes of size one come and go: batches of the weight are taken out of it.
    position = 0
    while position < len(lazy.axes):
        axis = lazy.axes[position]
        if math.prod(atom.size for atom in axis) != 1:
            position += 1
            continue
        lazy = dropped(lazy, position, lambda array, place: lax.squeeze(array, (place,)))
        if lazy is None:
            return None
    groups: list[int] = []  # how many atoms each new axis has
    taken = 0
    for size in wanted:
        have, count = 1, 0
        while have < size:
            atom = [a for axis in lazy.axes for a in axis][taken + count]
            need = size // have
            if size % have:
                return None
            if need % atom.size:
                if atom.size % need:
                    return None
                parted = split_atom(lazy, atom, need)
                if parted is None:
                    return None
                lazy, atom, _ = parted
            have, count = have * atom.size, count + 1
        groups.append(count)
        taken += count
    flat = iter([a for axis in lazy.axes for a in axis])
    axes = tuple(tuple(next(flat) for _ in range(count)) for count in groups)
    if next(flat, None) is not None:
        return None
    return [dataclasses.replace(lazy, axes=axes)]


def _broadcast(eqn: Any, operands: list[Any]) -> list[Any] | None:
    """New axes of size one."""
    lazy, *more = operands
    shape, places = eqn.params["shape"], tuple(eqn.params["broadcast_dimensions"])
    kept = all(shape[i] == size for i, size in zip(places, eqn.invars[0].aval.shape, strict=True))
    others = [i for i in range(len(shape)) if i not in places]
    if more or not is_lazy(lazy) or not kept or any(shape[i] != 1 for i in others):
        return None
    axes = tuple(lazy.axes[places.index(i)] if i in places else () for i in range(len(shape)))
    return [dataclasses.replace(lazy, axes=axes)]


def _slice(eqn: Any, operands: list[Any]) -> list[Any] | None:
    (lazy,) = operands
    shape = eqn.invars[0].aval.shape
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(shape)
    for i, (size, start, limit, stride) in enumerate(
        zip(shape, starts, limits, strides, strict=True)
    ):
        if (start, limit, stride) == (0, size, 1):
            continue
        take = functools.partial(_take, start=start, limit=limit, stride=stride)
        lazy = sliced(lazy, i, take, eqn.outvars[0].aval.shape[i])
        if lazy is None:
            return None
    return [lazy]


def _take(array, position, *, start, limit, stride):
    return lax.slice_in_dim(array, start, limit, stride, position)


def _dynamic_slice(eqn: Any, operands: list[Any]) -> list[Any] | None:
    lazy, *starts = operands
    if not is_lazy(lazy):
        return None
    shape, wanted = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    for i, (size, length, start) in enumerate(zip(shape, wanted, starts, strict=True)):
        if size == length:
            continue

        def take(array, position, start=start, length=length):
            return lax.dynamic_slice_in_dim(array, start, length, position)

        lazy = sliced(lazy, i, take, length)
        if lazy is None:
            return None
    return [lazy]


def _split(eqn: Any, operands: list[Any]) -> list[Any] | None:
    (lazy,) = operands
    start, outs = 0, []
    for size in map(int, eqn.params["sizes"]):
        take = functools.partial(_take, start=start, limit=start + size, stride=1)
        outs.append(sliced(lazy, eqn.params["axis"], take, size))
        if outs[-1] is None:
            return None
        start += size
    return outs


def _squeeze(eqn: Any, operands: list[Any]) -> list[Any] | None:
    (lazy,) = operands
    for position in sorted(eqn.params["dimensions"], reverse=True):
        lazy = dropped(lazy, position, lambda array, place: lax.squeeze(array, (place,)))
        if lazy is None:
            return None
    return [lazy]


MOVES = {
    "transpose": _transpose,
    "convert_element_type": _cast,
    "copy": _same,
    "copy_p": _same,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "squeeze": _squeeze,
}
