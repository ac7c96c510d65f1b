"""Tests, by wing. `check` is how `make types` checks annotations while they run."""


def check(function):
    """Checks a function's arguments and results.

    As in JAX, an int will do where a float is wanted, NumPy's integers where Python's are, and
    its arrays where JAX's are.
    """
    import jax
    import numpy as np
    from beartype import BeartypeConf, BeartypeHintOverrides, beartype  # not where only JAX is

    wider = {jax.Array: jax.Array | np.ndarray, int: int | np.integer, float: float | int}
    return beartype(conf=BeartypeConf(hint_overrides=BeartypeHintOverrides(wider)))(function)
