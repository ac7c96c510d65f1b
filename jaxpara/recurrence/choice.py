"""Which solver runs a call, and why."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxpara import compat, jaxprs
from jaxpara.recurrence import rule
from jaxpara.recurrence.lanes import shaped
from jaxpara.recurrence.solve import cost, explicit_meshes, fused
from jaxpara.recurrence.solve.body import SOLVE_NAME, Body
from jaxpara.recurrence.solve.claimed_structure import require
from jaxpara.recurrence.solve.problem import Problem, system_of
from jaxpara.recurrence.solve.records import SEQUENTIAL, SHOOTING
from jaxpara.recurrence.structure import linear_rules
from jaxpara.recurrence.structure.jacobian_blocks import block_size, elements, is_number
from jaxpara.recurrence.structure.kinds import Dense
from jaxpara.recurrence.structure.proof import Structure, Unchecked, structure_of
from jaxpara.recurrence.structure.true_derivative import certain, kinked
from jaxpara.recurrence.system import Choice, Solver
from jaxpara.recurrence.traced_scan import Traced, need_order, trace
from pallas_kernels import unfit

DERIVATIVES = ("general", "reverse")


class Auto(NamedTuple):
    """Lets the fitted rule choose; see `jp.auto`.

    Attributes:
      platform: "cpu", "gpu" or "tpu" to choose for; None for the default backend.
    """

    platform: str | None = None


def explain_choice(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: PyTree,
    xs: PyTree = None,
    length: int | None = None,
    reverse: bool = False,
    *,
    solver: Solver | Auto | None = None,
    derivative: str | None = None,
) -> Choice:
    """Says what `newton_scan` would do with these arguments, and why; runs nothing.

    Args:
      f, length, reverse, solver, derivative: as for `newton_scan`.
      init, xs: likewise, or their shapes (`jax.ShapeDtypeStruct`).

    Returns:
      A `Choice`; printing it says what runs and why.

    Raises:
      TypeError, ValueError: as for `newton_scan`.
    """
    need_order(f, init, "explain_choice(step, init, xs)")
    found = []

    def look(init, xs):
        traced = trace(f, init, xs, length, reverse, 1)
        choice = decide(traced, solver, derivative)
        if isinstance(solver, Solver) and (why := _no_kernel(traced, choice, reverse)):
            # As `fused` does, which finds out while it runs.
            instead = SHOOTING._replace(settings=solver.settings)
            reason = f"fused was asked for, but no kernel runs: {why}"
            choice = choice._replace(solver=instead, reason=reason, refused=True)
        found.append(choice)

    jax.eval_shape(look, init, xs)
    return found[0]


def decide(traced: Traced, solver: Solver | Auto | None, derivative: str | None) -> Choice:
    """The choice for a traced call."""
    solver = Auto() if solver is None else solver
    if not isinstance(solver, Solver | Auto):
        raise TypeError(
            f"solver is {solver!r}; expected jp.shooting(), jp.newton(), jp.quasi_newton(), "
            "jp.jacobi(), jp.fused(), jp.sequential(), jp.auto() or None (mind the call: "
            "jp.shooting() with parentheses makes the solver)"
        )
    if derivative not in (None, *DERIVATIVES):
        raise ValueError(
            f"derivative is {derivative!r}; expected None (any order, forward and reverse mode) "
            'or "reverse" (one fused reverse rule)'
        )
    axis = None if isinstance(solver, Auto) else solver.settings.axis
    if traced.obstacle is not None:
        choice = _step_by_step(traced, axis, traced.obstacle)
        return choice._replace(refused=traced.body.jaxpr is None)
    if axis is not None and traced.body.others:
        raise ValueError(
            f"time is sharded over {axis!r}, but the carry has leaves that are not floating; "
            "pass counters and keys through xs instead"
        )
    body = traced.body
    positions = tuple(body.consts + i for i in body.floats)
    why = linear_rules.obstacle(body.jaxpr, positions, (SOLVE_NAME,))
    if why is not None:
        return _step_by_step(traced, axis, why)
    vjp_only = jaxprs.contains(body.jaxpr, "custom_vjp_call")
    if vjp_only and not _pulls_back(body):
        why = "the step holds a custom_vjp and passes its state through a loop of unknown length"
        return _step_by_step(traced, axis, why)
    given = None if isinstance(solver, Auto) else solver.settings.structure
    if given is None:
        structure = _structure(body.jaxpr, positions, body.floats)
    elif isinstance(given, Unchecked):
        structure = given.structure
    else:
        structure = given
        _require(given, body.jaxpr, positions, body.floats)
    avals = [compat.open_jaxpr(body.jaxpr).invars[p].aval for p in positions]
    shapes = [tuple(a.shape) for a in avals]
    groups = structure.resolve(shapes)
    trusted = isinstance(given, Unchecked)
    sure = not (vjp_only or trusted) and certain(body.jaxpr, positions, body.floats)
    kinks = sure and kinked(body.jaxpr, positions, body.floats)
    sizes = [block_size(group, shapes) for group in groups]
    if not all(map(is_number, sizes)):
        symbolic = next(size for size in sizes if not is_number(size))
        why = f"the step couples {symbolic} entries, a symbolic number that no plan can hold"
        return _step_by_step(traced, axis, why)
    size, too_dear = max(sizes), None
    mode = derivative or "general"
    if vjp_only and mode == "general":
        # As lax.scan: what holds a custom_vjp has no forward-mode derivative.
        mode = "reverse"
    if isinstance(solver, Solver):
        solver, too_dear = _within_limits(solver, traced, positions, size, shapes)
        reason = too_dear or "asked for"
    else:
        platform = solver.platform or jax.default_backend()
        numbers = sum(map(elements, shapes))
        # On a CPU there is no kernel to ask for; of another platform's devices nothing is known.
        why_not = ""
        if platform != "cpu":
            why_not = explicit_meshes.no_kernel(body.jaxpr) or _refusal(body)
        if why_not is None and platform == jax.default_backend():
            why_not = unfit(platform)
        solver, reason = rule.pick(
            platform,
            steps=traced.length,
            elements=numbers,
            block=size,
            inputs=_width_of_inputs(body, shapes),
            kernel=why_not is None,
        )
        reason += f"; no kernel: {why_not}" if why_not else ""
    return Choice(
        solver,
        mode,
        structure,
        groups,
        sure,
        kinks,
        vjp_only,
        traced.length,
        reason,
        refused=too_dear is not None,
        block=size,
    )


@functools.cache
def say(choice: Choice) -> None:
    """Logs once that another solver runs than the one asked for."""
    logging.getLogger("jaxpara").warning("%s", choice)


def _within_limits(solver: Solver, traced: Traced, positions, size, shapes):
    """`(solver, None)`, its `linear` chosen; or the sequential path and what speaks for it."""
    platform = jax.default_backend()
    settings = solver.settings
    if settings.linear == "auto":
        linear = "chunked" if settings.axis is not None else cost.linear_method(platform, size)
        solver = solver._replace(settings=settings._replace(linear=linear))
    too_dear = cost.refusal(
        solver, traced.body.jaxpr, positions, platform=platform, steps=traced.length, block=size
    )
    if too_dear is None:
        return solver, None
    numbers = sum(map(elements, shapes))
    instead, _ = rule.pick(
        platform,
        steps=traced.length,
        elements=numbers,
        block=size,
        inputs=_width_of_inputs(traced.body, shapes),
    )
    if instead is None and not settings.debug:
        return None, too_dear
    own = SEQUENTIAL.settings._replace(structure=settings.structure, debug=settings.debug)
    return SEQUENTIAL._replace(settings=own), too_dear


def _width_of_inputs(body: Body, shapes: Sequence[Sequence[Any]]) -> float:
    """Width of the widest input, in widths of the widest leaf of the carry; at least 1."""
    inputs = compat.open_jaxpr(body.jaxpr).invars[body.consts + body.carries :]
    widest = max((elements(var.aval.shape) for var in inputs), default=1)
    return max(1, widest / max(1, *map(elements, shapes)))


def _step_by_step(traced: Traced, axis: str | None, why: str) -> Choice:
    if axis is not None:
        raise ValueError(
            f"time is sharded over {axis!r}, but this step can only run sequentially: {why}; "
            "gather the sequence first"
        )
    return Choice(None, "general", None, (), False, False, False, traced.length, why)


def _no_kernel(traced: Traced, choice: Choice, reverse: bool) -> str | None:
    """Why a choice of `fused` gives way to `shooting`, or None."""
    if choice.solver is None or choice.solver.solve is not fused.fused:
        return None
    body, settings = traced.body, choice.solver.settings
    if explicit_meshes.explicit_mesh(explicit_meshes.avals_of(body.jaxpr)[0]) is not None:
        return explicit_meshes.no_kernel(body.jaxpr) or _refusal(body)
    state = [traced.init[i] for i in body.floats]
    others = [traced.init[i] for i in body.others]
    ahead = [jnp.broadcast_to(leaf, (traced.length, *leaf.shape)) for leaf in others]
    rows = [*ahead, *traced.xs] or [jnp.zeros((traced.length, 0), jnp.float32)]
    problem = Problem(body, choice, reverse, 1)
    return fused.obstacle(system_of(problem, traced.consts, state, rows), settings)


@functools.lru_cache(maxsize=512)
def _refusal(body: Body) -> str | None:
    """Why no kernel takes a step, or None if one does."""
    avals = [var.aval for var in compat.open_jaxpr(body.jaxpr).invars]
    consts, carry = avals[: body.consts], avals[body.consts : body.consts + body.carries]
    inputs = [carry[i] for i in body.others] + avals[body.consts + body.carries :]
    rows = [shaped(aval, (1, *aval.shape), aval.dtype) for aval in inputs]
    fixed, state = (
        [shaped(aval, aval.shape, aval.dtype) for aval in avals]
        for avals in (consts, [carry[i] for i in body.floats])
    )
    return fused.refusal(body.on_floats, fixed, state, rows)


@functools.lru_cache(maxsize=512)
def _pulls_back(body: Body) -> bool:
    """Whether JAX differentiates a step by its state in reverse; a `while` it does not."""
    if not jaxprs.contains(body.jaxpr, "while"):
        return True
    avals = [var.aval for var in compat.open_jaxpr(body.jaxpr).invars]
    consts, carry = avals[: body.consts], avals[body.consts : body.consts + body.carries]
    inputs = [carry[i] for i in body.others] + avals[body.consts + body.carries :]

    def pulled(consts, state, x):
        new, pull = jax.vjp(lambda s: list(body.on_floats(consts, s, x)[0]), state)
        return pull(new)

    shapes = [
        [shaped(aval, aval.shape, aval.dtype) for aval in avals]
        for avals in (consts, [carry[i] for i in body.floats], inputs)
    ]
    try:
        jax.eval_shape(pulled, *shapes)
    except ValueError:
        return False
    return True


@functools.lru_cache(maxsize=512)
def _structure(jaxpr: Any, carry_in: tuple[int, ...], carry_out: tuple[int, ...]) -> Structure:
    try:
        return structure_of(jaxpr, carry_in, carry_out)
    except jax.errors.InconclusiveDimensionOperation:
        return Dense()  # a symbolic size that the proof would have to compare with another


@functools.lru_cache(maxsize=512)
def _require(
    given: Structure, jaxpr: Any, carry_in: tuple[int, ...], carry_out: tuple[int, ...]
) -> None:
    require(given, jaxpr, carry_in, carry_out)
