"""A traced recurrence, and the linear algebra of its step that every derivative uses."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxpara.recurrence.solve import jacobian_products
from jaxpara.recurrence.solve.body import Body, flow_of
from jaxpara.recurrence.solve.linear_recurrences import (
    MATERIALISED,
    Operator,
    block_operator,
    column_operator,
    elementwise,
)
from jaxpara.recurrence.solve.tangent_leaves import differentiable
from jaxpara.recurrence.structure.jacobian_blocks import block_size, restricted
from jaxpara.recurrence.structure.tangent_flow import Flow
from jaxpara.recurrence.system import Choice, Leaves, Settings, Solver, System
from jaxpara.recurrence.wide import widened


class Problem(NamedTuple):
    """All of a call but its operands; hashable, so that equal calls share a compilation.

    Its functions take operands in scan order, lists of leaves.

    Attributes:
      body: the traced step.
      choice: what runs, and what is proved of the step.
      reverse: scan order runs against time, that of arrays and that of a mesh axis.
      unroll: as for `lax.scan`.
      still: `(consts, xs) -> (consts, xs)`, stops derivatives by what has none; or None.
    """

    body: Body
    choice: Choice
    reverse: bool
    unroll: int | bool
    still: Callable[..., Any] | None = None

    @property
    def solver(self) -> Solver:
        """The solver."""
        assert self.choice.solver is not None, "lax.scan needs no problem"
        return self.choice.solver

    @property
    def settings(self) -> Settings:
        """The solver's."""
        return self.solver.settings

    def step(self, consts: Leaves, state: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        """One step of the floating leaves. `x` may end in more than the step takes."""
        if self.still is not None:
            consts, x = self.still(consts, x)
        return self.body.on_floats(consts, state, x[: self.body.inputs])

    def flow(self) -> Flow:
        """How tangents flow through the step."""
        return flow_of(self.body)


def system_of(problem: Problem, consts, init, xs) -> System:
    """The `System` that a solver receives."""
    choice = problem.choice

    def step(state, x):
        return problem.step(consts, state, x)

    def push(state, x, columns):
        if not choice.vjp_only:
            new, linear = jax.linearize(lambda *s: list(step(list(s), x)[0]), *state)
            return new, jax.vmap(lambda *c: linear(*c))(*columns)
        new = step(state, x)[0]
        matrices = jacobian_products.blocks_of(lambda s: step(s, x)[0], state, choice.groups, True)
        product = jacobian_products.multiply(
            matrices, jacobian_products.gather_columns(choice.groups, columns)
        )
        return new, jacobian_products.spread_columns(choice.groups, product, new)

    length = jax.tree.leaves(xs)[0].shape[0]
    return System(
        step,
        push,
        init,
        xs,
        length,
        choice.groups,
        choice.certain,
        choice.kinks,
        problem.reverse,
        problem.unroll,
    )


def steps_of(problem: Problem, leaves: Sequence[int], ys: Sequence[int]):
    """`(consts, before, xs) -> (some new leaves, some floating outputs)` of all steps."""

    @widened
    def steps(consts, before, xs):
        def at(state, x):
            new, out = problem.step(consts, list(state), x)
            smooth = [y for y in out if differentiable(y)]
            return [new[i] for i in leaves], [smooth[i] for i in ys]

        return jax.vmap(at)(list(before), xs)

    return steps


def operator_of(problem: Problem, part: Sequence[int], consts, before: Leaves, xs) -> Operator:
    """`J_t` of some leaves at the solution: blocks where small, else the step's own products."""
    groups = restricted(problem.choice.groups, part)
    shapes = [before[i].shape[1:] for i in part]
    size = max(block_size(group, shapes) for group in groups)
    like = [jax.ShapeDtypeStruct(before[i].shape[1:], before[i].dtype) for i in part]

    def at(whole, x):
        def function(*state):
            leaves = list(whole)
            for i, leaf in zip(part, state, strict=True):
                leaves[i] = leaf
            new = problem.step(consts, leaves, x)[0]
            return [new[i] for i in part]

        return function, [whole[i] for i in part]

    if size <= 8 and elementwise(groups, like) and not problem.choice.vjp_only:

        def columns(whole, x):
            function, state = at(whole, x)
            return jacobian_products.columns_of(lambda s: function(*s), state, groups)

        return column_operator(groups, jax.vmap(columns)(list(before), xs))
    most = MATERIALISED[problem.settings.linear]
    # A loop of unknown length can be pushed through and not pulled through.
    if size <= most or problem.flow().circles:

        def blocks(whole, x):
            function, state = at(whole, x)
            return jacobian_products.blocks_of(
                lambda s: function(*s), state, groups, problem.choice.vjp_only
            )

        return block_operator(groups, jax.vmap(blocks)(list(before), xs), like)

    def push(data, v):
        function, state = at(*data)
        # Not by a jvp: its transpose would be asked of the step itself, too.
        return jax.linearize(function, *state)[1](*v)

    def pull(data, w):
        function, state = at(*data)
        return list(jax.vjp(function, *state)[1](list(w)))

    return Operator((list(before), xs), push, pull, groups, False)
