"""What a solver takes compared with the sequential path, estimated before anything compiles.

A parallel solver pushes K tangents through every step, where K is the size of a block. This is
little for the small blocks that it is made for. For a large dense block it is K times the work and
the memory of `lax.scan`. A solver that was asked for by name therefore runs only within the bounds
of this file. Beyond them the call runs step by step, unless the solver's own `limit` says
otherwise.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpara import compat, jaxprs
from jaxpara.recurrence.solve.linear_recurrences import MATERIALISED
from jaxpara.recurrence.solve.shooting import plan
from jaxpara.recurrence.system import Settings, Solver
from pallas_kernels import linear_recurrence

# Beyond this multiple of the sequential path's time or bytes a solver does not run.
LIMIT = 4.0
# What takes no more seconds and bytes than this runs in any case.
SECONDS, BYTES = 10e-3, 2**30
# Blocks up to this size are what parallel solvers are for, and run in any case.
SMALL_BLOCK = 8

# Iterations on a mild cell; what one of them costs decides, not how many there are.
_OF_SHOOTING, _OF_NEWTON, _OF_QUASI_NEWTON = 3, 5, 6
# Of Newton's, that follow those of quasi-Newton.
_CLOSING = 3


class Machine(NamedTuple):
    """The speeds that a time is estimated from: orders of magnitude, the CPU's measured.

    Attributes:
      launch: seconds of one step of a loop without the arithmetic.
      alone: operations a second of a step by itself, a product of a matrix and a few vectors.
      together: operations a second of many steps or tangents side by side.
    """

    launch: float
    alone: float
    together: float


MACHINES = {
    "cpu": Machine(1.5e-7, 2e10, 5e10),
    "gpu": Machine(1e-5, 1e12, 1e13),
    "tpu": Machine(3e-6, 1e13, 1e14),
}


class Work(NamedTuple):
    """One step, counted in its jaxpr.

    Attributes:
      whole: operations.
      moved: those that depend on the carry, which every tangent repeats.
      largest: elements of the largest value that depends on the carry.
    """

    whole: float
    moved: float
    largest: float


class Cost(NamedTuple):
    """Seconds and bytes of a forward solve, estimated."""

    seconds: float
    bytes: float


def linear_method(platform: str, block: int) -> str:
    """The best method for the linear recurrence of a pointwise solver, and its adjoint.

    On a CPU no parallel form beat `lax.scan` by more than noise, at T 256 and 2048, D 8 and 64,
    B 1 and 4. `python -m experiments.bench suite=pointwise` compares it with the methods of the
    literature over a larger grid. For an accelerator, where a step costs a launch,
    this is a guess: a kernel for the blocks that one takes, the associative scan where the
    Jacobians are materialised, else `lax.scan`.

    Args:
      platform: "cpu", "gpu" or "tpu".
      block: the largest block of the Jacobian.

    Returns:
      One of `linear_recurrences.METHODS`.
    """
    if platform == "cpu":
        return "sequential"
    if block <= linear_recurrence.LARGEST:
        return "kernel"
    return "associative" if block <= MATERIALISED["associative"] else "sequential"


def count(jaxpr: Any, moving: Sequence[bool]) -> Work:
    """Operations of a jaxpr: two for each multiply-add, one for each other element computed.

    Args:
      jaxpr: open or closed.
      moving: for each of its inputs whether it is part of the carry.

    Returns:
      The work of one evaluation.
    """
    return _count(compat.open_jaxpr(jaxpr), moving)[0]


def _count(jaxpr: Any, moving: Sequence[bool]) -> tuple[Work, list[bool]]:
    touched = {var for var, moves in zip(jaxpr.invars, moving, strict=True) if moves}

    def moves(atom):
        return not hasattr(atom, "val") and atom in touched

    total = Work(0.0, 0.0, 0.0)
    for eqn in jaxpr.eqns:
        into = [moves(atom) for atom in eqn.invars]
        inner = [compat.open_jaxpr(sub) for sub in jaxprs.subjaxprs(eqn)]
        if inner:
            works = []
            for sub in inner:
                same = len(sub.invars) == len(into)
                works.append(_count(sub, into if same else [any(into)] * len(sub.invars))[0])
            times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
            # Of the branches of a `cond`, the dearest.
            work = Work(*(max(column) for column in zip(*works, strict=True)))
            work = Work(times * work.whole, times * work.moved, work.largest)
        else:
            size = float(sum(math.prod(var.aval.shape) for var in eqn.outvars))
            operations = size * _each(eqn)
            work = Work(operations, operations, size)
        touched |= set(eqn.outvars) if any(into) else set()
        total = Work(
            total.whole + work.whole,
            total.moved + (work.moved if any(into) else 0.0),
            max(total.largest, work.largest if any(into) else 0.0),
        )
    return total, [moves(atom) for atom in jaxpr.outvars]


def _each(eqn: Any) -> float:
    """Operations for one element that an equation computes."""
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    if eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        outputs = eqn.params["dimension_numbers"].rhs_spec[0]
        return 2.0 * math.prod(kernel) / kernel[outputs]
    return 1.0


class Sizes(NamedTuple):
    """The sizes of a call, and the machine that it runs on.

    Attributes:
      steps: length of the recurrence.
      elements: floating elements of the carry.
      block: K.
      itemsize: bytes of an element.
      machine: the speeds that a time is estimated from.
    """

    steps: int
    elements: int
    block: int
    itemsize: int
    machine: Machine

    def side_by_side(self, work: Work) -> float:
        """Seconds of all steps at once."""
        return self.steps * work.whole / self.machine.together

    def pushed(self, work: Work) -> float:
        """Seconds of K tangents through all steps at once."""
        return self.block * self.steps * work.moved / self.machine.together

    def column(self, work: Work) -> float:
        """Elements of one tangent in one step: old, new, and what comes between."""
        return 3.0 * self.elements + 2.0 * work.largest


def stepwise(work: Work, sizes: Sizes) -> Cost:
    """The cost of the sequential path: one step after another, every state stored."""
    seconds = sizes.steps * (sizes.machine.launch + work.whole / sizes.machine.alone)
    return Cost(seconds, sizes.itemsize * (sizes.steps * sizes.elements + work.largest))


def of_shooting(settings: Settings, work: Work, sizes: Sizes) -> Cost:
    """The cost of multiple shooting, on a mild cell.

    Args:
      settings: of the solver, `linear` chosen.
      work: of one step.
      sizes: of the call.

    Returns:
      The cost.
    """
    chunks, length = plan(sizes.steps, settings.chunks)
    apart = (length + chunks) * sizes.machine.launch
    once = sizes.side_by_side(work)
    seconds = _OF_SHOOTING * (once + sizes.pushed(work) + apart) + once
    return Cost(seconds, sizes.itemsize * chunks * sizes.block * sizes.column(work))


def of_newton(settings: Settings, work: Work, sizes: Sizes) -> Cost:
    """The cost of pointwise Newton; arguments and result as for `of_shooting`."""
    newton = _newton_iteration(settings.linear, work, sizes)
    return Cost(_OF_NEWTON * newton.seconds, newton.bytes)


def of_quasi_newton(settings: Settings, work: Work, sizes: Sizes) -> Cost:
    """The cost of quasi-Newton; arguments and result as for `of_shooting`."""
    newton = _newton_iteration(settings.linear, work, sizes)
    after = sizes.steps * sizes.machine.launch if settings.linear == "sequential" else 0.0
    once = sizes.side_by_side(work) + sizes.pushed(work) + after
    held = sizes.itemsize * sizes.steps * sizes.block * sizes.column(work)
    return Cost(_OF_QUASI_NEWTON * once + _CLOSING * newton.seconds, max(held, newton.bytes))


def _newton_iteration(linear: str, work: Work, sizes: Sizes) -> Cost:
    steps, elements, block, itemsize, machine = sizes
    side_by_side, pushed = sizes.side_by_side(work), sizes.pushed(work)
    column = sizes.column(work)
    if block > MATERIALISED[linear]:  # the step's own tangents, one a step or K a chunk
        if linear == "sequential":
            after = steps * (machine.launch + 2 * work.moved / machine.alone)
            return Cost(2 * side_by_side + after, itemsize * steps * column)
        chunks = plan(steps, None)[0]
        seconds = side_by_side + 2 * pushed + 2 * steps / chunks * machine.launch
        return Cost(seconds, itemsize * (chunks * block * column + steps * elements))
    products = 2.0 * 2 * steps * elements * block**2 / machine.together
    after = {"sequential": steps * machine.launch, "associative": products}.get(linear, products)
    return Cost(side_by_side + pushed + after, 2 * itemsize * steps * block * column)


def refusal(
    solver: Solver,
    jaxpr: Any,
    carry: Sequence[int],
    *,
    platform: str,
    steps: int,
    block: int,
) -> str | None:
    """Why a solver is not worth running, in words and numbers, or None.

    Args:
      solver: one of ours, its `linear` chosen.
      jaxpr: of the step.
      carry: positions of the floating leaves of the carry among its inputs.
      platform: "cpu", "gpu" or "tpu".
      steps: length of the recurrence.
      block: the largest block of the Jacobian.

    Returns:
      A sentence, with the numbers, the limits and what overrides them.
    """
    settings: Settings = solver.settings
    limit = LIMIT if settings.limit is None else settings.limit
    # A sequence that is cut over devices has no sequential path to go back to.
    if settings.axis is not None or limit == math.inf or solver.cost is None:
        return None
    invars = compat.open_jaxpr(jaxpr).invars
    avals = [invars[position].aval for position in carry]
    sizes = (steps, *(n for var in invars for n in var.aval.shape))
    if not all(isinstance(n, int) for n in sizes) or block <= SMALL_BLOCK:
        return None  # of symbolic sizes nothing can be estimated
    elements = sum(math.prod(aval.shape) for aval in avals)
    itemsize = max(np.dtype(aval.dtype).itemsize for aval in avals)
    work = count(jaxpr, [position in set(carry) for position in range(len(invars))])
    machine = MACHINES.get(platform, MACHINES["gpu"])
    call = Sizes(steps, elements, block, itemsize, machine)
    own, base = solver.cost(settings, work, call), stepwise(work, call)
    allowed = Cost(max(SECONDS, limit * base.seconds), max(BYTES, limit * base.bytes))
    if own.seconds <= allowed.seconds and own.bytes <= allowed.bytes:
        return None
    return (
        f"{solver.name} was asked for, but with blocks of {block} x {block} it would take "
        f"about {own.seconds / base.seconds:.3g} times the time of lax.scan and "
        f"{own.bytes / 1e9:.2g} GB; the limits are {allowed.seconds / base.seconds:.3g} times and "
        f"{allowed.bytes / 1e9:.2g} GB (limit=math.inf on the solver runs it all the same)"
    )
