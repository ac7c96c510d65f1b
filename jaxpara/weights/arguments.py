"""Checks of the arguments of a reparameterisation."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpara.arguments import kind_of
from jaxpara.weights.matrices import matrices_of
from jaxpara.weights.method import Method
from jaxpara.weights.weight import is_weight


def need_key(key: Any, given_to: str = "attach(key, params)") -> None:
    """Refuses a key that is no random key, such as the parameters in its place.

    Args:
      key: of `attach`, or another call.
      given_to: the call, with its arguments.

    Raises:
      TypeError: it is neither a typed key nor the bits of one (uint32), or there are several.
    """
    name, dtype = given_to.partition("(")[0], getattr(key, "dtype", None)
    if dtype is None or not (
        jnp.issubdtype(dtype, jax.dtypes.prng_key) or jnp.dtype(dtype) == jnp.uint32
    ):
        raise TypeError(
            f"{name} got a key of type {type(key).__name__}; expected {given_to}, with a "
            "key such as jax.random.key(0)"
        )
    if key.ndim != (0 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else 1):
        raise TypeError(f"{name} got keys of shape {key.shape}; expected one: give keys[0]")


def need_plain(selected: Iterable[str], paths: Iterable[str]) -> None:
    """Refuses leaves inside reparameterised ones, which no method would reach.

    Args:
      selected: paths that a method selects.
      paths: of the leaves of the state, where a reparameterised leaf is one.

    Raises:
      ValueError: a path is not among them.
    """
    inside = sorted(set(selected).difference(paths))
    if inside:
        raise ValueError(
            f"attach got {inside[0]!r}, a part of a leaf that is reparameterised already: attach "
            "jp.chain(first, second) to the parameters themselves, or narrow where="
        )


def need_own(own: Sequence[Method], state: Any) -> None:
    """Refuses a state all of whose weights are of other methods.

    A method over several leaves names their methods itself (`Method.share`), and anything passes.

    Args:
      own: a reparameterisation's methods.
      state: to be merged by it.

    Raises:
      ValueError: it has weights, and none is of these methods.
    """
    names, found = [method.name for method in own], []
    for leaf in jax.tree.leaves(state, is_leaf=is_weight):
        while is_weight(leaf):
            method = matrices_of(leaf)[0].method
            if method.init is not None or method.share is not None:  # what is merged has neither
                found.append(method.name)
            leaf = leaf.base
    if found and not {*names} & {*found} and all(method.share is None for method in own):
        raise ValueError(
            f"merge: the state is of {' and '.join(dict.fromkeys(found))}, not of "
            f"{' and '.join(names)}: give a state that this reparameterisation attached"
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
                f"chain got {kind_of(each)}; expected reparameterisations, such as "
                "jp.chain(jp.lora(rank=4), jp.fake_quant(bits=4)), each configured by a call"
            )
