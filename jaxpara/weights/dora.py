"""DoRA: a weight as magnitudes of its columns times their directions, `m V / |V|`. [dora]"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara.tree import Where
from jaxpara.weights import lora
from jaxpara.weights.factors import Term, product
from jaxpara.weights.lora import LowRank, lead_and_window, low_rank
from jaxpara.weights.method import additive
from jaxpara.weights.precision import norm, unfused, wide
from jaxpara.weights.reparam import Reparam, reparam
from jaxpara.weights.weight import dense


def _sizes(settings: LowRank, v: jax.Array) -> jax.Array:
    """Norms of the columns, over the axes of the inputs."""
    axes = (*lead_and_window(settings, v.ndim)[1], -2)
    return jnp.squeeze(norm(wide(v), axes), axes)


def _init(settings: LowRank, key, base):
    base, parts = lora.init(settings, key, base)
    return base, {**parts, "magnitude": _sizes(settings, jnp.asarray(dense(base)))}


def _axes(settings: LowRank, ndim: int):
    lead = lead_and_window(settings, ndim)[0]
    return {**lora.axes(settings, ndim), "magnitude": (*lead, -1)}


def _scaling(settings: LowRank, base, parts):
    """`m / |V|`, the norm a constant of the derivative."""
    factors = lora.factors(settings, parts, base.shape)
    added = unfused(product(factors, tuple(range(-base.ndim, 0))))
    sizes = lax.stop_gradient(_sizes(settings, wide(base) + added))
    # A column of zeros has no direction; it stays zero, as its magnitude was at the start.
    share = wide(parts["magnitude"]) / jnp.where(sizes > 0, sizes, 1)
    return Term(share, _axes(settings, base.ndim)["magnitude"])


def _separable(settings: LowRank, ndim: int):
    return frozenset({*lead_and_window(settings, ndim)[0], -1})


def dora(
    *, rank: int = 8, alpha: float | None = None, window: int = 0, where: Where = None
) -> Reparam:
    """Trains the magnitudes and, by a low-rank update, the directions of the columns.

    `W' = m V / |V|` with `V = W + s A B` and the norm over the inputs of each output; `m` starts
    as `|W|` and `B` at zero, so the function does not change at the start. The norm is recomputed
    at each step and held constant in the derivative, as in section 4.3 of the paper: gradients of
    A and B are those of LoRA times `m / |V|`.

    Args:
      rank: of the update.
      alpha: `s = alpha / rank`; None means `2 rank`, so `s = 2`.
      window: of a convolution, see `lora`; the norm is then over the window too.
      where: the leaves: a glob (`*` within a name, `**` across names), a compiled regular
        expression, or a function of (path, leaf); None: floating leaves of two or more axes.

    Returns:
      The reparameterisation.

    Raises:
      ValueError: as for `lora`.

    References: [dora].
    """
    settings = low_rank(rank, alpha, window=window)
    method = additive(
        f"dora(rank={settings.rank})",
        settings,
        init=_init,
        factors=lora.factors,
        axes=_axes,
        separable=_separable,
        scaling=_scaling,
    )
    return reparam(method, where)
