"""Kernels, one folder for each op, and the one place that picks an implementation.

Imports JAX, NumPy and the standard library only: a kernel receives a cell as ready elementwise
functions and walks no jaxpr.
"""

from pallas_kernels.dispatch import NoImplementation, choose, first_that_works, unfit

__all__ = ["NoImplementation", "choose", "first_that_works", "unfit"]
