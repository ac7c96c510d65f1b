"""Tests, by wing. `check` is how `make types` checks annotations while they run."""


def check(function):
    """Checks a function's arguments and results.

    An int will do where a float is wanted, and NumPy's array where JAX's is, as in JAX itself.
    """
    import jax
    import numpy as np
    from beartype import BeartypeConf, BeartypeHintOverrides, beartype  # not where only JAX is

    arrays = BeartypeHintOverrides({jax.Array: jax.Array | np.ndarray})
    return beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=arrays))(function)
