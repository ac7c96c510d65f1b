"""Makes the `ElementwiseCell` of a user's step, and its operands, for a kernel.

The step is traced and taken apart. Work that does not depend on the state is done outside, over
all time steps at once. Elementwise work on inputs of the state's own shape is the exception: it
stays in the kernel, so that inputs travel in their storage type. Work that depends on the state
must be elementwise. It is differentiated here and replayed in the kernel, see `replay`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpara import jaxprs
from jaxpara.recurrence.kernel.replay import (
    NARROW,
    NO_POWER,
    TABLE,
    Program,
    UnsupportedCell,
    check_types,
    program,
    refuse,
    rounding,
)
from jaxpara.recurrence.lanes import shaped
from jaxpara.recurrence.structure.affinity import affine_in
from jaxpara.recurrence.structure.flat import RULED, Flat, Node, flatten, needed, run, slots
from jaxpara.recurrence.system import Leaves
from jaxpara.recurrence.wide import widened
from pallas_kernels.cell import ElementwiseCell

# What a value depends on; the kind of a result is the largest kind of its operands.
LITERAL, CONST, TIMED, STATE = range(4)
STORED = ("float32", *NARROW)
TRAVELS = jnp.bfloat16  # a boolean input, as 0 and 1


class Elementwise(NamedTuple):
    """A step that kernels can run.

    Attributes:
      cell: its functions.
      operands: `(consts, xs) -> (inputs, params)`: what the kernel reads, inputs
        `[time, B, D]`, params `[1, D]` or `[B, D]`; differentiable.
      shape: of every state leaf; `lead` of its axes make B, the others D.
      lead: see `shape`.
      affine: the step is affine in the state; False where that is not proved.
    """

    cell: ElementwiseCell
    operands: Callable[[Leaves, Leaves], tuple[list[jax.Array], list[jax.Array]]]
    shape: tuple[int, ...]
    lead: int
    affine: bool

    def rows(self, leaves: Leaves) -> list[jax.Array]:
        """State leaves `[*any, *shape]` to `[*any, B, D]`."""
        return [rows(leaf, self.shape, self.lead) for leaf in leaves]

    def leaves(self, arrays: Leaves) -> list[jax.Array]:
        """The inverse of `rows`."""
        return [array.reshape(*array.shape[:-2], *self.shape) for array in arrays]


def prepare(
    step: Callable[..., Any], consts: Sequence[Any], state: Sequence[Any], xs: Sequence[Any]
) -> Elementwise:
    """Takes a step apart.

    Args:
      step: `(consts, state, x) -> (state, ys)` on lists of leaves; what it closes over, outer
        tracers too, is hoisted.
      consts: leaves that do not change with time; operands, so that they have derivatives.
      state: leaves of the state, or their shapes.
      xs: leaves with leading time, or their shapes.

    Raises:
      UnsupportedCell: the step is not elementwise, or not in float32 or narrower.
    """
    shape = tuple(state[0].shape)
    for leaf in state:
        if tuple(leaf.shape) != shape:
            shapes = [tuple(s.shape) for s in state]
            raise UnsupportedCell("carry", "init", f"leaves of unequal shapes {shapes}")
        if leaf.dtype.name not in STORED:
            raise UnsupportedCell("carry", "init", f"a leaf of {leaf.dtype}; kernels take float32")
        if leaf.dtype != state[0].dtype:
            raise UnsupportedCell("carry", "init", f"leaves of {state[0].dtype} and {leaf.dtype}")
    if 0 in shape:
        raise UnsupportedCell("carry", "init", f"a leaf without elements, {shape}")
    one = [shaped(x, x.shape[1:], x.dtype) for x in xs]
    closed = jax.make_jaxpr(lambda c, s, x: list(step(c, s, x)[0]))(list(consts), list(state), one)
    return _taken_apart(flatten(closed, closed_calls=RULED), len(consts), len(state), shape)


def _taken_apart(flat: Flat, n_consts: int, n_state: int, shape: tuple[int, ...]) -> Elementwise:
    const_in = flat.inputs[:n_consts]
    state_in = flat.inputs[n_consts : n_consts + n_state]
    x_in = flat.inputs[n_consts + n_state :]
    kinds, stays = _sorted_out(flat, (const_in, state_in, x_in), shape)

    core = needed([n for n in flat.nodes if n.result in stays], slots(flat.outputs))
    for node in core:
        _check(node, flat, kinds, shape)
    computed = {result for node in core for result in node.results}.union(state_in)
    entering = slots([a for node in core for a in node.operands] + list(flat.outputs))
    edge = [s for s in dict.fromkeys(entering) if s not in computed]
    first: dict[Any, int] = {}  # one mask that several leaves broadcast enters once
    same = {s: first.setdefault(_origin(s, flat), s) for s in edge}
    edge = list(first.values())
    timed = [s for s in edge if kinds[s] == TIMED]
    fixed = [s for s in edge if kinds[s] == CONST]
    if not timed:
        raise UnsupportedCell("carry", "xs", "nothing that the state depends on changes with time")
    for slot in edge:
        if flat.avals[slot].dtype.name not in (*STORED, "bool"):
            user = next(n for n in core if slot in n.operands)
            raise refuse(user, f"an operand of {flat.avals[slot].dtype}")

    views = [_narrowest(slot, flat, shape) for slot in fixed]
    lead = _leading([view for _, view in views], shape)
    entering = [flat.avals[slot] for slot in [*state_in, *timed, *fixed]]
    like = [shaped(aval, shape, _storage(aval.dtype)) for aval in entering]

    def once(*arrays: jax.Array) -> list[jax.Array]:
        known = {
            slot: array != 0 if flat.avals[slot].dtype == jnp.bool_ else array
            for slot, array in zip([*state_in, *timed, *fixed], arrays, strict=True)
        }
        values = run(core, known | {twin: known[slot] for twin, slot in same.items()})
        outs = [values[o] if isinstance(o, int) else o.val for o in flat.outputs]
        return [jnp.broadcast_to(out, shape).astype(arrays[i].dtype) for i, out in enumerate(outs)]

    over_time = needed([n for n in flat.nodes if kinds[n.result] == TIMED], timed)
    read = [s for n in over_time for s in slots(n.operands) if kinds[s] < TIMED]
    before = needed(flat.nodes, [*read, *(source for source, _ in views)])

    @widened
    def operands(consts: Leaves, xs: Leaves) -> tuple[list[jax.Array], list[jax.Array]]:
        values = run(before, flat.consts | dict(zip(const_in, consts, strict=True)))

        def at(x: Leaves) -> list[jax.Array]:
            now = run(over_time, values | dict(zip(x_in, x, strict=True)))
            return [_travelling(jnp.broadcast_to(now[s], shape)) for s in timed]

        inputs = jax.vmap(at)(list(xs))
        # Few, so in float32: their cotangents are summed over lanes as they arrive here.
        params = [values[source].reshape(view).astype(jnp.float32) for source, view in views]
        return [rows(i, shape, lead) for i in inputs], [channels(p, shape, lead) for p in params]

    cell = _cell(once, like, (n_state, len(timed), len(fixed)), _holds_vjp(core))
    return Elementwise(cell, operands, shape, lead, affine_in(state_in, flat, core))


def _sorted_out(flat: Flat, arguments: Sequence[Sequence[int]], shape: tuple[int, ...]):
    """The kind of every slot, and the slots that the kernel computes if they are needed."""
    const_in, state_in, x_in = arguments
    kinds = dict.fromkeys([*const_in, *flat.consts], CONST)
    kinds |= dict.fromkeys(state_in, STATE) | dict.fromkeys(x_in, TIMED)
    stays: set[int] = set()
    for node in flat.nodes:
        kind = max([kinds[s] for s in slots(node.operands)], default=LITERAL)
        if kind == LITERAL and node.name not in (*TABLE, "broadcast_in_dim"):
            kind = CONST  # an iota, or whatever else needs no operand
        kinds.update(dict.fromkeys(node.results, kind))
        if kind in (LITERAL, STATE) or (kind == TIMED and _light(node, flat, kinds, shape)):
            stays.update(node.results)
    return kinds, stays


def _light(node: Node, flat: Flat, kinds: dict[int, int], shape: tuple[int, ...]) -> bool:
    """Whether work on inputs only may stay in the kernel: elementwise on arrays of `shape`."""
    if node.name in RULED:
        if not all(_known(eqn, shape) for eqn in jaxprs.equations(jaxprs.called(node.eqn))):
            return False
    elif node.name not in TABLE:
        return False
    if any(flat.avals[result].shape != shape for result in node.results):
        return False
    if node.name == "pow" and isinstance(node.operands[1], int):
        return False
    avals = [flat.avals[s] for s in slots(node.operands) if kinds[s] == TIMED]
    types = [flat.avals[s].dtype.name for s in (*slots(node.operands), *node.results)]
    return all(a.shape == shape for a in avals) and set(types) <= {*STORED, "bool"}


def _known(eqn: Any, shape: tuple[int, ...]) -> bool:
    """Whether an equation inside a function with a rule of its own is elementwise."""
    name, avals = eqn.primitive.name, [var.aval for var in eqn.outvars]
    named = name in TABLE or name == "broadcast_in_dim" or jaxprs.called(eqn) is not None
    return named and all(a.shape in ((), shape) for a in avals)


def _check(node: Node, flat: Flat, kinds: dict[int, int], shape: tuple[int, ...]) -> None:
    """Raises unless an equation on the state is elementwise."""
    if kinds[node.result] != STATE:
        return
    shapes = [flat.avals[s].shape for s in slots(node.operands)]
    if node.name == "pow" and any(kinds[s] != LITERAL for s in slots(node.operands[1:])):
        raise refuse(node, NO_POWER)
    if node.name == "reduce_precision" and rounding(node.eqn.params) is None:
        raise refuse(node, "kernels round to bfloat16 and float16 only")
    if node.name in ("broadcast_in_dim", "reshape") and shapes[0] == shape:
        pass
    elif node.name not in TABLE and node.name not in RULED:
        raise refuse(node, "not an elementwise operation that kernels know")
    if any(flat.avals[r].shape != shape for r in node.results):
        found = flat.avals[node.result].shape
        raise refuse(node, f"its result has shape {found}, the state {shape}")
    if node.name in RULED and any(s != shape for s in shapes):
        raise refuse(node, f"an operand with a shape other than the state's {shape}; broadcast it")
    check_types(node, flat)


def _origin(slot: int, flat: Flat) -> Any:
    """The origin of a slot: itself, or another slot and how its value was moved."""
    node = next((n for n in flat.nodes if slot in n.results), None)
    if node is None or node.name not in ("broadcast_in_dim", "convert_element_type", "reshape"):
        return slot
    sources = [_origin(a, flat) if isinstance(a, int) else repr(a) for a in node.operands]
    return node.name, tuple(sources), repr(sorted(node.eqn.params.items()))


def _narrowest(slot: int, flat: Flat, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """The slot that a constant was broadcast from, and its shape among the axes of `shape`."""
    producer = {r: n for n in flat.nodes for r in n.results}
    sizes = flat.avals[slot].shape
    axes: list[int | None] = [i if sizes and sizes[i] != 1 else None for i in range(len(shape))]
    while (node := producer.get(slot)) is not None and node.name == "broadcast_in_dim":
        (slot,) = slots(node.operands)
        dims, sizes = node.eqn.params["broadcast_dimensions"], flat.avals[slot].shape
        inner = [None if a is None or a not in dims else dims.index(a) for a in axes]
        axes = [None if a is None or sizes[a] == 1 else a for a in inner]
    return slot, tuple(1 if a is None else shape[i] for i, a in enumerate(axes))


def _leading(views: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> int:
    """How many axes make B: one, unless some constant changes along it."""
    if len(shape) < 2:
        return 0
    return 1 if all(view[0] == 1 for view in views) else len(shape) - 1


def rows(leaf: jax.Array, shape: tuple[int, ...], lead: int) -> jax.Array:
    """`[*any, *shape]` to `[*any, B, D]`."""
    free = leaf.shape[: leaf.ndim - len(shape)]
    return leaf.reshape(*free, math.prod(shape[:lead]), math.prod(shape[lead:]))


def channels(leaf: jax.Array, shape: tuple[int, ...], lead: int) -> jax.Array:
    """A constant with ones for the axes that it lacks, as `[1, D]` or `[B, D]`."""
    lacking = all(size == 1 for size in leaf.shape[:lead])
    kept = (1,) * lead if lacking else shape[:lead]
    whole = (*kept, *shape[lead:])
    return rows(jnp.broadcast_to(leaf, whole), whole, lead)


def _storage(dtype: Any) -> Any:
    return TRAVELS if dtype == jnp.bool_ else dtype


def _travelling(array: jax.Array) -> jax.Array:
    return array.astype(_storage(array.dtype))


def _holds_vjp(core: Sequence[Node]) -> bool:
    return any(
        n.name == "custom_vjp_call"
        or any(jaxprs.contains(j, "custom_vjp_call") for j in jaxprs.subjaxprs(n.eqn))
        for n in core
    )


def _cell(
    once: Callable[..., list[jax.Array]],
    like: Sequence[Any],
    counts: tuple[int, int, int],
    vjp_only: bool,
) -> ElementwiseCell:
    """Differentiates `(*states, *inputs, *params) -> states` and makes programs of the results."""
    k = counts[0]
    states = list(like[:k])
    size = len(like)

    def pushed(*arrays: jax.Array) -> list[jax.Array]:
        rest, flat = arrays[k:size], arrays[size:]
        columns = [flat[j * k : (j + 1) * k] for j in range(k)]
        step = lambda *s: once(*s, *rest)  # noqa: E731
        if not vjp_only:
            new, linear = jax.linearize(step, *arrays[:k])
            return [*new, *(moved for column in columns for moved in linear(*column))]
        new, pull = jax.vjp(step, *arrays[:k])
        units = [[jnp.full_like(n, i == j) for j, n in enumerate(new)] for i in range(k)]
        jacobian = [pull(unit) for unit in units]
        moved = [
            functools.reduce(jnp.add, [a * c for a, c in zip(row, column, strict=True)])
            for column in columns
            for row in jacobian
        ]
        return [*new, *moved]

    def pulled(*arrays: jax.Array) -> list[jax.Array]:
        return list(jax.vjp(once, *arrays[:size])[1](list(arrays[size:])))

    def pulled_state(*arrays: jax.Array) -> list[jax.Array]:
        step = lambda *s: once(*s, *arrays[k:size])  # noqa: E731
        return list(jax.vjp(step, *arrays[:k])[1](list(arrays[size:])))

    programs = [program(once, like), program(pushed, [*like, *states * k])]
    programs += [program(f, [*like, *states]) for f in (pulled, pulled_state)]
    return _made_of(programs, counts, states[0].dtype.name in NARROW)


def _made_of(
    programs: Sequence[Program], counts: tuple[int, int, int], rounds: bool
) -> ElementwiseCell:
    """A cell from its step, its Jacobian applied, its vjp, and the states' part of that."""
    k, n_inputs, n_params = counts
    run_step, run_push, run_pull, run_state = programs

    def push(s: Leaves, x: Leaves, p: Leaves, columns: Sequence[Leaves]):
        flat = run_push(*s, *x, *p, *(c for column in columns for c in column))
        return flat[:k], [flat[k * (j + 1) : k * (j + 2)] for j in range(k)]

    def pull(s: Leaves, x: Leaves, p: Leaves, cotangents: Leaves):
        flat = run_pull(*s, *x, *p, *cotangents)
        return flat[:k], flat[k : k + n_inputs], flat[k + n_inputs :]

    return ElementwiseCell(
        states=k,
        inputs=n_inputs,
        params=n_params,
        step=lambda s, x, p: run_step(*s, *x, *p),
        push=push,
        pull=pull,
        pull_state=lambda s, x, p, cotangents: run_state(*s, *x, *p, *cotangents),
        using=lambda functions: _made_of([p.using(functions) for p in programs], counts, rounds),
        rounds=rounds,
    )
