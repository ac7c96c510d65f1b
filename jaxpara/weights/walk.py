"""A jaxpr walked with lazy weights as values.

They stay lazy through calls, loops and branches; a rule takes them where one pays; every other
equation gets dense arrays, computed at that place and again in the backward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxpara import compat
from jaxpara.weights import products
from jaxpara.weights.conv import conv
from jaxpara.weights.lazy import MOVES, Lazy, array, dropped, is_lazy
from jaxpara.weights.weight import is_weight


class Use(NamedTuple):
    """One place where a leaf is used.

    Attributes:
      path: of the leaf.
      primitive: that uses it.
      how: "rule" or "densified".
      remark: of the method on how its rule runs, or nothing.
      lost: `(name of a method, what it does not do here)`, where the value or the cost is not
        what the method is for.
    """

    path: str
    primitive: str
    how: str
    remark: str = ""
    lost: tuple[tuple[str, str], ...] = ()


class Walk:
    """One walk over a jaxpr; `uses` collects what happens to lazy values."""

    def __init__(self, uses: dict[Any, Use]):
        self.uses = uses
        # Products that were put in another order: a note needs an equation that stays the same.
        self.ordered: dict[Any, Any] = {}

    def note(self, eqn: Any, lazy: Lazy, how: str) -> None:
        name, weight = eqn.primitive.name, lazy.weight
        lost = _lost(lazy, name) if how == "densified" else ()
        method, remark = weight.method, ""
        if how == "rule" and method.remark is not None:
            remark = method.remark(method.settings, weight)
        self.uses.setdefault((id(eqn), lazy.path, how), Use(lazy.path, name, how, remark, lost))

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        env: dict[Any, Any] = {}
        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(atom):
            return atom.val if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            if any(map(is_lazy, operands)):
                outs = self.step(eqn, operands)
            else:
                outs = compat.bind(eqn, operands)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def closed(self, jaxpr: Any) -> Callable[..., list[Any]]:
        """A function of flat operands, lazy ones among them."""
        inner = compat.open_jaxpr(jaxpr)
        consts = getattr(jaxpr, "consts", ())
        return lambda *args: self.run(inner, consts, args)

    def step(self, eqn: Any, operands: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        out = None
        if name in MOVES:
            out = MOVES[name](eqn, operands)
        elif name in _RULES:
            out = _RULES[name](self, eqn, operands)
        if out is not None:
            return out
        return self.densified(eqn, operands)

    def densified(self, eqn: Any, operands: list[Any]) -> list[Any]:
        """The equation on dense arrays, which are computed again for the backward pass."""
        for operand in filter(is_lazy, operands):
            self.note(eqn, operand, "densified")
        run = jax.checkpoint(lambda *ops: compat.bind(eqn, list(map(array, ops))))
        return run(*operands)


def _lost(lazy: Lazy, primitive: str) -> tuple[tuple[str, str], ...]:
    """What the methods of a weight that is built do not do."""
    found, weight, outermost = [], lazy.weight, True
    while is_weight(weight):
        method = weight.method
        # Nothing is multiplied with rows that are looked up.
        if method.beyond and primitive != "gather":
            found.append((method.name, method.beyond))
        if outermost and method.factors is not None:
            found.append((method.name, "the weight is built whole"))
        weight, outermost = weight.base, False
    return tuple(found)


def _dense_outputs(walk: Walk, eqn: Any, outs: list[Any]) -> list[Any]:
    for out in filter(is_lazy, outs):
        walk.note(eqn, out, "densified")
    return list(map(array, outs))


# Calls and control flow.


def _call(walk: Walk, eqn: Any, operands: list[Any]) -> list[Any]:
    inner = walk.closed(eqn.params["jaxpr"])
    inner.__name__ = eqn.params.get("name", "call")
    return jax.jit(inner)(*operands)


def _remat(walk: Walk, eqn: Any, operands: list[Any]) -> list[Any]:
    params = eqn.params
    run = jax.checkpoint(
        walk.closed(params["jaxpr"]), prevent_cse=params["prevent_cse"], policy=params["policy"]
    )
    return run(*operands)


def _cond(walk: Walk, eqn: Any, operands: list[Any]) -> list[Any]:
    index, *args = operands

    def branch(jaxpr):
        inner = walk.closed(jaxpr)
        return lambda *a: _dense_outputs(walk, eqn, inner(*a))

    branches = [branch(jaxpr) for jaxpr in eqn.params["branches"]]
    return list(lax.switch(jnp.asarray(index, jnp.int32), branches, *args))


def _while(walk: Walk, eqn: Any, operands: list[Any]) -> list[Any]:
    params = eqn.params
    nc, nb = params["cond_nconsts"], params["body_nconsts"]
    cond, body = walk.closed(params["cond_jaxpr"]), walk.closed(params["body_jaxpr"])
    init = _dense_outputs(walk, eqn, operands[nc + nb :])

    def going(carry):
        return cond(*operands[:nc], *carry)[0]

    def again(carry):
        return _dense_outputs(walk, eqn, body(*operands[nc : nc + nb], *carry))

    return list(lax.while_loop(going, again, init))


def _scan(walk: Walk, eqn: Any, operands: list[Any]) -> list[Any]:
    body, consts, carries = compat.scan_parts(eqn)
    inner = walk.closed(body)
    params = eqn.params
    fixed = operands[:consts]
    init = _dense_outputs(walk, eqn, operands[consts : consts + carries])
    rows = [_rows(walk, eqn, x) for x in operands[consts + carries :]]

    def step(carry, xs):
        slices = [row.rebuild(x) for row, x in zip(rows, xs, strict=True)]
        outs = _dense_outputs(walk, eqn, inner(*fixed, *carry, *slices))
        return outs[:carries], outs[carries:]

    carry, ys = lax.scan(
        step,
        init,
        [row.arrays for row in rows],
        params["length"],
        params["reverse"],
        params["unroll"],
    )
    return [*carry, *ys]


class _Rows(NamedTuple):
    """What a scan takes apart of one operand, and how a slice is put together."""

    arrays: Any
    rebuild: Callable[[Any], Any]


def _rows(walk: Walk, eqn: Any, x: Any) -> _Rows:
    if not is_lazy(x):
        return _Rows(x, lambda row: row)
    marked: list[jax.Array] = []

    def mark(array, position):
        marked.append(jnp.moveaxis(array, position, 0))
        return marked[-1][0]

    if dropped(x, 0, mark) is None:
        walk.note(eqn, x, "densified")
        return _Rows(x.array(), lambda row: row)

    def rebuild(rows):
        left = iter(rows)
        return dropped(x, 0, lambda array, position: next(left))

    return _Rows(marked, rebuild)


_RULES: dict[str, Callable[[Walk, Any, list[Any]], list[Any] | None]] = {
    "dot_general": products.dot_general,
    "conv_general_dilated": conv,
    "gather": products.gather,
    "jit": _call,
    "pjit": _call,
    "closed_call": _call,
    "remat2": _remat,
    "checkpoint": _remat,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}
