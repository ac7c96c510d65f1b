"""A call of `lax.scan`, traced: its body, its operands, and obstacles to a parallel solve.

`lax.scan` itself does the tracing, so its error messages, weak-type promotion,
`None` outputs and hoisted constants (outer tracers too) are the user's own.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara import compat, jaxprs
from jaxpara.recurrence.solve import explicit_meshes
from jaxpara.recurrence.solve.body import SOLVE_NAME, Body
from jaxpara.tree import short


class Traced(NamedTuple):
    """One call. `consts`, `init` and `xs` are flat lists of operands.

    JAX keeps out of a scan what its step only hands through: a leaf of the carry that never changes
    is a constant, and a part of `x` among the outputs is not computed. `handed` holds, for each
    leaf of `lax.scan`'s results, which leaf of `(init, xs)` was handed through, or None.
    """

    body: Body
    consts: list[Any]
    init: list[Any]
    xs: list[Any]
    length: int
    obstacle: str | None
    out_tree: Any
    out_weak: list[bool]
    carry_tree: Any
    handed: list[int | None]

    def results(self, computed: Sequence[Any], init: Any, xs: Any) -> list[Any]:
        """The leaves of `lax.scan`'s results, from those that are computed."""
        rest, given = iter(computed), jax.tree.leaves((init, xs))
        return [next(rest) if i is None else jnp.asarray(given[i]) for i in self.handed]

    def carry(self, computed: Sequence[Any]) -> Any:
        """The tree of the carry with leaves that are computed, and None for the others."""
        rest, handed = iter(computed), self.handed[: self.carry_tree.num_leaves]
        leaves = [next(rest) if i is None else None for i in handed]
        return jax.tree.unflatten(self.carry_tree, leaves)


def need_order(f: Any, init: Any, order: str = "newton_scan(step, init, xs)") -> None:
    """Refuses a carry in the place of the step; of other mistakes `lax.scan` speaks itself.

    Args:
      f, init: as they were given.
      order: the right call.

    Raises:
      TypeError: `init` is a function and `f` is none.
    """
    if callable(init) and not callable(f):
        raise TypeError(
            f"the step is {short(f)} and init a function; expected the step first, a function "
            f"(carry, x) -> (carry, y): {order}"
        )


def trace(
    f: Callable, init: Any, xs: Any, length: int | None, reverse: bool, unroll: int | bool
) -> Traced:
    """Traces `lax.scan(f, init, xs, length, reverse, unroll)` without running it.

    Raises:
      What `lax.scan` raises for these arguments.
      TypeError: `f` and `init` are in each other's place.
    """
    need_order(f, init)
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
    places = {var: i for i, var in enumerate(opened.invars)}
    handed = [None if _literal(var) else places.get(var) for var in opened.outvars]
    computed = [var for var, i in zip(opened.outvars, handed, strict=True) if i is None]
    if len(scans) != 1 or computed != list(scans[0].outvars):
        return _unknown(len(scans), out_tree, out_weak, carry_tree)
    eqn = scans[0]
    jaxpr, n_consts, n_carry = compat.scan_parts(eqn)
    avals = [var.aval for var in compat.open_jaxpr(jaxpr).invars]
    known = dict(zip(opened.constvars, closed.consts, strict=True))
    known |= dict(zip(opened.invars, flat, strict=True))
    operands = [var.val if _literal(var) else known.get(var) for var in eqn.invars]
    # Computed before the scan: lax.scan promoting a weakly typed init.
    began = [leaf for leaf, i in zip(flat, handed, strict=False) if i is None][:n_carry]
    for position, leaf in enumerate(began, n_consts):
        operands[position] = leaf if operands[position] is None else operands[position]
    missing = any(value is None for value in operands)
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
        next((i for i, n in enumerate(new) if n is var and not _literal(var)), None)
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
        handed,
    )


def _literal(atom: Any) -> bool:
    return hasattr(atom, "val")


def _unknown(scans: int, out_tree: Any, out_weak: list[bool], carry_tree: Any) -> Traced:
    """A call that is not one scan with its results; there is nothing to solve in parallel then."""
    if compat.without_jit():
        why = "jax.disable_jit unrolls lax.scan"
    else:
        why = f"JAX traced lax.scan to {scans} scan equations whose outputs are not its results"
    nothing = Body(None, 0, 0, (), ())
    return Traced(nothing, [], [], [], 0, why, out_tree, out_weak, carry_tree, [])


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
