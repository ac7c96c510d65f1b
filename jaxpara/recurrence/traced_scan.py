"""A call of `lax.scan`, traced: its body, its operands, and obstacles to a parallel solve.

`lax.scan` itself does the tracing, so its error messages, weak-type promotion,
`None` outputs and hoisted constants (outer tracers too) are the user's own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara import compat, jaxprs
from jaxpara.recurrence.solve import explicit_meshes
from jaxpara.recurrence.solve.body import SOLVE_NAME, Body


class Traced(NamedTuple):
    """One call. `consts`, `init` and `xs` are flat lists of operands."""

    body: Body
    consts: list[Any]
    init: list[Any]
    xs: list[Any]
    length: int
    obstacle: str | None
    out_tree: Any
    out_weak: list[bool]
    carry_tree: Any


def trace(
    f: Callable, init: Any, xs: Any, length: int | None, reverse: bool, unroll: int | bool
) -> Traced:
    """Traces `lax.scan(f, init, xs, length, reverse, unroll)` without running it.

    Raises:
      What `lax.scan` raises for these arguments.
    """
    if not all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(xs)):
        # Tracing makes arrays of numbers, and `lax.scan` has a message for numbers.
        lax.scan(f, init, xs, length, reverse, unroll)
    closed, shape = jax.make_jaxpr(
        lambda i, x: lax.scan(f, i, x, length, reverse, unroll), return_shape=True
    )(init, xs)
    out_tree = jax.tree.structure(shape)
    out_weak = [bool(leaf.weak_type) for leaf in jax.tree.leaves(shape)]
    carry_tree = jax.tree.structure(shape[0])
    flat = jax.tree.leaves((init, xs))
    opened = compat.open_jaxpr(closed)
    scans = [eqn for eqn in opened.eqns if eqn.primitive.name == "scan"]
    if len(scans) != 1 or list(opened.outvars) != list(scans[0].outvars):
        # disable_jit unrolls the scan; there is nothing to solve in parallel then.
        nothing = Body(None, 0, 0, (), ())
        why = "lax.scan was not traced"
        return Traced(nothing, [], [], [], 0, why, out_tree, out_weak, carry_tree)
    eqn = scans[0]
    jaxpr, n_consts, n_carry = compat.scan_parts(eqn)
    known = dict(zip(opened.constvars, closed.consts, strict=True))
    known |= dict(zip(opened.invars, flat, strict=True))
    avals = [var.aval for var in compat.open_jaxpr(jaxpr).invars]
    operands = []
    missing = False
    for position, var in enumerate(eqn.invars):
        if hasattr(var, "val"):
            operands.append(var.val)
        elif var in known:
            operands.append(known[var])
        elif n_consts <= position < n_consts + n_carry:
            # Computed before the scan: lax.scan promoting a weakly typed init.
            operands.append(flat[position - n_consts])
        else:
            operands.append(None)
            missing = True
    init_flat = [
        _promoted(value, aval)
        for value, aval in zip(
            operands[n_consts : n_consts + n_carry],
            avals[n_consts : n_consts + n_carry],
            strict=True,
        )
    ]
    carry_avals = avals[n_consts : n_consts + n_carry]
    floats = tuple(i for i, a in enumerate(carry_avals) if jnp.issubdtype(a.dtype, jnp.floating))
    outvars = compat.open_jaxpr(jaxpr).outvars
    new = [outvars[i] for i in floats]
    aliases = tuple(
        next((i for i, n in enumerate(new) if n is var and not hasattr(var, "val")), None)
        for var in outvars[n_carry:]
    )
    body = Body(jaxpr, n_consts, n_carry, floats, aliases)
    obstacle = "a constant could not be hoisted" if missing else _obstacle(body, carry_avals, eqn)
    return Traced(
        body,
        operands[:n_consts],
        init_flat,
        operands[n_consts + n_carry :],
        eqn.params["length"],
        obstacle,
        out_tree,
        out_weak,
        carry_tree,
    )


def _promoted(value, aval):
    if jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return value
    return lax.convert_element_type(value, aval.dtype)


def _obstacle(body: Body, carry_avals, eqn) -> str | None:
    """Why the call must run step by step, in the user's terms, or None."""
    length = eqn.params["length"]
    if not isinstance(length, int):
        return f"the length is symbolic ({length}), and a parallel plan needs a number"
    if length == 0:
        return "there are no steps"
    complex_leaves = [a for a in carry_avals if jnp.issubdtype(a.dtype, jnp.complexfloating)]
    if complex_leaves:
        return f"the carry holds a complex leaf ({complex_leaves[0].str_short()})"
    if not body.floats:
        return "the carry has no floating leaf to solve for"
    effects = compat.open_jaxpr(body.jaxpr).effects
    if effects:
        names = ", ".join(sorted({type(e).__name__ for e in effects}))
        return f"the step has side effects ({names})"
    if jaxprs.contains(body.jaxpr, "pure_callback", skip=(SOLVE_NAME,)):
        return "the step calls Python (pure_callback), which has no derivative"
    collectives = sorted(
        {
            e.primitive.name
            for e in jaxprs.equations(body.jaxpr, skip=(SOLVE_NAME,))
            if e.primitive.name in jaxprs.COLLECTIVES
        }
    )
    if collectives:
        return f"the step communicates between devices ({', '.join(collectives)})"
    floating = {body.consts + i for i in body.floats}
    depends = jaxprs.dependence(body.jaxpr)
    mixed = [i for i in body.others if _reaches(depends, body, i) & floating]
    if mixed:
        kind = carry_avals[mixed[0]].str_short()
        return f"a carry leaf that is not floating ({kind}) depends on the floating part"
    return explicit_meshes.obstacle(body.jaxpr, sorted(floating))


def _reaches(depends, body: Body, leaf: int) -> frozenset[int]:
    """Inputs that a carry leaf depends on after any number of steps."""
    seen = set()
    queue = [leaf]
    while queue:
        inputs = depends[queue.pop()] - seen
        seen |= inputs
        queue += [i - body.consts for i in inputs if 0 <= i - body.consts < body.carries]
    return frozenset(seen)
