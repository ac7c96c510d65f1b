"""Convolutions with lazy kernels.

An additive kernel `W + s A B` whose window belongs to A: a convolution with A, then a matmul with
B. A product of the method's own is one with the patches of the image. Groups of channels are a
batch of the kernel: of its axis of outputs the slower piece.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara import compat
from jaxpara.weights.factors import Factors, Pick, Term, contract, spread
from jaxpara.weights.lazy import Atom, Lazy, is_lazy, reshaped, split_atom
from jaxpara.weights.products import (
    additive,
    base_of,
    factors_of,
    own_product,
    scaling_of,
)
from jaxpara.weights.weight import shape_of


class Kernel(NamedTuple):
    """Which pieces of a weight the axes of a kernel are.

    Attributes:
      lazy: the kernel, its axis of outputs split at the groups.
      axes: of the kernel.
      inputs: pieces that are summed: of the window, then of the channels of one group.
      groups, outputs: pieces of the axis of outputs.
    """

    lazy: Lazy
    axes: tuple[tuple[Atom, ...], ...]
    inputs: tuple[Atom, ...]
    groups: tuple[Atom, ...]
    outputs: tuple[Atom, ...]


def kernel_of(eqn: Any, lazy: Lazy) -> Kernel | None:
    """The roles of the axes of a kernel.

    Args:
      eqn: a `conv_general_dilated`.
      lazy: its second operand.

    Returns:
      The roles; None where groups are no whole pieces of the outputs, or batches have groups.
    """
    params = eqn.params
    if params["batch_group_count"] != 1:
        return None
    place, *inputs = params["dimension_numbers"].rhs_spec
    wanted, count = params["feature_group_count"], 0
    while wanted > 1:
        atom = lazy.axes[place][count]
        if wanted % atom.size:
            if atom.size % wanted:
                return None
            parted = split_atom(lazy, atom, wanted)
            if parted is None:
                return None
            lazy, atom, _ = parted
        wanted, count = wanted // atom.size, count + 1
    window = [atom for i in inputs[1:] for atom in lazy.axes[i]]
    outputs = lazy.axes[place]
    return Kernel(
        lazy,
        lazy.axes,
        (*window, *lazy.axes[inputs[0]]),
        outputs[:count],
        outputs[count:],
    )


def conv(walk: Any, eqn: Any, operands: list[Any]) -> list[Any] | None:
    """A convolution of an array with a kernel that is a weight."""
    x, lazy = operands
    if is_lazy(x):
        return None
    kernel = kernel_of(eqn, lazy)
    if kernel is None:
        return None
    if additive(lazy):
        return _additive(walk, eqn, x, kernel)
    return _own(walk, eqn, x, kernel)


def _in_pieces(lazy: Lazy, term: Term | Pick) -> Term:
    """A term whose axes are the pieces of the weight's."""
    if isinstance(term, Pick):
        dtype = lazy.casts[-1] if lazy.casts else shape_of(lazy.weight).dtype
        term = Term(term.matrix(dtype), term.axes)
    axes: list[Any] = []
    shape: list[int] = []
    for axis, size in zip(term.axes, term.array.shape, strict=True):
        own = sorted(atom for of in lazy.axes for atom in of if atom.axis == axis)
        axes += [axis] if isinstance(axis, str) else own
        shape += [size] if isinstance(axis, str) else [atom.size for atom in own]
    return Term(reshaped(term.array, shape), tuple(axes))


def _parted(kernel: Kernel, factors: Factors) -> tuple[Term, Factors, str] | None:
    """The factor that is a kernel, the others, and the name that they share; None if not so."""
    inputs = {*kernel.inputs}
    kernels = [term for term in factors.terms if inputs <= {*term.axes}]
    if len(kernels) != 1:
        return None
    (thin,) = kernels
    names = [axis for axis in thin.axes if axis not in inputs and axis not in kernel.groups]
    others = tuple(term for term in factors.terms if term is not thin)
    along = {axis for term in others for axis in term.axes}
    if len(names) != 1 or not isinstance(names[0], str) or along & inputs:
        return None
    if not {*kernel.outputs} <= along or not {*kernel.groups} <= along | {*thin.axes}:
        return None
    assert isinstance(thin, Term)
    return thin, Factors(factors.scale, others), names[0]


def _additive(walk: Any, eqn: Any, x: Any, kernel: Kernel) -> list[Any] | None:
    lazy, params = kernel.lazy, eqn.params
    numbers = params["dimension_numbers"]
    factors, scaling = factors_of(lazy), scaling_of(lazy)
    factors = factors._replace(terms=tuple(_in_pieces(lazy, term) for term in factors.terms))
    parted = _parted(kernel, factors)
    if factors.terms and parted is None:
        return None
    if scaling is not None:
        scaling = _in_pieces(lazy, scaling)
        if not {*scaling.axes} <= {*kernel.groups, *kernel.outputs}:
            return None
    walk.note(eqn, lazy, "rule")
    base = base_of(lazy)
    (total,) = walk.step(eqn, [x, base]) if is_lazy(base) else compat.bind(eqn, [x, base])
    feature = numbers.out_spec[1]
    after: Any = (*kernel.groups, *kernel.outputs)
    if parted is not None:
        term, rest, name = parted
        place = numbers.rhs_spec[0]
        (inner,) = compat.bind(eqn, [x, _thin(kernel, term, name, place)])
        inner = jnp.moveaxis(inner, feature, -1)
        rank = inner.shape[-1] // math.prod(atom.size for atom in kernel.groups)
        lead: Any = tuple(f"image {i}" for i in range(inner.ndim - 1))
        pieces = [atom.size for atom in kernel.groups]
        inner = reshaped(inner, [*inner.shape[:-1], *pieces, rank])
        along: Any = (*lead, *kernel.groups, name)
        added = contract(
            rest, (*lead, *after), operand=(inner, along), precision=params["precision"]
        )
        added = reshaped(added, [*added.shape[: len(lead)], -1] if len(after) > 1 else added.shape)
        total = total + (rest.scale * jnp.moveaxis(added, -1, feature)).astype(total.dtype)
    if scaling is not None:
        shape = [1] * total.ndim
        shape[feature] = -1
        share = jnp.broadcast_to(spread(scaling, after), [atom.size for atom in after])
        total = (total * share.reshape(shape)).astype(total.dtype)
    return [total]


def _thin(kernel: Kernel, term: Term, name: str, place: int) -> jax.Array:
    """The kernel from the inputs to the name, one for each group."""
    axes: list[tuple[Any, ...]] = list(kernel.axes)
    axes[place] = (*kernel.groups, name)
    array = spread(term, tuple(piece for axis in axes for piece in axis))
    rank = term.array.shape[term.axes.index(name)]
    size = lambda piece: rank if isinstance(piece, str) else piece.size  # noqa: E731
    # A kernel that groups have in common is repeated for each of them.
    array = jnp.broadcast_to(array, [size(piece) for axis in axes for piece in axis])
    return array.reshape([math.prod(map(size, axis)) for axis in axes])


def _own(walk: Any, eqn: Any, x: Any, kernel: Kernel) -> list[Any] | None:
    """`patches @ W` by the method itself, where the kernel is a matrix for each group."""
    method = kernel.lazy.weight.method
    ndim = len(shape_of(kernel.lazy.weight).shape)
    lead = tuple(range(-ndim, -2))
    fits = (
        # What is only stored in another way is better convolved as it is.
        method.product is not None
        and method.beyond
        and {atom.axis for atom in kernel.inputs} == {-2}
        and {atom.axis for atom in kernel.outputs} <= {-1}
        and tuple(atom.axis for atom in kernel.groups) == lead
    )
    if not fits:
        return None
    numbers = eqn.params["dimension_numbers"]
    groups = [atom.size for atom in kernel.groups]
    found = patches(eqn, x, groups)  # [*groups, n, *positions, *window, channels]
    window = len(numbers.rhs_spec) - 2
    first = len(groups) + 1 + window
    # Pieces of the inputs in the order of the matrix.
    rows = [atom.size for atom in kernel.inputs]
    found = reshaped(found, [*found.shape[:first], *rows])
    here = sorted(kernel.inputs)
    order = [first + kernel.inputs.index(atom) for atom in here]
    found = found.transpose(*range(first), *order)
    found = reshaped(found, [*found.shape[:first], math.prod(rows)])
    y = own_product(eqn, kernel.lazy, found)
    if y is None:
        return None
    walk.note(eqn, kernel.lazy, "rule")
    # [*groups, n, *positions, outputs]: pieces in the order of the kernel, groups beside them.
    pieces = sorted(kernel.outputs)
    y = reshaped(y, [*y.shape[:-1], *(atom.size for atom in pieces)])
    order = [first + pieces.index(atom) for atom in kernel.outputs]
    y = y.transpose(*range(len(groups), first), *range(len(groups)), *order)
    y = y.reshape(*y.shape[: 1 + window], -1)
    batch, feature, *positions = numbers.out_spec
    return [jnp.moveaxis(y, range(y.ndim), (batch, *positions, feature))]


def patches(eqn: Any, x: Any, groups: list[int]) -> jax.Array:
    """What the kernel sees at each position of a convolution.

    Args:
      eqn: the `conv_general_dilated`.
      x: its image.
      groups: sizes of which the groups of channels are made up.

    Returns:
      `[*groups, n, *positions, *window, channels of a group]`.
    """
    params = eqn.params
    numbers = params["dimension_numbers"]
    kernel = eqn.invars[1].aval.shape
    window = [kernel[i] for i in numbers.rhs_spec[2:]]
    x = jnp.transpose(x, numbers.lhs_spec)
    dilated = [(0, 0, 0), (0, 0, 0)]
    for (low, high), dilation in zip(params["padding"], params["lhs_dilation"], strict=True):
        dilated.append((low, high, dilation - 1))
    x = lax.pad(x, jnp.zeros((), x.dtype), dilated)
    shape = eqn.outvars[0].aval.shape
    positions = [shape[i] for i in numbers.out_spec[2:]]
    strides, dilation = params["window_strides"], params["rhs_dilation"]
    seen = []
    for offset in itertools.product(*map(range, window)):
        begin = [o * d for o, d in zip(offset, dilation, strict=True)]
        end = [b + (n - 1) * s + 1 for b, n, s in zip(begin, positions, strides, strict=True)]
        seen.append(lax.slice(x, [0, 0, *begin], [*x.shape[:2], *end], [1, 1, *strides]))
    found = jnp.stack(seen, -1)  # [n, channels, *positions, window]
    n, channels = found.shape[:2]
    found = found.reshape(n, *groups, channels // math.prod(groups), *positions, *window)
    g, s = len(groups), len(window)
    order = [*range(1, 1 + g), 0, *range(2 + g, 2 + g + 2 * s), 1 + g]
    return found.transpose(order)
