"""Weights that only take numbers of a format; the gradient passes straight through. [pychop]"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxpara.tree import Where
from jaxpara.weights.quant.formats import BlockFormat, Format, checked, largest, round_to
from jaxpara.weights.quant.rounding import RANDOM
from jaxpara.weights.reparam import Reparam, reparam
from jaxpara.weights.weight import Method


class _Settings(NamedTuple):
    number_format: Format
    rounding: str


def _effective(settings: _Settings, w, parts):
    f, rounding = settings
    still = lax.stop_gradient(w)
    if isinstance(f, BlockFormat):
        # Blocks run along the contraction.
        turned = round_to(jnp.swapaxes(still, -1, -2), f, rounding=rounding)
        return jnp.swapaxes(turned, -1, -2) + (w - still)
    # A weight beyond the format has no way to make a difference.
    inside = jnp.abs(still) <= largest(f)
    return round_to(still, f, rounding=rounding) + jnp.where(inside, w - still, 0)


def _init(settings: _Settings, key, base):
    return base, {}


def _axes(settings: _Settings, ndim: int):
    return {}


def _separable(settings: _Settings, ndim: int):
    every = frozenset(range(-ndim, 0))
    return every - {-2} if isinstance(settings.number_format, BlockFormat) else every


def number_format(
    number_format: str | Format,
    *,
    rounding: str = "nearest_even",
    where: Where = None,
) -> Reparam:
    """Trains a weight of which the forward pass sees the nearest number of a format.

    Blocks run along the contraction axis -2. The derivative is that of the identity, and zero for
    weights beyond the format's largest number.

    Args:
      number_format: a name such as `"float8_e4m3fn"`, `"float6_e2m3fn"`, `"mxfp4"`, or a format.
      rounding: of `jp.weights.round_to`, but not a random one: a weight must be the same at every
        look. Round with a key inside your own step for those.
      where: the leaves, see `jaxpara.tree.matcher`.

    Returns:
      The reparameterisation; `merge` gives the rounded weights, in their own dtype.

    Raises:
      ValueError: an impossible format, an unknown or a random mode.

    References: [pychop] [mx].
    """
    if rounding in RANDOM:
        raise ValueError(
            f"rounding={rounding!r} would be another weight at every look: use "
            "jp.weights.round_to(w, format, rounding=..., key=...) inside your own step"
        )
    settings = _Settings(checked(number_format), rounding)
    round_to(jnp.zeros((1, 1)), settings.number_format, rounding=rounding)  # an unknown mode, now
    method = Method(
        name=f"number_format({number_format})",
        settings=settings,
        init=_init,
        effective=_effective,
        factors=None,
        axes=_axes,
        separable=_separable,
        freezes=False,
    )
    return reparam(method, where)
