"""When two passes in a row end a window that one would not (the GPU's are in test_kernels_gpu)."""

import jax
import numpy as np
import pytest
from kernel_cells import GRU, draw, step_error

from pallas_kernels.nonlinear_recurrence import rounding, tpu


@pytest.mark.parametrize(("tol", "found"), [(5e-7, 5e-7), (1e-6, 1e-5), (1e-3, 1e-3)])
def test_only_tolerances_from_eight_units_to_the_limit_are_widened(tol, found):
    assert rounding.stall(tol) == found


@pytest.mark.slow
def test_two_passes_in_a_row_near_the_limit_of_rounding_are_the_end(monkeypatch):
    operands = draw(GRU, 60, 2, 5, scale=4.0)

    def run(tol):
        @jax.jit
        def solved(o):
            how = {"tol": tol, "max_iters": 8, "affine": False, "chunks": 6, "window": 60}
            return tpu.forward(GRU.cell, o.init, o.xs, o.params, interpret=True, **how)

        return solved(operands)

    _, passes, _, walked = run(1e-6)
    assert np.all(walked == 0)
    # As if rounding could be blamed for anything below one: then a pass ends it that cannot.
    monkeypatch.setattr(rounding, "ROUNDED", 1.0)
    _, fewer, residual, walked = run(1e-6)
    assert np.all(fewer < passes) and np.all(walked == 0) and np.any(residual > 1e-5)
    # Whoever asks for less than eight units of float32 gets it.
    states, more, _, _ = run(5e-7)
    assert np.all(more >= passes)
    assert step_error(GRU, operands, states) < 1e-6
