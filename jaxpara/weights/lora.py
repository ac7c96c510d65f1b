"""LoRA: a frozen weight and a trained product of two thin ones, `W + (alpha / r) A B`. [lora]"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpara.sizes import finite, flag, needed
from jaxpara.tree import Where
from jaxpara.weights.factors import Factors, Term
from jaxpara.weights.method import additive
from jaxpara.weights.reparam import Reparam, reparam
from jaxpara.weights.weight import shape_of


class LowRank(NamedTuple):
    """Settings of methods with a product of two thin matrices.

    Attributes:
      rank: r.
      scale: s.
      window: the number of axes before the last two that belong to the matrix: A runs along them
        and B does not.
      dropout: the probability with which an input of A is left out.
    """

    rank: int
    scale: float
    window: int = 0
    dropout: float = 0.0


def low_rank(
    rank: int, alpha: float | None, rank_stabilised: bool = False, window: int = 0
) -> LowRank:
    """Settings from the arguments of a user.

    Args:
      rank, alpha, rank_stabilised, window: see `lora`.

    Returns:
      The settings.

    Raises:
      ValueError: the rank is not positive, the window is negative, or alpha is no number.
    """
    rank, window = needed(rank=rank), needed(window=window)
    rank_stabilised = flag(rank_stabilised=rank_stabilised)
    if rank < 1:
        raise ValueError(f"rank={rank}: give at least 1")
    if window < 0:
        raise ValueError(f"window={window}: give the number of window axes of a kernel, 0 or more")
    alpha = 2.0 * rank if alpha is None else finite(alpha=alpha)
    return LowRank(rank, float(alpha / (math.sqrt(rank) if rank_stabilised else rank)), window)


def lead_and_window(settings: LowRank, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of batches and those of the window."""
    return tuple(range(-ndim, -2 - settings.window)), tuple(range(-2 - settings.window, -2))


def _separable(settings: LowRank, ndim: int):
    # Not along the window: `settings.window` counts its axes.
    return frozenset({*lead_and_window(settings, ndim)[0], -2, -1})


def init(settings: LowRank, key, base):
    """A as PyTorch's kaiming with a = sqrt(5), which Hugging Face PEFT starts from too; B zero."""
    like = shape_of(base)
    if len(like.shape) < 2 + settings.window:
        raise ValueError(
            f"window={settings.window} needs leaves of at least {2 + settings.window} axes and one "
            f"has shape {like.shape}: narrow where=, or give window={len(like.shape) - 2}"
        )
    lead = like.shape[: len(like.shape) - 2 - settings.window]
    *inputs, columns = like.shape[len(lead) :]
    bound = math.prod(inputs) ** -0.5
    a = jax.random.uniform(key, (*lead, *inputs, settings.rank), like.dtype, -bound, bound)
    return base, {"a": a, "b": jnp.zeros((*lead, settings.rank, columns), like.dtype)}


def axes(settings: LowRank, ndim: int):
    """A[.., window, in, r] and B[.., r, out]."""
    lead, window = lead_and_window(settings, ndim)
    return {"a": (*lead, *window, -2, "rank"), "b": (*lead, "rank", -1)}


def factors(settings: LowRank, parts, shape: tuple[int, ...]):
    """`s A B`."""
    along = axes(settings, len(shape))
    return Factors(settings.scale, tuple(Term(parts[name], along[name]) for name in ("a", "b")))


def dropped(settings: LowRank, key, shape: tuple[int, ...], parts):
    """A without some of its inputs, the others larger by as much."""
    a, kept = parts["a"], 1 - settings.dropout
    mask = jax.random.bernoulli(key, kept, a.shape[:-1])[..., None]
    return {**parts, "a": jnp.where(mask, a / kept, 0).astype(a.dtype)}


def lora(
    *,
    rank: int = 8,
    alpha: float | None = None,
    rank_stabilised: bool = False,
    window: int = 0,
    dropout: float = 0.0,
    where: Where = None,
) -> Reparam:
    """Trains `A[.., in, r]` and `B[.., r, out]` in `W + s A B`; `W` is frozen.

    `B` starts at zero, so the function starts as it was. Leading axes of a leaf (layers,
    experts) have adapters of their own.

    Args:
      rank: r.
      alpha: `s = alpha / r`; None means `2 r`, so `s = 2` at any rank.
      rank_stabilised: `s = alpha / sqrt(r)` instead, which keeps the size of the update at large
        ranks [rslora].
      window: of a convolution: how many axes before the last two its window has, 2 for
        `[height, width, in, out]`. The window then belongs to A, `A[.., window, in, r]`, and a
        convolution with the weight is one with A and a matmul. 0 makes an adapter for each place.
      dropout: the probability with which a call with a key (see `t.sample`) leaves out an input
        of A. The others are scaled by `1 / (1 - dropout)`. All rows of a batch lose the same
        inputs, so a dropped adapter is still a weight. Each layer of a stack loses its own.
      where: the leaves: a glob (`*` within a name, `**` across names), a compiled regular
        expression, or a function of (path, leaf); None: floating leaves of two or more axes.

    Returns:
      The reparameterisation.

    Raises:
      ValueError: the rank is not positive, the window negative, or the dropout not in [0, 1); when
        attached: a leaf has fewer axes.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxpara as jp
      >>> params = {"in": jnp.ones((16, 32)), "out": jnp.ones((32, 4))}
      >>> network = lambda params, x: jnp.tanh(x @ params["in"]) @ params["out"]
      >>> t = jp.lora(rank=2, where="in")
      >>> state = t.attach(jax.random.key(0), params)
      >>> train, frozen = jp.split(state, t.trainable(state))
      >>> sum(leaf.size for leaf in jax.tree.leaves(train))  # (16 + 32) * 2
      96
      >>> jp.lift(network)(state, jnp.ones((3, 16))).shape
      (3, 4)

    References: [lora], [rslora].
    """
    dropout = finite(dropout=dropout)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: give a probability from 0 to below 1")
    settings = low_rank(rank, alpha, rank_stabilised, window)._replace(dropout=dropout)
    method = additive(
        f"lora(rank={settings.rank})",
        settings,
        init=init,
        factors=factors,
        axes=axes,
        separable=_separable,
        sample=dropped if dropout else None,
    )
    return reparam(method, where)
