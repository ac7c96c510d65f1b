"""Two things worth remembering of a value: which axes, or exactly which elements.

`axis_patterns` costs nothing per element: for each leaf of the carry, an axis of
the value is either a run of carry axes with the same index, or unrelated.
`element_sets` keeps a boolean for each pair (element, carry element): exact for
slices, concatenations, flips and reshapes, and affordable for small carries.
"""

import math
from collections.abc import Sequence

import numpy as np

from jaxpara.recurrence.moves import Sources, moves, reshape_groups, reshape_order
from jaxpara.recurrence.propagate import Domain

Shape = tuple[int, ...]
Entry = tuple[int, ...]  # carry axes merged in this order; () is "unrelated"
Axes = dict[int, tuple[Entry, ...]]  # carry leaf -> one entry for each axis of the value

ELEMENT_BUDGET = 1 << 21  # booleans in one value


class TooLarge(Exception):
    """An intermediate value is too large for element sets."""


def axis_patterns(shapes: Sequence[Shape], heads: set[tuple[int, int]]) -> Domain:
    """The domain of axis patterns.

    Args:
      shapes: the shapes of the carry's leaves.
      heads: filled with (leaf, axis) for carry axes that a `dot_general` met as a
        batch dimension: each index there has weights of its own.

    Returns:
      A domain whose values are dictionaries, see `Axes`.
    """

    def moved(value: Axes, sources: Sources) -> Axes:
        return {
            leaf: tuple(() if s is None else entries[s] for s in sources)
            for leaf, entries in value.items()
        }

    def join(a: Axes, b: Axes) -> Axes:
        both = {
            leaf: tuple(x if x == y else () for x, y in zip(a[leaf], b[leaf], strict=True))
            for leaf in a.keys() & b.keys()
        }
        return a | b | both

    def split(leaf: int, carry_axes: Entry, sizes: Sequence[int]) -> list[Entry] | None:
        """Cut merged carry axes where the products of their sizes allow."""
        rest, entries = list(carry_axes), []
        for size in sizes:
            piece: list[int] = []
            while rest and math.prod(shapes[leaf][q] for q in piece) != size:
                piece.append(rest.pop(0))
            if math.prod(shapes[leaf][q] for q in piece) != size:
                return None
            entries.append(tuple(piece))
        return None if rest else entries

    def reshape(eqn, value: Axes) -> Axes:
        order, after = reshape_order(eqn), eqn.outvars[0].aval.shape
        before = [eqn.invars[0].aval.shape[i] for i in order]
        result: Axes = {}
        for leaf, entries in value.items():
            new: list[Entry] = [()] * len(after)
            for inner, outer in reshape_groups(before, after):
                runs = [entries[order[i]] for i in inner]
                merged = tuple(q for run in runs for q in run) if all(runs) else ()
                pieces = split(leaf, merged, [after[o] for o in outer])
                for o, piece in zip(outer, pieces or (), strict=False):
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
                    heads.update((leaf, q) for axis in dims for q in entries[axis])
        outs = []
        for per_operand in moves(eqn):
            out: Axes | None = None
            for value, sources in zip(operands, per_operand, strict=True):
                if value is not None and sources is not None:
                    new = moved(value, sources)
                    out = new if out is None else join(out, new)
            outs.append(out)
        return outs

    def unstack(value: Axes, aval=None) -> Axes:
        return {leaf: entries[1:] for leaf, entries in value.items()}

    def mapped(run, xs):
        lead: dict[int, Entry] = {}
        for value in xs:
            for leaf, entries in (value or {}).items():
                lead[leaf] = entries[0] if lead.get(leaf, entries[0]) == entries[0] else ()
        outs = run([None if value is None else unstack(value) for value in xs])
        return [
            None if out is None else {leaf: (lead[leaf], *e) for leaf, e in out.items()}
            for out in outs
        ]

    return Domain(
        apply=apply,
        join=join,
        unstack=unstack,
        stack=lambda value, aval: {k: ((), *entries) for k, entries in value.items()},
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

    def concatenate(eqn, operands):
        parts = [
            np.zeros((*var.aval.shape, count), bool) if value is None else value
            for value, var in zip(operands, eqn.invars, strict=True)
        ]
        return np.concatenate(parts, eqn.params["dimension"])

    def exact(eqn, operands) -> np.ndarray | None:
        name, params, first = eqn.primitive.name, eqn.params, operands[0]
        if name == "concatenate":
            return concatenate(eqn, operands)
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
        if eqn.primitive.name == "split":
            cuts = np.cumsum(eqn.params["sizes"])[:-1]
            return list(np.split(operands[0], cuts, eqn.params["axis"]))
        if (found := exact(eqn, operands)) is not None:
            return [found]
        outs = []
        for var, per_operand in zip(eqn.outvars, moves(eqn), strict=True):
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
        join=np.logical_or,
        unstack=lambda value, aval: value.any(axis=0),
        stack=lambda value, aval: np.broadcast_to(value, (*aval.shape, count)),
        mapped=mapped,
    )
