"""Weights that only take numbers of a format; the gradient passes straight through. [pychop]"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxpara.tree import Where
from jaxpara.weights.method import computed
from jaxpara.weights.quant.formats import BlockFormat, Format, checked, largest, round_to
from jaxpara.weights.quant.rounding import RANDOM, check_rounding
from jaxpara.weights.reparam import Reparam, reparam
from jaxpara.weights.sampling import by_layer, keys_of_layers
from jaxpara.weights.weight import shape_of


class _Settings(NamedTuple):
    number_format: Format
    rounding: str


def _effective(settings: _Settings, w, parts):
    f, still = settings.number_format, lax.stop_gradient(w)
    if "key" in parts:
        rounded = by_layer(functools.partial(_rounded, f, settings.rounding), parts["key"], still)
    else:
        even = settings.rounding in RANDOM
        rounded = _rounded(f, "nearest_even" if even else settings.rounding, None, still)
    if isinstance(f, BlockFormat):
        return rounded + (w - still)
    # A weight beyond the format has no way to make a difference.
    inside = jnp.abs(still) <= largest(f)
    return rounded + jnp.where(inside, w - still, 0)


def _rounded(f: Format, rounding: str, key, w):
    if not isinstance(f, BlockFormat):
        return round_to(w, f, rounding=rounding, key=key)
    # Blocks run along the contraction.
    turned = round_to(jnp.swapaxes(w, -1, -2), f, rounding=rounding, key=key)
    return jnp.swapaxes(turned, -1, -2)


def _sample(settings: _Settings, key, shape: tuple[int, ...], parts):
    return {**parts, "key": keys_of_layers(key, shape)}


def _init(settings: _Settings, key, base):
    checked(settings.number_format, shape_of(base).dtype)
    return base, {}


def _axes(settings: _Settings, ndim: int):
    return {"key": tuple(range(-ndim, -2))}


def _separable(settings: _Settings, ndim: int):
    every = frozenset(range(-ndim, 0))
    if settings.rounding in RANDOM:
        return every - {-2, -1}
    return every - {-2} if isinstance(settings.number_format, BlockFormat) else every


def number_format(
    number_format: str | Format,
    *,
    rounding: str = "nearest_even",
    where: Where = None,
) -> Reparam:
    """Trains a weight; the forward pass sees the nearest numbers of a format.

    Blocks run along the contraction axis -2. The derivative is that of the identity, and zero for
    weights beyond the format's largest number.

    Args:
      number_format: a name such as `"float8_e4m3fn"`, `"float6_e2m3fn"`, `"mxfp4"`, or a format.
      rounding: of `jp.weights.round_to`. The random ones draw where a call is given a key, see
        `t.sample`; without one, and in `merge`, the nearest number is taken.
      where: the leaves: a glob (`*` within a name, `**` across names), a compiled regular
        expression, or a function of (path, leaf); None: floating leaves of two or more axes.

    Returns:
      The reparameterisation; `merge` gives the rounded weights, in their own dtype.

    Raises:
      ValueError: an impossible format, an unknown mode; when attached: a format that
        a leaf's dtype does not hold.

    References: [pychop], [mx].
    """
    settings = _Settings(checked(number_format), rounding)
    check_rounding(rounding)
    method = computed(
        f"number_format({number_format})",
        settings,
        init=_init,
        effective=_effective,
        axes=_axes,
        separable=_separable,
        sample=_sample if rounding in RANDOM else None,
    )
    return reparam(method, where)
