"""Checks of the arguments of a reparameterisation."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpara.types import Model


def need_key(key: Any) -> None:
    """Refuses a key that is no random key, such as the parameters in its place.

    Args:
      key: of `attach`.

    Raises:
      TypeError: it is neither a typed key nor the bits of one (uint32).
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (
        jnp.issubdtype(dtype, jax.dtypes.prng_key) or jnp.dtype(dtype) == jnp.uint32
    ):
        raise TypeError(
            f"attach got a key of type {type(key).__name__}; expected attach(key, params), with a "
            "key such as jax.random.key(0)"
        )


def need_model(model: Any) -> None:
    """Refuses a model that is no `Model`, such as a function.

    Args:
      model: the argument of a reparameterisation.

    Raises:
      TypeError: it is no `Model`.
    """
    if not isinstance(model, Model):
        raise TypeError(
            f"expected a jp.Model, got {model!r}; a function of parameters is lifted by "
            "jp.lift(function), and its parameters are given to attach(key, params)"
        )


def need_reparams(reparams: Sequence[Any], kind: type) -> None:
    """Refuses arguments of `chain` that are no reparameterisations, such as an uncalled method.

    Args:
      reparams: of `chain`.
      kind: what each must be.

    Raises:
      ValueError: no argument is given.
      TypeError: one is something else.
    """
    if not reparams:
        raise ValueError("chain() needs at least one reparameterisation")
    for each in reparams:
        if not isinstance(each, kind):
            raise TypeError(
                f"chain got {each!r}; expected reparameterisations, such as "
                "jp.chain(jp.lora(rank=4), jp.fake_quant(bits=4)), each configured by a call"
            )
