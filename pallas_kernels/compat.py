"""The one place that knows differences between Pallas versions."""

from typing import Any

import jax


def version() -> tuple[int, ...]:
    """The running JAX, as far as this package asks."""
    return tuple(int(part) for part in jax.__version__.split(".")[:2])


def mosaic_gpu() -> Any:
    """The module of Mosaic GPU.

    Imported when a kernel is built: on 0.10 it needs a package that JAX does not install, and has
    another calling convention.

    Raises:
      NotImplementedError: JAX is older than 0.11.
    """
    if version() < (0, 11):
        raise NotImplementedError(f"Mosaic GPU needs JAX >= 0.11; this is {jax.__version__}")
    from jax.experimental.pallas import mosaic_gpu as gpu

    return gpu
