"""Solvers that stop at their budget and leave the solve unfinished: for studies, not training.

The library's solvers complete an unfinished solve sequentially, so values and gradients are those
of `lax.scan`. These do not: the states are those of the last iterate, and the adjoint is taken at
them. Other libraries do this silently; here it is a named choice.
"""

import jax.numpy as jnp

from jaxpara.recurrence.solve import pointwise, shooting
from jaxpara.recurrence.system import Settings, Solution, Solver, System


def unfinished_newton(*, max_iters: int, tol: float | None = None) -> Solver:
    """Pointwise Newton with at most `max_iters - 1` corrections.

    Args:
      max_iters: evaluations of all steps; the last one corrects nothing more.
      tol: relative size of the next correction at which it stops earlier; None: 80 ulp.

    Returns:
      A solver for `newton_scan`.

    Raises:
      ValueError: a budget below 1.
    """
    return Solver(_newton, _settings(max_iters, tol))


def unfinished_shooting(
    *, max_iters: int, tol: float | None = None, chunks: int | None = None
) -> Solver:
    """Multiple shooting with at most `max_iters - 1` corrections of the chunk starts.

    Args:
      max_iters, tol: as for `unfinished_newton`.
      chunks: of time; the solve is exact after this number of evaluations.

    Returns:
      A solver for `newton_scan`.

    Raises:
      ValueError: a budget below 1.
    """
    return Solver(_shooting, _settings(max_iters, tol)._replace(chunks=chunks))


def _settings(max_iters: int, tol: float | None) -> Settings:
    if max_iters < 1:
        raise ValueError(f"max_iters={max_iters}: give at least 1")
    return Settings(max_iters=max_iters, tol=tol)


def _leave_open(system: System, rows, *rest):
    del system, rest
    return rows, jnp.zeros((), jnp.int32)


def _newton(system: System, settings: Settings, guess=None) -> Solution:
    return pointwise.newton(system, settings, guess, finish=_leave_open)


def _shooting(system: System, settings: Settings, guess=None) -> Solution:
    return shooting.shooting(system, settings, guess, finish=_leave_open)
