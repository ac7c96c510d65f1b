"""When what keeps a window open is rounding inside its chunks, and more passes are for nothing."""

import jax.numpy as jnp

# Newton would have squared a residual below this; an LSTM's stays at 2e-6 to 8e-6, where an element
# passes zero at the ends of chunks and carries the rounding of what it was between them.
ROUNDED = 1e-5
FINEST = 8 * float(jnp.finfo(jnp.float32).eps)


def stall(tol: float) -> float:
    """Relative residual that, in two passes in a row, ends a window.

    Args:
      tol: at which one pass does; below eight units of float32 it is taken at its word.

    Returns:
      `tol` or what is larger.
    """
    return max(tol, ROUNDED) if tol >= FINEST else tol
