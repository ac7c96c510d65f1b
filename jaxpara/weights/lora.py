"""LoRA: a frozen weight and a trained product of two thin ones, `W + (alpha / r) A B`. [lora]"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpara.tree import Where
from jaxpara.weights.reparam import Reparam, reparam
from jaxpara.weights.weight import Factors, Method, shape_of


class _Settings(NamedTuple):
    rank: int
    scale: float


def _init(settings: _Settings, key, base):
    like = shape_of(base)
    *lead, rows, columns = like.shape
    # Uniform as PyTorch's kaiming with a = sqrt(5), which Hugging Face PEFT starts from too.
    bound = rows**-0.5
    a = jax.random.uniform(key, (*lead, rows, settings.rank), like.dtype, -bound, bound)
    return base, {"a": a, "b": jnp.zeros((*lead, settings.rank, columns), like.dtype)}


def _axes(settings: _Settings, ndim: int):
    lead = tuple(range(-ndim, -2))
    return {"a": (*lead, -2, "rank"), "b": (*lead, "rank", -1)}


def _factors(settings: _Settings, parts, ndim: int):
    axes = _axes(settings, ndim)
    return Factors(settings.scale, tuple((parts[name], axes[name]) for name in ("a", "b")))


def _all(settings: _Settings, ndim: int):
    return frozenset(range(-ndim, 0))


def lora(
    *,
    rank: int = 8,
    alpha: float | None = None,
    rank_stabilised: bool = False,
    where: Where = None,
) -> Reparam:
    """Trains `A[.., in, r]` and `B[.., r, out]` in `W + s A B` and leaves `W` as it is.

    `B` starts at zero, so the function starts as it was. Leading axes of a leaf (layers,
    experts) have adapters of their own.

    Args:
      rank: r.
      alpha: `s = alpha / r`; None means `2 r`, so `s = 2` at any rank.
      rank_stabilised: `s = alpha / sqrt(r)` instead, which keeps the size of the update at large
        ranks [rslora].
      where: the leaves, see `jaxpara.tree.matcher`.

    Returns:
      The reparameterisation.

    Raises:
      ValueError: the rank is not positive.

    References: [lora], [rslora].
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: give at least 1")
    alpha = 2.0 * rank if alpha is None else alpha
    scale = alpha / (math.sqrt(rank) if rank_stabilised else rank)
    method = Method(
        name=f"lora(rank={rank})",
        settings=_Settings(rank, float(scale)),
        init=_init,
        effective=None,
        factors=_factors,
        axes=_axes,
        separable=_all,
        freezes=True,
    )
    return reparam(method, where)
