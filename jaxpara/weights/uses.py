"""Layouts proved from a function: its jaxpr says which axes of a leaf are summed over.

The function is walked with every matrix among its parameters as a lazy value that is never
built. What is met on the way, through calls, loops, slices, reshapes and elementwise operations:

    dot_general, ragged_dot    contracted axes are inputs, batches batches, the others outputs
    conv_general_dilated       the window and the channels of a group are inputs, groups batches
    a scan over an axis        the axis is a batch
    gather                     looked-up axes are inputs, if no product says otherwise

A look-up multiplies with zeros and ones, so products decide over it: of an embedding that is also
the head, `h @ E.T`, the width is the input and the vocabulary the output.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpara import compat
from jaxpara.jaxprs import called
from jaxpara.tree import by_path, is_matrix, path_of, select
from jaxpara.types import Params
from jaxpara.weights.conv import kernel_of
from jaxpara.weights.lazy import Atom, Lazy, array, is_lazy, sizes
from jaxpara.weights.lift import traced
from jaxpara.weights.matrices import Layout
from jaxpara.weights.method import Method
from jaxpara.weights.walk import Walk
from jaxpara.weights.weight import Weight

ELEMENTWISE = frozenset(
    "add sub mul div max min neg sign abs exp log log1p expm1 tanh sin cos logistic sqrt rsqrt pow "
    "integer_pow square floor ceil round clamp select_n stop_gradient optimization_barrier "
    "reduce_precision erf add_any convert_element_type copy_p copy".split()
)


class Layouts(NamedTuple):
    """What a function says about the leaves of its parameters.

    Attributes:
      known: layout by path.
      unknown: for matrices without one, by path, why.
    """

    known: Mapping[str, Layout]
    unknown: Mapping[str, str]


class _Use(NamedTuple):
    """One use of a leaf.

    Attributes:
      primitive: that uses it.
      parts: `(part, size)` of the pieces of each of its axes, neighbours with one part joined.
      rows: `(axis, piece)` of the inputs, in order.
    """

    primitive: str
    parts: tuple[tuple[tuple[str, int], ...], ...]
    rows: tuple[tuple[int, int], ...]


class _Probe(Walk):
    """A walk that writes down what is done with each leaf, and builds nothing."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__({})
        self.shapes = shapes
        self.products: dict[str, list[_Use]] = {path: [] for path in shapes}
        self.lookups: dict[str, list[_Use]] = {path: [] for path in shapes}
        self.others: dict[str, list[str]] = {path: [] for path in shapes}

    def note(self, eqn: Any, lazy: Lazy, how: str) -> None:
        self.others[lazy.path].append(eqn.primitive.name)

    def densified(self, eqn: Any, operands: list[Any]) -> list[Any]:
        for operand in filter(is_lazy, operands):
            self.note(eqn, operand, "densified")
        return compat.bind(eqn, list(map(array, operands)))

    def step(self, eqn: Any, operands: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        lazy = [i for i, operand in enumerate(operands) if is_lazy(operand)]
        if name in _PARTS:
            for i in lazy:
                self.write(name, eqn, operands[i], _PARTS[name](eqn, operands[i], i))
            return compat.bind(eqn, list(map(array, operands)))
        if name.startswith("custom_") and (inner := called(eqn)) is not None:
            return self.closed(inner)(*operands)
        if name in ELEMENTWISE and len(lazy) == 1 and len(eqn.outvars) == 1:
            operand, like = operands[lazy[0]], eqn.outvars[0].aval
            if sizes(operand.axes) == like.shape and jnp.issubdtype(like.dtype, jnp.floating):
                # Another weight of the same layout.
                return [dataclasses.replace(operand, casts=(*operand.casts, like.dtype))]
        return super().step(eqn, operands)

    def write(self, name: str, eqn: Any, lazy: Lazy, parts: Any) -> None:
        use = None if parts is None else _use(name, parts, self.shapes[lazy.path])
        if use is None:
            self.note(eqn, lazy, "densified")
        else:
            found = self.lookups if name == "gather" else self.products
            found[lazy.path].append(use)


# What the pieces of a leaf are in a product: `(equation, lazy, position) -> {atom: part}`, the
# inputs in order; None if it is none.

Named = dict[Atom, str]


def _dot(eqn: Any, lazy: Lazy, side: int) -> Named | None:
    contracting, batch = eqn.params["dimension_numbers"]
    return _by_axis(lazy, contracting[side], batch[side])


def _ragged(eqn: Any, lazy: Lazy, side: int) -> Named | None:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    if side != 1:
        return None
    contracting, batch = numbers.dot_dimension_numbers
    return _by_axis(lazy, contracting[1], (*batch[1], *numbers.rhs_group_dimensions))


def _gather(eqn: Any, lazy: Lazy, side: int) -> Named | None:
    numbers, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    taken = tuple(numbers.start_index_map)
    wanted = tuple(1 if i in taken else n for i, n in enumerate(shape))
    if side != 0 or numbers.operand_batching_dims or tuple(eqn.params["slice_sizes"]) != wanted:
        return None
    return _by_axis(lazy, taken, ())


def _by_axis(lazy: Lazy, contracting: Any, batch: Any) -> Named | None:
    found: Named = {}
    for i, axis in enumerate(lazy.axes):
        part = "inputs" if i in contracting else "batch" if i in batch else "outputs"
        found |= dict.fromkeys(axis, part)
    return dict(sorted(found.items(), key=lambda item: item[0].name))


def _conv(eqn: Any, lazy: Lazy, side: int) -> Named | None:
    kernel = kernel_of(eqn, lazy) if side == 1 else None
    if kernel is None:
        return None
    parts = {"inputs": kernel.inputs, "batch": kernel.groups, "outputs": kernel.outputs}
    return {atom: part for part, atoms in parts.items() for atom in atoms}


_PARTS: dict[str, Callable[[Any, Lazy, int], Named | None]] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged,
    "conv_general_dilated": _conv,
    "gather": _gather,
}


def _use(name: str, named: Named, shape: tuple[int, ...]) -> _Use | None:
    """A use in terms of the leaf's axes; None if it sums over nothing, or over unknown parts."""
    if "inputs" not in named.values():
        return None
    parts, place = [], {}
    for axis, size in enumerate(shape):
        atoms = sorted((a for a in named if a.name[0] == axis), key=lambda atom: atom.name)
        pieces = _pieces(atoms, named, size)
        if pieces is None:
            return None
        joined: list[tuple[str, int]] = []
        for atom, part, length in pieces:
            if joined and joined[-1][0] == part:
                joined[-1] = part, joined[-1][1] * length
            else:
                joined.append((part, length))
            place[atom] = axis, len(joined) - 1
        parts.append(tuple(joined))
    rows = dict.fromkeys(
        place[atom] for atom, part in named.items() if part == "inputs" and atom in place
    )
    return _Use(name, tuple(parts), tuple(rows))


def _pieces(atoms: list[Atom], named: Named, size: int) -> list[tuple[Any, str, int]] | None:
    """`(atom, part, size)` for the pieces of one axis; what a loop or an index took is a batch."""
    if not atoms:
        return [(None, "batch", size)]
    if len({named[atom] for atom in atoms}) == 1 and _complete(atoms):
        # One part, whatever was sliced off.
        first, *rest = atoms
        return [(first, named[first], size), *((atom, named[atom], 1) for atom in rest)]
    have = math.prod(atom.size for atom in atoms)
    if size % max(have, 1) or not have:
        return None
    pieces: list[tuple[Any, str, int]] = [(atom, named[atom], atom.size) for atom in atoms]
    gone = _gone(atoms)
    if len(gone) == 1:
        pieces.append((Atom(0, (), size // have, gone[0]), "batch", size // have))
        pieces.sort(key=lambda piece: piece[0].name)
    elif have != size:
        return None
    return [piece for piece in pieces if piece[2] != 1]


def _gone(atoms: list[Atom]) -> list[Any]:
    """Names of pieces that are beside these and not among them."""
    names = [atom.name for atom in atoms]
    beside = {(*n[:i], 1 - n[i]) for n in names for i in range(1, len(n))}
    return [b for b in beside if not any(n[: len(b)] == b for n in names)]


def _complete(atoms: list[Atom]) -> bool:
    return not _gone(atoms)


def _same(axes: Any, base: jax.Array, parts: Any) -> jax.Array:
    return base


_PROBE = Method(
    name="probe",
    settings=None,
    init=None,
    effective=_same,
    factors=None,
    axes=lambda settings, ndim: {},
    separable=lambda settings, ndim: frozenset(range(-ndim, 0)),
    freezes=False,
)


def _probed(leaf: jax.Array, path: str) -> Lazy:
    """A leaf all of whose axes are batches of matrices of one entry, so that all can be sliced."""
    axes = tuple((Atom(i - leaf.ndim - 2, (), n, (i,)),) for i, n in enumerate(leaf.shape))
    return Lazy(Weight(leaf[..., None, None], {}, _PROBE), axes, (), path)


def layout(function: Callable[..., Any], params: Params, *inputs: Any, **keywords: Any) -> Layouts:
    """The layouts of the matrices among parameters, from the function that uses them.

    Nothing is computed: the function is traced, and its jaxpr says which axes of each leaf are
    summed over. `t.attach(key, params, function=f, inputs=(x,))` calls this. Call it yourself to
    inspect the layouts, to change them, or to use them more than once.

    Where all entries along an axis meet the same operand, as with `jax.vmap(lambda w: x @ w)(w)`,
    the axis is an output, because such a product is one matrix product.

    Args:
      function: `(params, *inputs, **keywords) -> outputs`.
      params: arrays or shapes.
      inputs, keywords: arrays or shapes, as the function takes them.

    Returns:
      The layouts: `known` by path, and `unknown` with the reason, for leaves whose products
      disagree and for leaves in no product.

    Raises:
      ValueError: two leaves have the same path.

    Examples:
      >>> import jax.numpy as jnp, jaxpara as jp
      >>> params = {"w": jnp.ones((8, 3))}  # [out, in]
      >>> found = jp.weights.layout(lambda p, x: x @ p["w"].T, params, jnp.ones((2, 3)))
      >>> found.known["w"]
      Layout(inputs=(1,), outputs=(0,), batch=(), pieces=())
    """
    trace, consts, arrays = traced(function, params, inputs, keywords)
    found = {path: leaf for path, leaf in by_path(params).items() if is_matrix(leaf)}
    walk = _Probe({path: tuple(leaf.shape) for path, leaf in found.items()})

    def run(consts, params, arrays):
        flat = [
            _probed(leaf, path_of(keys)) if path_of(keys) in found else leaf
            for keys, leaf in jax.tree_util.tree_leaves_with_path(params)
        ]
        outs = walk.run(compat.open_jaxpr(trace.jaxpr), consts, [*flat, *arrays])
        return list(map(array, outs))

    jax.eval_shape(run, consts, params, arrays)
    known, unknown = {}, {}
    for path in found:
        uses = walk.products[path] or walk.lookups[path]
        kinds = list(dict.fromkeys(use.parts for use in uses))
        if len(kinds) == 1:
            known[path] = _layout(uses, walk.shapes[path])
        elif kinds:
            said = dict.fromkeys(f"{use.primitive} over {_axes(use)}" for use in uses)
            unknown[path] = f"its uses disagree about what is summed over: {', '.join(said)}"
        elif others := list(dict.fromkeys(walk.others[path])):
            unknown[path] = f"no product with it is known (it is used by {', '.join(others)})"
        else:
            unknown[path] = "there is no product with it"
    return Layouts(known, unknown)


def given(
    function: Callable[..., Any] | None,
    params: Params,
    inputs: Sequence[Any],
    known: Layouts | Mapping[str, Layout] | None,
) -> Layouts:
    """What is known of the leaves, from what `attach` is given.

    Args:
      function, params, inputs: as for `attach`.
      known: its `layout`.

    Returns:
      The layouts; none where nothing is given.

    Raises:
      TypeError: a layout or the function is something else.
      ValueError: arguments that do not go together, or a path that is not in the parameters.
    """
    if not isinstance(inputs, (tuple, list)):
        raise ValueError(
            f"attach got inputs= of type {type(inputs).__name__}: give a tuple, inputs=(x,)"
        )
    if function is not None:
        if not callable(function):
            raise TypeError(
                f"attach got function={function!r}; expected a function "
                "(params, *inputs) -> outputs"
            )
        if known is not None:
            raise ValueError("attach got function= and layout=: give one of them")
        return layout(function, params, *inputs)
    if inputs:
        raise ValueError("attach got inputs= and no function=: give the function that takes them")
    if known is None:
        return Layouts({}, {})
    if isinstance(known, Layouts):
        return known
    if not isinstance(known, Mapping):
        raise TypeError(
            f"attach got layout={known!r}; expected jp.weights.layout(function, params, *inputs), "
            "or layouts by path, such as {'w': jp.weights.Layout(inputs=(1,), outputs=(0,))}"
        )
    paths = select(params, "**")
    for path, roles in known.items():
        if not isinstance(roles, Layout):
            raise TypeError(
                f"attach got layout={{{path!r}: {roles!r}}}; expected a layout, such as "
                "jp.weights.Layout(inputs=(1,), outputs=(0,))"
            )
        if path not in paths:
            near = difflib.get_close_matches(path, paths, n=3, cutoff=0.3) or list(paths)[:3]
            raise ValueError(
                f"attach got layout= of {path!r}, which is no leaf of the parameters; near it are "
                f"{', '.join(map(repr, near))}"
            )
    return Layouts(known, {})


def _axes(use: _Use) -> str:
    axes = sorted({axis for axis, _ in use.rows})
    return f"axis {axes[0]}" if len(axes) == 1 else f"axes {tuple(axes)}"


def _layout(uses: list[_Use], shape: tuple[int, ...]) -> Layout:
    """Uses that agree as a layout; a convolution says in what order the inputs are."""
    use = next((use for use in uses if use.primitive == "conv_general_dilated"), uses[0])
    number = {}
    for axis, pieces in enumerate(use.parts):
        for i in range(len(pieces)):
            number[axis, i] = len(number)
    of = lambda part: tuple(  # noqa: E731
        number[axis, i]
        for axis, pieces in enumerate(use.parts)
        for i, (kind, _) in enumerate(pieces)
        if kind == part
    )
    pieces = tuple(tuple(size for _, size in axis) for axis in use.parts)
    whole = pieces == tuple((size,) for size in shape)
    rows = tuple(number[place] for place in use.rows)
    return Layout(rows, of("outputs"), of("batch"), () if whole else pieces)
