"""Walk a jaxpr through jit, scan, cond, while, remat and custom rules.

Four questions that the wings ask of a traced function: which jaxprs does an
equation hold, does a primitive occur anywhere inside, which outputs can change
when an input changes, and what is left when only some outputs are wanted.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from jax.extend import core
from jax.interpreters import partial_eval

from jaxpara import compat

COLLECTIVES = frozenset(
    {
        "all_gather",
        "all_gather_invariant",
        "all_gather_reduced",
        "all_to_all",
        "axis_index",
        "pbroadcast",
        "pmax",
        "pmin",
        "ppermute",
        "psum",
        "psum2",
        "psum_invariant",
        "psum_scatter",
        "ragged_all_to_all",
        "reduce_scatter",
        "unreduced_psum",
        "unreduced_psum_scatter",
    }
)
"""Primitives that speak to other devices along a named axis."""


def is_jaxpr(value: Any) -> bool:
    """Whether a value is a jaxpr, open or closed."""
    return isinstance(value, core.Jaxpr | compat.ClosedJaxpr)


def subjaxprs(eqn: Any) -> list[Any]:
    """The jaxprs, open or closed, that an equation holds in its parameters.

    Looks into tuples, lists and dictionaries, so parameters of primitives that
    nobody here has heard of are found too.

    Args:
      eqn: one equation of a jaxpr.

    Returns:
      The inner jaxprs in the order of the parameters.
    """

    def inside(value):
        if is_jaxpr(value):
            yield value
        elif isinstance(value, tuple | list):
            for item in value:
                yield from inside(item)
        elif isinstance(value, dict):
            for item in value.values():
                yield from inside(item)

    return [found for value in eqn.params.values() for found in inside(value)]


def equations(jaxpr: Any, *, skip: Collection[str] = ()) -> Iterator[Any]:
    """Every equation of a jaxpr and of the jaxprs inside it.

    Args:
      jaxpr: an open or closed jaxpr.
      skip: equations with this primitive name, or jitted functions with this
        name, are passed over together with all they hold. This is how a search
        does not trip over the inside of a solve that is already understood.

    Yields:
      Equations, outer before inner.
    """
    for eqn in compat.open_jaxpr(jaxpr).eqns:
        if eqn.primitive.name in skip or eqn.params.get("name") in skip:
            continue
        yield eqn
        for inner in subjaxprs(eqn):
            yield from equations(inner, skip=skip)


def contains(
    jaxpr: Any,
    what: str | Collection[str] | Callable[[Any], bool],
    *,
    skip: Collection[str] = (),
) -> bool:
    """Whether some equation of a jaxpr, at any depth, is the one looked for.

    Args:
      jaxpr: an open or closed jaxpr.
      what: a primitive's name, several names, or a predicate on equations.
      skip: primitive or jit names whose inside is not searched, see `equations`.

    Returns:
      True if one equation matches.
    """
    found = equations(jaxpr, skip=skip)
    if callable(what):
        return any(what(eqn) for eqn in found)
    names = {what} if isinstance(what, str) else frozenset(what)
    return any(eqn.primitive.name in names for eqn in found)


def _union(sets) -> frozenset[int]:
    return frozenset().union(*sets)


def _fixpoint(step, carry):
    """Smallest carry above the given one with step(carry) <= carry."""
    while True:
        grown = [a | b for a, b in zip(carry, step(carry), strict=True)]
        if grown == carry:
            return carry
        carry = grown


def _while_dependence(eqn, ins):
    nc, nb = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]

    def step(carry):
        going = _union(_flow(cond, ins[:nc] + carry))
        return [out | going for out in _flow(body, ins[nc : nc + nb] + carry)]

    return _fixpoint(step, ins[nc + nb :])


def _scan_dependence(eqn, ins):
    body, consts, carries = compat.scan_parts(eqn)
    xs = ins[consts + carries :]
    carry = _fixpoint(
        lambda carry: _flow(body, ins[:consts] + carry + xs)[:carries],
        ins[consts : consts + carries],
    )
    return carry + _flow(body, ins[:consts] + carry + xs)[carries:]


def _cond_dependence(eqn, ins):
    branches = [_flow(branch, ins[1:]) for branch in eqn.params["branches"]]
    return [_union([ins[0], *outs]) for outs in zip(*branches, strict=True)]


_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
    "composite": "jaxpr",
    "linear_call": "callee",
}


def called(eqn: Any) -> Any | None:
    """The jaxpr that an equation merely calls on its own operands, or None."""
    return eqn.params.get(_CALLS.get(eqn.primitive.name, ""))


def _flow(jaxpr, ins):
    jaxpr = compat.open_jaxpr(jaxpr)
    reach = dict(zip(jaxpr.invars, ins, strict=True))

    def read(atom):
        return frozenset() if isinstance(atom, core.Literal) else reach.get(atom, frozenset())

    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        name = eqn.primitive.name
        if (inner := called(eqn)) is not None:
            outs = _flow(inner, operands)
        elif name == "while":
            outs = _while_dependence(eqn, operands)
        elif name == "scan":
            outs = _scan_dependence(eqn, operands)
        elif name == "cond":
            outs = _cond_dependence(eqn, operands)
        else:
            outs = [_union(operands)] * len(eqn.outvars)
        reach.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def dependence(jaxpr: Any) -> list[frozenset[int]]:
    """Which inputs can change the value of each output.

    A safe over-approximation, whole arrays at a time: loops are followed to a
    fixpoint, a predicate counts as an input of what it decides, and a primitive
    that is not entered is taken to mix all its operands. References (mutable
    arrays) are not followed: check the effects of the jaxpr first.

    Args:
      jaxpr: an open or closed jaxpr.

    Returns:
      For each output the set of positions of inputs that may reach it.
    """
    inputs = compat.open_jaxpr(jaxpr).invars
    return _flow(jaxpr, [frozenset({i}) for i in range(len(inputs))])


def prune(jaxpr: compat.ClosedJaxpr, keep: Sequence[bool]) -> tuple[compat.ClosedJaxpr, list[bool]]:
    """Remove what the wanted outputs do not need.

    Args:
      jaxpr: a closed jaxpr.
      keep: one flag for each output.

    Returns:
      A closed jaxpr that takes only the inputs still used and returns only the
      kept outputs, and one flag for each input of the old one: still used?

    Raises:
      ValueError: `keep` does not have one flag for each output.
    """
    outputs = len(compat.open_jaxpr(jaxpr).outvars)
    if len(keep) != outputs:
        raise ValueError(
            f"prune got keep with {len(keep)} flags for a jaxpr with {outputs} outputs; "
            f"pass one flag for each output"
        )
    pruned, used = partial_eval.dce_jaxpr(compat.open_jaxpr(jaxpr), list(keep))
    return compat.ClosedJaxpr(pruned, jaxpr.consts), list(used)
