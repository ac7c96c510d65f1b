"""What a solver is given and what it returns.

A `System` is a recurrence in scan order over a list of floating leaves,
`s_t, y_t = step(s_{t-1}, x_t)`, with whatever it closes over already bound. The
forward solve and the adjoint are both systems, so every solver serves both.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxpara.recurrence.structure.jacobian_blocks import Groups
from jaxpara.recurrence.structure.proof import Structure

Leaves = Sequence[jax.Array]


class Settings(NamedTuple):
    """Configuration shared by the solvers; hashable, so equal solvers share compilations.

    Attributes:
      chunks: number of time chunks; None picks about the square root of the length.
      tol: largest accepted error of a state, as the next Newton correction bounds it, relative
        to the magnitude that the element has had lately, see `solve.certified`.
      max_iters: iterations before the rest is completed sequentially.
      linear: how pointwise solvers solve their linear recurrence, and how the
        adjoint is solved: "sequential", "associative", "chunked" or "kernel"; "auto" until the
        call is known, see `cost.linear_method`.
      axis: mesh axis over which time is sharded, inside `shard_map`.
      structure: overrides the proved structure of the Jacobian.
      debug: compare one random vjp of the step with the structure and raise.
      window: steps that a kernel solves together; None lets it choose.
      implementation: of the kernels, as for `pallas_kernels.nonlinear_recurrence.forward`;
        None is the kernel of the platform.
      limit: times and bytes of the sequential path that the solver may take, see `cost`.
    """

    chunks: int | None = None
    tol: float | None = None
    max_iters: int = 8
    linear: str = "chunked"
    axis: str | None = None
    structure: Any = None
    debug: bool = False
    window: int | None = None
    implementation: str | None = None
    limit: float | None = None


class System(NamedTuple):
    """One recurrence in scan order. See the module's docstring.

    Attributes:
      step: `(state, x_t) -> (state, y_t)`, all lists of leaves.
      push: `(state, x_t, tangents[K, *leaf]) -> (state, tangents)`: the step together
        with its Jacobian applied to `K` tangents.
      init: the state before the first step; replicated when time is sharded.
      xs: inputs with leading (local) time.
      length: number of (local) steps.
      groups: proved structure of the Jacobian.
      certain: the Jacobian is proved to be the derivative of the step, and the state is float32
        or wider: a correction bounds the error. Otherwise only bitwise agreement counts.
      kinks: that derivative may jump where a state moves a little, see `certified.beside`.
      reverse: scan order runs against time, that of a mesh axis and that in which kernels read.
      unroll: as for `lax.scan`; only a sequential solve unrolls.
    """

    step: Callable[[Leaves, Any], tuple[Leaves, Any]]
    push: Callable[[Leaves, Any, Leaves], tuple[Leaves, Leaves]]
    init: Leaves
    xs: Any
    length: int
    groups: Groups
    certain: bool = False
    kinks: bool = False
    reverse: bool = False
    unroll: int | bool = 1


class Solution(NamedTuple):
    """States after each step `[time, *leaf]`, outputs, and how they were found."""

    states: Leaves
    ys: Any
    converged: jax.Array
    iterations: jax.Array
    residual: jax.Array
    fallback_steps: jax.Array
    starts: Leaves


class Solver(NamedTuple):
    """A parallel solver: functions and their settings.

    Attributes:
      solve: `(System, Settings, guess) -> Solution`.
      settings: see `Settings`.
      kept: the same where nothing is differentiated, for a solver that then need not hold all
        states: `(System, leaves whose states are wanted) -> ((end, their states), outputs,
        diagnostics)`, the last as in `Solution`.
      gradients: the reverse rule by other means than the implicit adjoint, see
        `solve.fused.gradients`. It returns None where it cannot.
      cost: an estimate, see `solve.cost`; None for a solver that always runs.
    """

    solve: Callable[..., Solution]
    settings: Settings = Settings()
    kept: Callable[..., Any] | None = None
    gradients: Callable[..., Any] | None = None
    cost: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """Its name in `jp`; a user's own solver has the name of its function."""
        return getattr(self.solve, "__name__", repr(self.solve))

    def __repr__(self) -> str:
        own = zip(self.settings._asdict().items(), Settings(), strict=True)
        changed = ", ".join(f"{name}={value}" for (name, value), usual in own if value != usual)
        return f"Solver({self.name}{changed and f': {changed}'})"


class Choice(NamedTuple):
    """What will run, hashable.

    Attributes:
      solver: the solver, or None for plain `lax.scan` with JAX's own derivative.
      derivative: "general" or "reverse".
      structure: the structure of the Jacobian, proved or trusted.
      groups: the same, resolved for the shapes of the carry.
      certain: a Newton correction bounds the error of a state, see `true_derivative.certain`.
      kinks: the correction is taken on both sides of a state that rests on a kink, see
        `solve.certified.beside`.
      vjp_only: the step holds a `custom_vjp`.
      length: number of (local) steps.
      reason: one sentence for `explain_choice`.
      refused: whether the log says so: a solver that was asked for would take too much or has no
        kernel for the step, or JAX traced no scan.
      block: K, the size of the largest block of the Jacobian.
    """

    solver: Solver | None
    derivative: str
    structure: Structure | None
    groups: Groups
    certain: bool
    kinks: bool
    vjp_only: bool
    length: int
    reason: str
    refused: bool = False
    block: int = 1

    def __repr__(self) -> str:
        return f"Choice({self})"

    def __str__(self) -> str:
        if self.solver is None:
            return f"lax.scan with its own derivative: {self.reason}"
        how = self.solver.name
        jacobian = f"{type(self.structure).__name__} Jacobian"
        if self.block > 1:
            jacobian += f" in blocks of {self.block} x {self.block}"
        return f"{how}, implicit adjoint ({self.derivative}), {jacobian}: {self.reason}"
