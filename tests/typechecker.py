"""How annotations are checked while tests run: see `make types`."""

from beartype import BeartypeConf, beartype

# An int is given where a float is wanted, as Python itself has it.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
