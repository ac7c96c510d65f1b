"""`newton_scan`: `lax.scan`, solved in parallel over time."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxpara import compat
from jaxpara.arguments import kind_of
from jaxpara.recurrence.choice import Auto, decide, say
from jaxpara.recurrence.lanes import vary_alike, vary_over
from jaxpara.recurrence.solve import explicit_meshes, sharded_time
from jaxpara.recurrence.solve.body import SOLVE_NAME
from jaxpara.recurrence.solve.claimed_structure import check_structure
from jaxpara.recurrence.solve.general_rule import solve
from jaxpara.recurrence.solve.problem import Problem
from jaxpara.recurrence.solve.sequential import sequential
from jaxpara.recurrence.system import Solver
from jaxpara.recurrence.traced_scan import Traced, trace
from jaxpara.tree import short


class SolveInfo(NamedTuple):
    """How a recurrence was solved; scalars per call, and `vmap` adds its axis.

    Attributes:
      converged: the states are certified within the budget of iterations: by the next Newton
        correction where the step's derivative is proved, by bitwise agreement otherwise.
      iterations: evaluations of all steps, including the confirming one; 0 if the
        recurrence ran sequentially from the beginning.
      residual: the largest jump between pieces that should meet, found by the last test;
        absolute, and before any completion.
      fallback_steps: steps that were completed sequentially after the budget.
      starts: the carry at the chunk starts (floating leaves `[chunks, *leaf]`, None
        for the others and for leaves that no step changes): pass it as `guess` of a later call.
    """

    converged: Bool[Array, ""]
    iterations: Int[Array, ""]
    residual: Float[Array, ""]
    fallback_steps: Int[Array, ""]
    starts: PyTree

    def __repr__(self) -> str:
        fields = (f"{name}={short(value, 4)}" for name, value in self._asdict().items())
        return f"SolveInfo({', '.join(fields)})"


def newton_scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: PyTree,
    xs: PyTree = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    *,
    solver: Solver | Auto | None = None,
    derivative: str | None = None,
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan`, solved in parallel over time.

    The recurrence `h_t, y_t = f(h_{t-1}, x_t)` is posed as one system of equations in
    all h_t and solved by a Newton-type iteration. Steps that the solver leaves open are
    finished one by one, so values and gradients are those of `lax.scan`.

    Args:
      f: the step, as for `lax.scan`.
      init: initial carry; integer and key leaves run ahead of the floating ones.
      xs: inputs with leading time, or None.
      length: number of steps, needed if `xs` is None.
      reverse: run from the last step to the first.
      unroll: as for `lax.scan`; only sequential solves unroll.
      solver: `shooting()`, `newton()`, `quasi_newton()`, `jacobi()`, `fused()`,
        `sequential()`, or None for `auto()`.
      derivative: None for the general rule (forward and reverse mode, any order), or
        "reverse" for one fused reverse rule (first-order gradients only), the right choice
        for a training loop.

    Returns:
      `(carry, ys)` as `lax.scan`.

    Raises:
      TypeError, ValueError: what `lax.scan` raises; an unknown `derivative` or solver; a solver
        with `axis=` outside of a `shard_map` over that axis.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxpara as jp
      >>> def step(h, x):
      ...     h = jnp.tanh(0.5 * h + x)
      ...     return h, h
      >>> init, xs = jnp.zeros(4), jnp.sin(jnp.arange(2000.0).reshape(500, 4))
      >>> h, ys = jp.newton_scan(step, init, xs, solver=jp.shooting())
      >>> bool(jnp.allclose(ys, jax.lax.scan(step, init, xs)[1], rtol=1e-6, atol=1e-6))
      True
      >>> loss = lambda init: jnp.sum(jp.newton_scan(step, init, xs)[1] ** 2)
      >>> jax.grad(loss)(init).shape
      (4,)

    References: [deer], [pararnn], [shooting]
    """
    out, _ = solve_scan(f, init, xs, length, reverse, unroll, solver=solver, derivative=derivative)
    return out


@jax.named_scope("newton_scan")  # as profiles of a program show it
def solve_scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: PyTree,
    xs: PyTree = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    *,
    solver: Solver | Auto | None = None,
    derivative: str | None = None,
    guess: PyTree = None,
) -> tuple[tuple[PyTree, PyTree], SolveInfo]:
    """`newton_scan` with diagnostics and a warm start.

    Args:
      f, init, xs, length, reverse, unroll, solver, derivative: as for `newton_scan`.
      guess: `SolveInfo.starts` of an earlier call with the same solver and length. A
        wrong guess costs iterations and never changes values.

    Returns:
      `((carry, ys), info)`.

    Raises:
      TypeError, ValueError: as for `newton_scan`; a guess of the wrong shape.

    Examples:
      >>> import jax.numpy as jnp, jaxpara as jp
      >>> step = lambda h, x: (jnp.tanh(0.5 * h + x), h)
      >>> init, xs = jnp.zeros(4), jnp.sin(jnp.arange(2000.0).reshape(500, 4))
      >>> solve = lambda guess: jp.solve_scan(step, init, xs, solver=jp.shooting(), guess=guess)
      >>> _, info = solve(None)
      >>> bool(info.converged), int(info.fallback_steps)
      (True, 0)
      >>> _, warm = solve(info.starts)
      >>> int(warm.iterations) < int(info.iterations)
      True
    """
    given = init, xs
    for name, value in (("length", length), ("reverse", reverse), ("unroll", unroll)):
        if isinstance(value, Solver | Auto) or callable(value):
            shown = value if isinstance(value, Solver | Auto) else kind_of(value)
            raise TypeError(f"{name} got {shown}: write solver= before a solver")
    if isinstance(solver, Solver) and solver.settings.axis is not None:
        sharded_time.require_axis(solver.settings.axis)
        # Each device starts its own steps from a state of its own.
        init = vary_over(init, solver.settings.axis)
    traced = trace(f, init, xs, length, reverse, unroll)
    choice = decide(traced, solver, derivative)
    if choice.refused:
        say(choice)
    if choice.solver is None:
        carry, ys = lax.scan(f, init, xs, length, reverse, unroll)
        return (carry, ys), _sequential_info(init)
    if choice.solver.solve is not sequential and (alike := vary_alike((init, xs))) is not None:
        # A parallel solve stacks leaves, which then vary over the mesh axes of all: trace it so.
        traced = trace(f, alike[0], alike[1], length, reverse, unroll)
    problem = Problem(traced.body, choice, reverse, unroll)
    leaves = None if guess is None else jax.tree.leaves(guess)
    flat, info, starts = jaxpara_solve(problem, traced.consts, traced.init, traced.xs, leaves)
    flat = [
        compat.weakly_typed(leaf) if weak else leaf
        for leaf, weak in zip(traced.results(flat, *given), traced.out_weak, strict=True)
    ]
    out = jax.tree.unflatten(traced.out_tree, flat)
    return out, SolveInfo(*info, starts=_as_carry(traced, starts))


def _sequential_info(init) -> SolveInfo:
    def start(leaf):
        leaf = jnp.asarray(leaf)
        return leaf[None] if jnp.issubdtype(leaf.dtype, jnp.floating) else None

    zero = jnp.zeros((), jnp.int32)
    return SolveInfo(jnp.ones((), bool), zero, jnp.zeros(()), zero, jax.tree.map(start, init))


def _as_carry(traced: Traced, starts):
    rows: list[Any] = [None] * traced.body.carries
    for position, start in zip(traced.body.floats, starts, strict=True):
        rows[position] = start
    return traced.carry(rows)


@functools.partial(jax.jit, static_argnums=0)
def jaxpara_solve(problem: Problem, consts, init, xs, guess):
    """The solve on flat operands: `(carry and output leaves, diagnostics, starts)`.

    Jitted with the traced step as a static argument, so that a second eager call with
    the same `f` compiles nothing, and named so that a jaxpr search can pass over it.
    """
    body = problem.body
    inputs, outputs = explicit_meshes.avals_of(body.jaxpr)
    mesh = explicit_meshes.explicit_mesh(inputs)
    if mesh is None:
        return _solve(problem, consts, init, xs, guess)
    # Results have the shardings that `lax.scan` gives them; diagnostics are replicated.
    carry, ys = outputs[: body.carries], outputs[body.carries :]
    leaves = [explicit_meshes.sharding(mesh, c) for c in carry]
    leaves += [explicit_meshes.sharding(mesh, y, None) for y in ys]
    starts = [explicit_meshes.sharding(mesh, carry[i], None) for i in body.floats]
    shardings = (leaves, [NamedSharding(mesh, jax.P())] * 4, starts)
    run = explicit_meshes.in_auto_axes(functools.partial(_solve, problem), mesh, shardings)
    return run(consts, init, xs, guess)


def _solve(problem: Problem, consts, init, xs, guess):
    body, choice = problem.body, problem.choice
    axis = sharded_time.along(problem.settings.axis, problem.reverse)
    length = choice.length
    # With neither xs nor integer leaves the steps still need something to count.
    inputs = [*_run_ahead(problem, consts, init, xs), *xs]
    counted = inputs or [jnp.zeros((length, 0), jnp.float32)]
    if problem.reverse:
        counted = [x[::-1] for x in counted]
    floats = [init[i] for i in body.floats]
    aliased = tuple(sorted({alias for alias in body.aliases if alias is not None}))
    last, states, outputs, *info, starts = solve(problem, aliased, consts, floats, counted, guess)
    states = dict(zip(aliased, states, strict=True))
    if problem.settings.debug and choice.structure is not None:
        # At the state that the solve ended in, with the input of the last step.
        row = [x[-1] for x in counted]
        at = lax.stop_gradient(last)
        end = lambda s: problem.step(consts, s, row)[0]  # noqa: E731
        check_structure(choice.structure, end, at, jax.random.key(0))
    if axis is not None:
        last = axis.from_rank(last, axis.size - 1)
        info = axis.agree(info)
    carry: list[Any] = [None] * body.carries
    for position, leaf in zip(body.floats, last, strict=True):
        carry[position] = leaf
    if body.others:
        end = _last_others(problem, consts, init, inputs, xs)
        for position, leaf in zip(body.others, end, strict=True):
            carry[position] = leaf
    outputs = iter(outputs)
    ys = [next(outputs) if a is None else states[a] for a in body.aliases]
    if problem.reverse:
        ys = [y[::-1] for y in ys]
    return [*carry, *ys], list(info), starts


def _run_ahead(problem: Problem, consts, init, xs):
    """Integer and key leaves before each step, `[time, *leaf]`, run sequentially."""
    body = problem.body
    if not body.others:
        return []

    def step(others, x):
        carry = list(init)
        for position, leaf in zip(body.others, others, strict=True):
            carry[position] = leaf
        new, _ = body(consts, carry, x)
        return [new[i] for i in body.others], others

    others = [init[i] for i in body.others]
    return lax.scan(step, others, list(xs), problem.choice.length, problem.reverse)[1]


def _last_others(problem: Problem, consts, init, inputs, xs):
    """Integer and key leaves after the last step, from those before it."""
    body = problem.body
    row = 0 if problem.reverse else -1
    carry = list(init)
    for position, leaf in zip(body.others, inputs, strict=False):
        carry[position] = leaf[row]
    new, _ = body(consts, carry, [x[row] for x in xs])
    return [new[i] for i in body.others]


assert getattr(jaxpara_solve, "__name__") == SOLVE_NAME  # noqa: B009
