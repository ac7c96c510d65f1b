"""Our solvers with all that they carry, and settings that nobody has set yet."""

from jaxpara.recurrence.solve import cost, fused, pointwise, sequential, shooting
from jaxpara.recurrence.system import Settings, Solver

SEQUENTIAL = Solver(sequential.sequential, Settings(linear="sequential"), kept=sequential.only_kept)
SHOOTING = Solver(shooting.shooting, cost=cost.of_shooting)
FUSED = Solver(
    fused.fused, Settings(linear="kernel"), gradients=fused.gradients, cost=cost.of_shooting
)
NEWTON = Solver(pointwise.newton, cost=cost.of_newton)
QUASI_NEWTON = Solver(pointwise.quasi_newton, cost=cost.of_quasi_newton)
JACOBI = Solver(pointwise.jacobi)
