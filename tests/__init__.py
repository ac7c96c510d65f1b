"""Tests, by wing. `check` is how `make types` checks annotations while they run."""

import functools


@functools.cache
def _conf():
    import jax
    import numpy as np
    from beartype import BeartypeConf, BeartypeHintOverrides  # not there where only JAX is
    from jax import export

    # As in JAX: an int will do where a float is wanted, NumPy's integers and the symbols of
    # `jax.export` where Python's are, and NumPy's arrays where JAX's are.
    symbol = type(export.symbolic_shape("n")[0])
    wider = {jax.Array: jax.Array | np.ndarray, int: int | np.integer | symbol, float: float | int}
    return BeartypeConf(hint_overrides=BeartypeHintOverrides(wider))


def check(function):
    """Checks a function's arguments and results."""
    from beartype import beartype

    return beartype(conf=_conf())(function)
