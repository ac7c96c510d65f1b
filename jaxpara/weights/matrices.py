"""Which axes of a leaf are batches, which are summed over and which are kept, and the leaf as such.

A method is written for `[*batch, inputs, outputs]`. A leaf of another layout is put in that order
when something is attached to it, and its last method puts it back:

    effective = back(method(in order(W), parts))

"Back" is a permutation of pieces of axes and does not touch a number.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpara.sizes import needed
from jaxpara.weights.lazy import Atom, Axes, Lazy, arranged, lazy, reshaped
from jaxpara.weights.method import Method
from jaxpara.weights.weight import Weight, dense, is_weight, shape_of


class Layout(NamedTuple):
    """The roles of the axes of a leaf in a product; each axis has one.

    `Layout(inputs=(1,), outputs=(0,))` is the weight of `w @ x`, as Equinox and PyTorch keep it.
    An axis with two roles is given in pieces: `Layout((2,), (0, 1), (3,),
    pieces=((3,), (4,), (8, 16)))` is the kernel `[3, 4, 128]` of a convolution with 8 groups.

    Attributes:
      inputs: axes that are summed over; in this order they are the rows of the matrix.
      outputs: axes that are kept, its columns.
      batch: axes along which there is a matrix for each entry.
      pieces: of what each axis is made up, slowest first; the numbers above then count pieces.
        Empty: each axis is one.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: tuple[int, ...] = ()
    pieces: tuple[tuple[int, ...], ...] = ()


def axes_for(layout: Layout, shape: Sequence[int]) -> Axes | None:
    """The axes of a leaf in terms of those of its matrices.

    Args:
      layout: of the leaf.
      shape: of the leaf.

    Returns:
      The axes; None where the leaf already is `[*batch, inputs, outputs]`.

    Raises:
      ValueError: the layout is not made of tuples of axes, it does not name each axis once, or its
        pieces do not make them up.
    """
    for role, own in layout._asdict().items():
        if not isinstance(own, tuple | list):
            raise ValueError(f"{layout}: {role} is {own!r}; give a tuple, such as {role}=(0,)")
    for axis in (*layout.batch, *layout.inputs, *layout.outputs):
        needed(axis=axis)
    pieces = layout.pieces or tuple((size,) for size in shape)
    flat = [size for axis in pieces for size in axis]
    named = [*layout.batch, *layout.inputs, *layout.outputs]
    if sorted(named) != list(range(len(flat))):
        raise ValueError(
            f"{layout} of a leaf of shape {tuple(shape)}: give each of 0 to {len(flat) - 1} once, "
            "in inputs=, outputs= or batch="
        )
    if tuple(map(math.prod, pieces)) != tuple(shape):
        raise ValueError(
            f"{layout} of a leaf of shape {tuple(shape)}: the pieces of an axis must multiply to "
            "its size"
        )
    if not layout.inputs:
        raise ValueError(f"{layout} has no inputs: give the axes that are summed over")
    if named == list(range(len(shape))) and len(layout.inputs) == len(layout.outputs) == 1:
        if len(flat) == len(shape):
            return None
    atoms: dict[int, Atom] = {}
    first = -2 - len(layout.batch)
    for i, piece in enumerate(layout.batch):
        atoms[piece] = Atom(first + i, (), flat[piece])
    for axis, own in ((-2, layout.inputs), (-1, layout.outputs)):
        for i, piece in enumerate(own):
            atoms[piece] = Atom(axis, (i,) if len(own) > 1 else (), flat[piece])
    count = iter(range(len(flat)))
    return tuple(tuple(atoms[next(count)] for _ in axis) for axis in pieces)


def in_matrices(array: Any, axes: Axes) -> jax.Array:
    """A leaf as `[*batch, inputs, outputs]`: undoes `arranged`."""
    flat = [atom for axis in axes for atom in axis]
    order = sorted(flat)
    array = reshaped(jnp.asarray(array), [atom.size for atom in flat])
    array = array.transpose([flat.index(atom) for atom in order])
    batch = [atom.size for atom in order if atom.axis < -2]
    matrix = [math.prod(atom.size for atom in order if atom.axis == axis) for axis in (-2, -1)]
    return reshaped(array, [*batch, *matrix])


def _fitted(axes: Axes, shape: Sequence[int]) -> Axes:
    """The axes for matrices with more, fewer or shorter leading axes than there were.

    A state may be sliced or stacked along them by whoever holds it, as in a scan over states.
    """
    first = -len(shape)
    known = [atom.axis for axis in axes for atom in axis]
    lead = tuple((Atom(i, (), shape[i]),) for i in range(first, min([*known, -2])))
    kept = [(axis, tuple(atom for atom in axis if atom.axis >= first)) for axis in axes]
    return lead + tuple(
        tuple(atom._replace(size=shape[atom.axis]) if atom.axis < -2 else atom for atom in new)
        for old, new in kept
        if new or not old
    )


def _effective(axes: Axes, base: jax.Array, parts: Any) -> jax.Array:
    return arranged(base, _fitted(axes, base.shape))


def _none(axes: Axes, ndim: int):
    return {}


def _nowhere(axes: Axes, ndim: int):
    return frozenset()


@functools.cache
def _method(axes: Axes) -> Method:
    return Method(
        name="layout",
        settings=axes,
        init=None,
        effective=_effective,
        factors=None,
        axes=_none,
        separable=_nowhere,
        freezes=False,
    )


def put_back(matrices: Any, axes: Axes | None) -> Any:
    """Matrices, or a weight of matrices, in the layout of the leaf.

    Args:
      matrices: an array or a `Weight`.
      axes: of the leaf; None: it is matrices.

    Returns:
      An array, or a `Weight` whose outermost method puts it back.
    """
    if axes is None:
        return matrices
    if not is_weight(matrices):
        return arranged(matrices, _fitted(axes, jnp.shape(matrices)))
    return Weight(matrices, {}, _method(axes))


def matrices_of(leaf: Any) -> tuple[Any, Axes | None]:
    """Undoes `put_back` of a weight."""
    if is_weight(leaf) and leaf.method.effective is _effective:
        return leaf.base, leaf.method.settings
    return leaf, None


def merged(leaf: Any) -> Any:
    """What is deployed of a leaf of a state: an array, or a weight of integers with scales."""
    leaf, axes = matrices_of(leaf)
    if not is_weight(leaf) or leaf.method.merge is None:
        return put_back(dense(leaf), axes)
    base = jnp.asarray(dense(leaf.base))
    return put_back(leaf.method.merge(leaf.method.settings, base, leaf.parts), axes)


def lazy_leaf(leaf: Weight, path: str) -> Lazy:
    """A leaf of a state at the start of a walk.

    Args:
      leaf: the weight.
      path: of the leaf.

    Returns:
      The lazy value of its matrices, in the leaf's order.
    """
    weight, axes = matrices_of(leaf)
    if axes is None:
        return lazy(weight, path)
    return Lazy(weight, _fitted(axes, shape_of(weight).shape), (), path)
