"""A jaxpr as one flat list of equations, with the functions that it calls inlined.

Values are numbered slots; constants of inner functions come along, whatever traced them.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from jaxpara import compat, jaxprs
from jaxpara.recurrence.structure import safe_derivatives

# Calls with a derivative rule of their own: laid open only after differentiation.
RULED = frozenset({"custom_jvp_call", "custom_vjp_call"})


class Node(NamedTuple):
    """One equation, and the line it comes from; an operand is a slot (an int) or a `Literal`."""

    eqn: Any
    operands: tuple[Any, ...]
    results: tuple[int, ...]
    line: str

    @property
    def name(self) -> str:
        return self.eqn.primitive.name

    @property
    def result(self) -> int:
        """The first of them, for most equations the only one."""
        return self.results[0]


class Flat(NamedTuple):
    """A traced function.

    Attributes:
      inputs: slots of the arguments.
      consts: slot -> value of what the function closes over.
      nodes: equations in order.
      outputs: a slot or a `Literal` each.
      avals: shape and dtype of each slot.
    """

    inputs: list[int]
    consts: dict[int, Any]
    nodes: list[Node]
    outputs: list[Any]
    avals: list[Any]


def flatten(closed: Any, *, closed_calls: Collection[str] = ()) -> Flat:
    """Inlines the calls of a closed jaxpr, except those of the primitives in `closed_calls`."""
    nodes: list[Node] = []
    avals: list[Any] = []
    consts: dict[int, Any] = {}

    def slot(var: Any) -> int:
        avals.append(var.aval)
        return len(avals) - 1

    def walk(jaxpr: Any, values: Sequence[Any], operands: Sequence[Any], line: str) -> list[Any]:
        jaxpr = compat.open_jaxpr(jaxpr)
        place: dict[Any, Any] = dict(zip(jaxpr.invars, operands, strict=True))
        for var, value in zip(jaxpr.constvars, values, strict=True):
            place[var] = slot(var)
            consts[place[var]] = value

        def read(atom: Any) -> Any:
            return atom if hasattr(atom, "val") else place[atom]

        for eqn in jaxpr.eqns:
            ins = [read(atom) for atom in eqn.invars]
            here = compat.source_line(eqn) or line  # JAX's own functions have none inside
            closed = eqn.primitive.name in closed_calls and not safe_derivatives.ours(eqn)
            inner = None if closed else jaxprs.called(eqn)
            if inner is not None:
                outs = walk(inner, getattr(inner, "consts", ()), ins, here)
                place.update(zip(eqn.outvars, outs, strict=True))
                continue
            results = tuple(slot(var) for var in eqn.outvars)
            place.update(zip(eqn.outvars, results, strict=True))
            nodes.append(Node(eqn, tuple(ins), results, here))
        return [read(var) for var in jaxpr.outvars]

    opened = compat.open_jaxpr(closed)
    inputs = [slot(var) for var in opened.invars]
    outputs = walk(closed, closed.consts, inputs, "an unknown line")
    return Flat(inputs, consts, nodes, outputs, avals)


def slots(atoms: Iterable[Any]) -> list[int]:
    """Those of some operands that are slots."""
    return [atom for atom in atoms if isinstance(atom, int)]


def needed(nodes: Sequence[Node], wanted: Iterable[int]) -> list[Node]:
    """The nodes, in order, that the wanted slots are computed from."""
    live, kept = set(wanted), []
    for node in reversed(nodes):
        if live & set(node.results):
            kept.append(node)
            live |= set(slots(node.operands))
    return kept[::-1]


def run(nodes: Sequence[Node], known: dict[int, Any]) -> dict[int, Any]:
    """`known` and the results of `nodes`, custom rules and safe derivatives included."""
    values = dict(known)
    for node in nodes:
        operands = [values[a] if isinstance(a, int) else a.val for a in node.operands]
        values.update(zip(node.results, safe_derivatives.bind(node.eqn, operands), strict=True))
    return values
