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
from jaxpara.weights.lazy import MOVES, Lazy, Move, array, is_lazy
from jaxpara.weights.weight import cut, shape_of


class Use(NamedTuple):
    """One place where a leaf is used.

    Attributes:
      path: of the leaf.
      primitive: that uses it.
      how: "rule" or "densified".
      remark: of the method on how its rule runs, or nothing.
    """

    path: str
    primitive: str
    how: str
    remark: str = ""


class Walk:
    """One walk over a jaxpr; `uses` collects what happens to lazy values."""

    def __init__(self, uses: dict[Any, Use]):
        self.uses = uses

    def note(self, eqn: Any, lazy: Lazy, how: str, remark: str = "") -> None:
        use = Use(lazy.path, eqn.primitive.name, how, remark)
        self.uses.setdefault((id(eqn), lazy.path, how), use)

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
    ndim = len(shape_of(x.weight).shape)
    whole = not any(kind == "transpose" and value[0] != 0 for kind, value in x.moves)
    marked: list[jax.Array] = []

    def mark(array, position):
        assert position == 0
        marked.append(array)
        return array[0]

    one = cut(x.weight, -ndim, mark) if whole and ndim > 2 else None
    if one is None:
        walk.note(eqn, x, "densified")
        return _Rows(x.array(), lambda row: row)
    moves = tuple(
        Move(kind, tuple(i - 1 for i in value[1:]) if kind == "transpose" else value)
        for kind, value in x.moves
    )

    def rebuild(rows):
        left = iter(rows)
        weight: Any = cut(x.weight, -ndim, lambda array, position: next(left))
        return Lazy(weight, moves, x.path)

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
