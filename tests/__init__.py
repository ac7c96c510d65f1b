"""Tests, by wing. `check` is how `make types` checks annotations while they run."""


def check(function):
    """Checks a function's arguments and results; an int will do where a float is wanted."""
    from beartype import BeartypeConf, beartype  # not there where only JAX is

    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)
