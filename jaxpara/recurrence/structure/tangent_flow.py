"""Which leaves of the carry feed which: what must be solved together, and in which order.

By tangents and whole leaves. Backpropagation through `lax.scan` multiplies only values that are not
symbolic zeros. An implicit derivative that multiplied more would turn the infinite derivative of
a leaf that nobody reads into a NaN, since zero times infinity is a NaN.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpara import compat, jaxprs
from jaxpara.recurrence.structure.custom_vjps import pushable
from jaxpara.recurrence.structure.propagate import (
    CONTROL,
    UNKNOWN,
    Domain,
    floating,
    propagate,
)


class Fed(NamedTuple):
    """The constants, leaves of the state and inputs whose tangents reach one result of the step."""

    consts: frozenset[int]
    state: frozenset[int]
    xs: frozenset[int]


class Flow(NamedTuple):
    """How tangents flow through one step.

    Attributes:
      leaves: what feeds each floating leaf of the new state.
      ys: what feeds each floating output that is not a leaf of the new state.
      parts: the leaves, those that feed one another together, sources first.
      branches: the step has a `cond` or `switch` at some depth.
      circles: the state passes through a `while` of unknown length.
    """

    leaves: tuple[Fed, ...]
    ys: tuple[Fed, ...]
    parts: tuple[tuple[int, ...], ...]
    branches: bool
    circles: bool

    def moving(
        self, consts: Collection[int], state: Collection[int], xs: Collection[int]
    ) -> frozenset[int]:
        """Leaves with a tangent at some time, where these constants, first leaves and inputs do."""
        found = set(state)
        for part in self.parts:
            fed = merged(self.leaves[i] for i in part)
            if fed.consts & set(consts) or fed.state & found or fed.xs & set(xs):
                found.update(part)
        return frozenset(found)

    def loops(self, part: Collection[int]) -> bool:
        """Whether a part depends on its own state before the step."""
        return bool(self.leaves[next(iter(part))].state & set(part))

    def live(self, state: Iterable[int], ys: Iterable[int]) -> frozenset[int]:
        """Leaves with a cotangent at some time, where these leaves and outputs have one."""
        found = set(state) | merged(self.ys[i] for i in ys).state
        for part in reversed(self.parts):
            if found & set(part):
                found |= {*part, *merged(self.leaves[i] for i in part).state}
        return frozenset(found)


def merged(fed: Iterable[Fed]) -> Fed:
    """What feeds any of several results."""
    columns = list(zip(*fed, strict=True)) or [()] * 3
    return Fed(*(frozenset().union(*column) for column in columns))


def flow(
    jaxpr: Any,
    consts: int,
    state: Sequence[int],
    leaves: Sequence[int],
    ys: Sequence[int],
    skip: Collection[str] = (),
) -> Flow:
    """How tangents flow through a traced step.

    Args:
      jaxpr: the closed jaxpr of the step.
      consts: how many of its first inputs are constants.
      state: positions of the floating leaves of the state among its inputs; all other inputs
        are numbered in their order as xs.
      leaves: positions of the same leaves among its outputs.
      ys: positions of the floating outputs.
      skip: jitted functions whose inside does not matter, by name.
    """
    count = len(compat.open_jaxpr(jaxpr).invars)
    inputs = [i for i in range(consts, count) if i not in state]

    def fed(reached: frozenset[int]) -> Fed:
        return Fed(
            frozenset(i for i in reached if i < consts),
            frozenset(k for k, i in enumerate(state) if i in reached),
            frozenset(k for k, i in enumerate(inputs) if i in reached),
        )

    reached, circling = reach(jaxpr)
    new = tuple(fed(reached[i]) for i in leaves)
    outputs = tuple(fed(reached[i]) for i in ys)
    branches = jaxprs.contains(jaxpr, "cond", skip=skip)
    return Flow(new, outputs, _parts(new), branches, bool(circling & set(state)))


def reach(jaxpr: Any) -> tuple[list[frozenset[int]], frozenset[int]]:
    """For each output of a closed jaxpr the floating inputs whose tangents reach its tangent.

    Returns:
      These sets, and the inputs whose tangents pass through a `while`.
    """
    opened = compat.open_jaxpr(jaxpr)
    every = frozenset(i for i, v in enumerate(opened.invars) if floating(v.aval))
    circling: set[int] = set()

    def circle(eqn, operands, domain):
        circling.update(*(value for value in operands if value is not None))
        return CONTROL["while"](eqn, operands, domain, known)

    known = {"while": circle}
    try:
        moving = pushable(jaxpr)
        linear, reached = compat.jvp_jaxpr(jaxpr, moving)
        starts = [frozenset({i}) for i, moves in enumerate(moving) if moves]
        outs = propagate(linear, [None] * len(moving) + starts, _SETS, known)
        tangents = iter(outs[len(reached) :])
    except UNKNOWN:
        return [every] * len(opened.outvars), every
    sets = [(next(tangents) or frozenset()) if yes else frozenset() for yes in reached]
    return sets, frozenset(circling)


def _union(eqn: Any, operands: list) -> list:
    whole = frozenset().union(*(value for value in operands if value is not None))
    return [whole] * len(eqn.outvars)


_SETS = Domain(
    apply=_union,
    move=lambda eqn, operands, table: _union(eqn, operands),
    join=frozenset.union,
    unstack=lambda value, aval: value,
    stack=lambda value, aval: value,
    mapped=lambda run, xs: run(xs),
)


def _parts(leaves: Sequence[Fed]) -> tuple[tuple[int, ...], ...]:
    """Strongly connected leaves, in an order in which whatever feeds a part comes before it."""
    count = len(leaves)
    feeds = np.eye(count, dtype=bool)  # [i, j]: i feeds j, after any number of steps
    for j, fed in enumerate(leaves):
        feeds[list(fed.state), j] = True
    for k in range(count):
        feeds |= feeds[:, k : k + 1] & feeds[k : k + 1]
    parts = {tuple(np.flatnonzero(feeds[i] & feeds[:, i]).tolist()) for i in range(count)}
    # Fewer leaves feed what feeds a part.
    return tuple(sorted(parts, key=lambda part: (feeds[:, part[0]].sum(), part)))
