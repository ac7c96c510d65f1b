"""A contest: every implementation of one recurrence, checked against `lax.scan`, then timed."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

import jaxpara as jp
from experiments.contest import rivals
from experiments.contest.recurrence_problem import (
    Problem,
    both_passes,
    floor_bytes,
    through,
)
from experiments.contest.timing import Timing, largest_error, measure, prepare, prepare_copy

REFERENCE = "lax.scan"


@dataclasses.dataclass(frozen=True)
class Row:
    """One implementation at one shape and pass; times are in milliseconds.

    Attributes:
      verdict: `ok`, or why the row has no times or no speed-up.
      floor_ms: the time of a copy of the bytes that must be moved, in the same rounds.
      times_floor: median over floor.
      speed_up: `lax.scan`'s median over this one's; None unless the verdict is `ok`.
      iterations: of the solver at this shape; None if there are none.
      value_error: largest absolute deviation of the outputs from `lax.scan`'s.
      gradient_error: the same for the gradients, over each leaf's largest entry.
    """

    time: int
    batch: int
    state: int
    which: str
    name: str
    verdict: str
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    rounds: int | None = None
    compile_s: float | None = None
    floor_ms: float | None = None
    times_floor: float | None = None
    speed_up: float | None = None
    iterations: int | None = None
    fallback_steps: int | None = None
    value_error: float | None = None
    gradient_error: float | None = None


def errors(got: Any, wanted: Any, which: str) -> tuple[float, float | None]:
    """Computes the errors of a result.

    Args:
      got: outputs, or outputs and gradients.
      wanted: the same of the reference.
      which: the pass.

    Returns:
      The absolute error of the outputs, and the relative error of the gradients (None in forward).
    """
    if which == "forward":
        return largest_error(got, wanted), None
    return (
        largest_error(got[0], wanted[0]),
        largest_error(got[1], wanted[1], relative=True),
    )


def judge(
    value_error: float, gradient_error: float | None, *, values_tol: float, gradients_tol: float
) -> str:
    """Judges a result: a wrong one gets no speed-up.

    Args:
      value_error: as from `errors`.
      gradient_error: likewise.
      values_tol: largest error of the outputs that passes.
      gradients_tol: largest error of the gradients that passes.

    Returns:
      `ok` or what is wrong.
    """
    if not value_error <= values_tol:  # also for a NaN
        return f"wrong values ({value_error:.0e})"
    if gradient_error is not None and not gradient_error <= gradients_tol:
        return f"wrong gradients ({gradient_error:.0e})"
    return "ok"


def ours(
    problem: Problem, which: str, solvers: Mapping[str, Mapping[str, Any]]
) -> dict[str, Callable[[], rivals.Rival]]:
    """Makes our solvers into rivals of `lax.scan`.

    Args:
      problem: the recurrence.
      which: the pass.
      solvers: name -> `solver` and `derivative` for `jp.newton_scan`.

    Returns:
      name -> a function that compiles it.
    """

    def build(solver, derivative):
        def scan(f, init, xs):
            return jp.newton_scan(f, init, xs, solver=solver, derivative=derivative)

        solve = both_passes(through(scan, problem.step))[which]
        return rivals.Rival(prepare(solve, *problem[1:]), lambda out: out)

    return {
        name: lambda o=options: build(o["solver"], o["derivative"])
        for name, options in solvers.items()
    }


def iterations(problem: Problem, solver: Any) -> tuple[int, int]:
    """Counts the iterations of a solver on a problem, and the steps of its fallback.

    Args:
      problem: the recurrence.
      solver: one of ours.

    Returns:
      Iterations and steps of the fallback.
    """

    def solve(params, init, gates):
        return jp.solve_scan(
            lambda carry, x: problem.step(params, carry, x), init, gates, solver=solver
        )[1]

    info = jax.jit(solve)(problem.params, problem.init, problem.gates)
    return int(info.iterations), int(info.fallback_steps)


def contest(
    problem: Problem,
    which: str,
    *,
    solvers: Mapping[str, Mapping[str, Any]],
    others: Sequence[str],
    rounds: int,
    budget_s: float,
    values_tol: float,
    gradients_tol: float,
    seed: int = 0,
) -> list[Row]:
    """Measures all rows of one shape and pass, `lax.scan` first.

    Args:
      problem: the recurrence.
      which: the pass.
      solvers: ours, as in `ours`.
      others: names in `rivals.RIVALS`.
      rounds: number of samples of each.
      budget_s: seconds of timing.
      values_tol: as in `judge`.
      gradients_tol: as in `judge`.
      seed: of the order of the rounds.

    Returns:
      One row for each name, in order.
    """
    shape = problem.cotangent.shape
    reference = both_passes(through(jax.lax.scan, problem.step))[which]
    builders: dict[str, Callable[[], rivals.Rival]] = {
        REFERENCE: lambda: rivals.Rival(prepare(reference, *problem[1:]), lambda out: out),
        **ours(problem, which, solvers),
        **{name: lambda n=name: rivals.RIVALS[n](problem, which) for name in others},
    }
    verdicts, deviations, calls, wanted = {}, {}, {}, None
    for name, build in builders.items():
        try:
            rival = build()
            got = rival.canonical(rival.prepared.call())
        except rivals.CannotRun as reason:
            verdicts[name] = str(reason)
            continue
        except Exception as error:  # one failing implementation must not end the table
            if name == REFERENCE:
                raise
            verdicts[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
            continue
        wanted = got if name == REFERENCE else wanted
        deviations[name] = errors(got, wanted, which)
        verdicts[name] = judge(
            *deviations[name], values_tol=values_tol, gradients_tol=gradients_tol
        )
        calls[name] = rival.prepared
    floor = prepare_copy(floor_bytes(problem, which))
    timings = measure({**calls, "": floor}, rounds=rounds, budget_s=budget_s, seed=seed)
    rows = []
    for name, verdict in verdicts.items():
        row = Row(*shape, which=which, name=name, verdict=verdict)
        if name in calls:
            row = _timed(row, timings[name], timings[REFERENCE], timings[""], deviations[name])
            if name in solvers:
                count = iterations(problem, solvers[name]["solver"])
                row = dataclasses.replace(row, iterations=count[0], fallback_steps=count[1])
        rows.append(row)
    return rows


def _timed(
    row: Row, own: Timing, reference: Timing, floor: Timing, deviation: tuple[float, float | None]
) -> Row:
    return dataclasses.replace(
        row,
        median_ms=own.median * 1e3,
        low_ms=own.low * 1e3,
        high_ms=own.high * 1e3,
        rounds=own.rounds,
        compile_s=own.compile_s,
        floor_ms=floor.median * 1e3,
        times_floor=own.median / floor.median,
        speed_up=reference.median / own.median if row.verdict == "ok" else None,
        value_error=deviation[0],
        gradient_error=deviation[1],
    )
