"""PaCA: some rows of a weight are trained, the others are frozen. [paca]

    W' = W + s S D,  S[rows[k], k] = 1

The gradient of D needs only the inputs that D multiplies, `x[.., rows]`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpara.sizes import finite, needed
from jaxpara.tree import Where
from jaxpara.weights.factors import Factors, Pick, Term
from jaxpara.weights.method import additive
from jaxpara.weights.precision import narrowed, unfused, wide
from jaxpara.weights.reparam import Reparam, reparam
from jaxpara.weights.weight import shape_of


class _Settings(NamedTuple):
    rank: int
    scale: float


def _init(settings: _Settings, key, base):
    like, rank = shape_of(base), settings.rank
    *lead, rows, columns = like.shape
    if rank > rows:
        raise ValueError(f"rank={rank} rows of a leaf of shape {like.shape}: give {rows} at most")

    def choose(key):
        return jnp.sort(jax.random.permutation(key, rows)[:rank]).astype(jnp.int32)

    chosen = jax.vmap(choose)(jax.random.split(key, math.prod(lead)))
    update = jnp.zeros((*lead, rank, columns), like.dtype)
    return base, {"rows": chosen.reshape(*lead, rank), "update": update}


def _axes(settings: _Settings, ndim: int):
    lead = tuple(range(-ndim, -2))
    return {"rows": (*lead, "row"), "update": (*lead, "row", -1)}


def _factors(settings: _Settings, parts, shape: tuple[int, ...]):
    along = _axes(settings, len(shape))
    rows = Pick(parts["rows"], along["rows"], -2, shape[-2])
    return Factors(settings.scale, (rows, Term(parts["update"], along["update"])))


def _separable(settings: _Settings, ndim: int):
    return frozenset(range(-ndim, 0)) - {-2}


def _merge(settings: _Settings, w, parts):
    # Written into its rows: a sum with zeros elsewhere would turn -0.0 into 0.0.
    def write(w, rows, update):
        moved = wide(w[rows]) + unfused(settings.scale * wide(update))
        return w.at[rows].set(narrowed(moved, w.dtype), unique_indices=True)

    for _ in range(w.ndim - 2):
        write = jax.vmap(write)
    return write(jnp.asarray(w), parts["rows"], parts["update"])


def paca(*, rank: int = 8, alpha: float | None = None, where: Where = None) -> Reparam:
    """Trains random input rows of a weight; the rows are drawn once, when it is attached.

    The gradient is the full one restricted to these rows, and the backward pass keeps only the
    inputs that they see. The change of the rows is stored, and starts at zero. The frozen weight
    does not change, and several sets of rows can be kept beside it.

    Args:
      rank: r, the number of rows; leading axes of a leaf (layers, experts) have rows of their own.
      alpha: the change is scaled by `s = alpha / r`, as in the authors' code; None means `r`, so 1.
        SGD then moves the rows `s^2` times as far, Adam `s` times.
      where: the leaves: a glob (`*` within a name, `**` across names), a compiled regular
        expression, or a function of (path, leaf); None: floating leaves of two or more axes.

    Returns:
      The reparameterisation; `merge` writes the rows.

    Raises:
      ValueError: the rank is not positive; when attached: it is more than a leaf's rows.

    References: [paca].
    """
    rank = needed(rank=rank)
    if rank < 1:
        raise ValueError(f"rank={rank}: give at least 1")
    method = additive(
        f"paca(rank={rank})",
        _Settings(rank, float((rank if alpha is None else finite(alpha=alpha)) / rank)),
        init=_init,
        factors=_factors,
        axes=_axes,
        separable=_separable,
        merge=_merge,
    )
    return reparam(method, where)
