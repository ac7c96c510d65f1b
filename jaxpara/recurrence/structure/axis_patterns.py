"""Two things worth remembering of a value: which axes, or exactly which elements.

`axis_patterns` costs nothing per element: for each leaf of the carry, an axis of
the value is either a run of carry axes with the same index, or unrelated.
`element_sets` keeps a boolean for each pair (element, carry element): exact for
slices, concatenations, flips and reshapes, and affordable for small carries.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpara.recurrence.structure.axis_moves import Sources, moves, reshape_groups, reshape_order
from jaxpara.recurrence.structure.propagate import Domain

Shape = tuple[Any, ...]
# Carry axes merged in this order; -n means n indices that are related to nothing. The sizes
# multiply to that of the axis; an axis of size one is ().
Entry = tuple[Any, ...]
Axes = dict[int, tuple[Entry, ...]]  # carry leaf -> one entry for each axis of the value
Cuts = set[tuple[int, int, int]]  # (leaf, axis, size of its inner part)

ELEMENT_BUDGET = 1 << 21  # booleans in one value


class TooLarge(Exception):
    """An intermediate value is too large for element sets."""


def unrelated(size: int) -> Entry:
    """The entry of an axis whose indices are related to nothing; an empty axis has none."""
    return () if size in (0, 1) else (-size,)


def whole_axes(cut: Sequence[Shape]) -> tuple[Entry, ...]:
    """The entries of a carry leaf itself, each of whose axes is cut into these sizes."""
    entries, number = [], 0
    for sizes in cut:
        entries.append(tuple(number + k for k, n in enumerate(sizes) if n != 1))
        number += len(sizes)
    return tuple(entries)


def split_entry(
    leaf: int, entry: Entry, sizes: Sequence[int], shape: Shape, cuts: Cuts
) -> list[Entry]:
    """The entries of the axes of these sizes that an axis of this entry becomes.

    A carry axis that would have to be cut is unrelated to its parts, and noted in `cuts`.
    """
    if 0 in sizes:  # nothing to relate, and nothing divides by it
        return [unrelated(n) for n in sizes]
    rest, entries = list(reversed(entry)), []
    for size in reversed(sizes):  # the innermost first
        piece: list[int] = []
        while size != 1 and rest:
            atom, rest = rest[0], rest[1:]
            extent = -atom if atom < 0 else shape[atom]
            if size == extent:
                piece.append(atom)
                size = 1
            elif 0 in (size, extent):  # an empty axis is not a part of any other
                return [unrelated(n) for n in sizes]
            elif size % extent == 0:
                piece.append(atom)
                size //= extent
            elif extent % size == 0:
                if atom >= 0:
                    cuts.add((leaf, atom, size))
                piece.append(-size)
                rest = [-(extent // size), *rest]
                size = 1
            else:  # the parts do not line up
                return [unrelated(n) for n in sizes]
        entries.append(tuple(reversed(piece)))
    return entries[::-1]


def axis_patterns(
    shapes: Sequence[Shape], heads: set[tuple[int, int]], cuts: Cuts | None = None
) -> Domain:
    """The domain of axis patterns.

    Args:
      shapes: the shapes of the carry's leaves, as they are or with axes cut into several.
      heads: filled with (leaf, axis) for carry axes that a `dot_general` met as a
        batch dimension: each index there has weights of its own.
      cuts: filled with carry axes that a reshape cuts.

    Returns:
      A domain whose values are dictionaries, see `Axes`.
    """
    noted: Cuts = set() if cuts is None else cuts

    def moved(value: Axes, sources: Sources, out: Shape) -> Axes:
        return {
            leaf: tuple(
                unrelated(n) if s is None else entries[s] for s, n in zip(sources, out, strict=True)
            )
            for leaf, entries in value.items()
        }

    def extent(leaf: int, entry: Entry) -> int:
        return math.prod(-atom if atom < 0 else shapes[leaf][atom] for atom in entry)

    def common(leaf: int, a: Entry, b: Entry) -> Entry:
        """The atoms that are at the same place in both."""
        if a == b:
            return a
        ends = [{extent(leaf, entry[k:]) for k in range(len(entry) + 1)} for entry in (a, b)]
        found, last = [], 1
        for end in sorted(ends[0] & ends[1])[1:]:
            inner = [
                [atom for k, atom in enumerate(entry) if last <= extent(leaf, entry[k + 1 :]) < end]
                for entry in (a, b)
            ]
            same = inner[0] == inner[1]
            found = [*(inner[0] if same else unrelated(end // last)), *found]
            last = end
        return tuple(found)

    def join(a: Axes, b: Axes) -> Axes:
        both = {
            leaf: tuple(common(leaf, x, y) for x, y in zip(a[leaf], b[leaf], strict=True))
            for leaf in a.keys() & b.keys()
        }
        return a | b | both

    def reshape(eqn, value: Axes) -> Axes:
        order, after = reshape_order(eqn), eqn.outvars[0].aval.shape
        before = [eqn.invars[0].aval.shape[i] for i in order]
        result: Axes = {}
        for leaf, entries in value.items():
            new = [unrelated(n) for n in after]
            for inner, outer in reshape_groups(before, after):
                merged = tuple(q for i in inner for q in entries[order[i]])
                pieces = split_entry(leaf, merged, [after[o] for o in outer], shapes[leaf], noted)
                for o, piece in zip(outer, pieces, strict=True):
                    new[o] = piece
            result[leaf] = tuple(new)
        return result

    def apply(eqn, operands):
        name = eqn.primitive.name
        if name == "reshape":
            return [reshape(eqn, operands[0])]
        if name == "dot_general":
            for value, dims in zip(operands, eqn.params["dimension_numbers"][1], strict=True):
                for leaf, entries in (value or {}).items():
                    heads.update((leaf, q) for axis in dims for q in entries[axis] if q >= 0)
        return move(eqn, operands, moves(eqn))

    def move(eqn, operands, table):
        outs = []
        for var, per_operand in zip(eqn.outvars, table, strict=True):
            out: Axes | None = None
            for value, sources in zip(operands, per_operand, strict=True):
                if value is not None and sources is not None:
                    new = moved(value, sources, var.aval.shape)
                    out = new if out is None else join(out, new)
            outs.append(out)
        return outs

    def unstack(value: Axes, aval=None) -> Axes:
        return {leaf: entries[1:] for leaf, entries in value.items()}

    def mapped(run, xs):
        lead: dict[int, Entry] = {}
        for value in xs:
            for leaf, entries in (value or {}).items():
                lead[leaf] = common(leaf, lead[leaf] if leaf in lead else entries[0], entries[0])
        outs = run([None if value is None else unstack(value) for value in xs])
        return [
            None if out is None else {leaf: (lead[leaf], *e) for leaf, e in out.items()}
            for out in outs
        ]

    return Domain(
        apply=apply,
        move=move,
        join=join,
        unstack=unstack,
        stack=lambda value, aval: {k: (unrelated(aval.shape[0]), *e) for k, e in value.items()},
        mapped=mapped,
    )


def _pad(array: np.ndarray, config) -> np.ndarray:
    for axis, (low, high, interior) in enumerate(config):
        size = array.shape[axis]
        spread = size + max(size - 1, 0) * interior
        total = low + spread + high
        places = low + np.arange(size) * (interior + 1)
        inside = (places >= 0) & (places < total)
        shape = (*array.shape[:axis], total, *array.shape[axis + 1 :])
        out = np.zeros(shape, bool)
        out[(slice(None),) * axis + (places[inside],)] = np.compress(inside, array, axis)
        array = out
    return array


def element_sets(count: int) -> Domain:
    """The domain of exact element sets.

    Args:
      count: how many elements the carry has in all.

    Returns:
      A domain whose values are boolean arrays `[*shape, count]`.
    """

    def moved(value: np.ndarray, sources: Sources, out: Shape) -> np.ndarray:
        kept = [s for s in sources if s is not None]
        lost = tuple(i for i in range(value.ndim - 1) if i not in kept)
        value = np.any(value, axis=lost, keepdims=False) if lost else value
        places = sorted(kept)
        value = value.transpose((*(places.index(s) for s in kept), value.ndim - 1))
        shape = [1 if s is None else n for s, n in zip(sources, out, strict=True)]
        return np.broadcast_to(value.reshape((*shape, count)), (*out, count))

    def joined(eqn, operands):
        parts = [
            np.zeros((*var.aval.shape, count), bool) if value is None else value
            for value, var in zip(operands, eqn.invars, strict=True)
        ]
        if eqn.primitive.name == "stack":
            return np.stack(parts, eqn.params["axis"] % (parts[0].ndim))
        return np.concatenate(parts, eqn.params["dimension"])

    def exact(eqn, operands) -> np.ndarray | None:
        name, params, first = eqn.primitive.name, eqn.params, operands[0]
        if name in ("concatenate", "stack"):
            return joined(eqn, operands)
        if first is None or any(value is not None for value in operands[1:]):
            return None
        if name == "slice":
            steps = params["strides"] or (1,) * (first.ndim - 1)
            bounds = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
            return first[tuple(slice(*bound) for bound in bounds)]
        if name == "rev":
            return np.flip(first, tuple(params["dimensions"]))
        if name == "reshape":
            first = first.transpose((*reshape_order(eqn), first.ndim - 1))
            return first.reshape((*eqn.outvars[0].aval.shape, count))
        if name == "pad":
            return _pad(first, params["padding_config"])
        if name.startswith("cum"):
            axis = params["axis"]
            if params["reverse"]:
                return np.flip(np.logical_or.accumulate(np.flip(first, axis), axis), axis)
            return np.logical_or.accumulate(first, axis)
        return None

    def apply(eqn, operands):
        if any(math.prod(var.aval.shape) * count > ELEMENT_BUDGET for var in eqn.outvars):
            raise TooLarge(eqn.primitive.name)
        if eqn.primitive.name == "unstack":
            axis = eqn.params["axis"] % (operands[0].ndim - 1)
            return list(np.moveaxis(operands[0], axis, 0))
        if eqn.primitive.name == "split":
            cuts = np.cumsum(eqn.params["sizes"])[:-1]
            return list(np.split(operands[0], cuts, eqn.params["axis"]))
        if (found := exact(eqn, operands)) is not None:
            return [found]
        return move(eqn, operands, moves(eqn))

    def move(eqn, operands, table):
        if any(math.prod(var.aval.shape) * count > ELEMENT_BUDGET for var in eqn.outvars):
            raise TooLarge(eqn.primitive.name)
        outs = []
        for var, per_operand in zip(eqn.outvars, table, strict=True):
            out = None
            for value, sources in zip(operands, per_operand, strict=True):
                if value is not None and sources is not None:
                    new = moved(value, sources, var.aval.shape)
                    out = new if out is None else out | new
            outs.append(out)
        return outs

    def mapped(run, xs):
        # Steps are told apart by the axis patterns; here they are taken together.
        lengths = {value.shape[0] for value in xs if value is not None}
        outs = run([None if value is None else value.any(axis=0) for value in xs])
        return [
            None if out is None else np.broadcast_to(out, (*lengths, *out.shape)) for out in outs
        ]

    return Domain(
        apply=apply,
        move=move,
        join=np.logical_or,
        unstack=lambda value, aval: value.any(axis=0),
        stack=lambda value, aval: np.broadcast_to(value, (*aval.shape, count)),
        mapped=mapped,
    )
