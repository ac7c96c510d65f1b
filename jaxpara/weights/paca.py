"""PaCA: some rows of a weight are trained, the others stay as they are. [paca]

    W' = W + S D,  S[rows[k], k] = 1

The gradient of D needs of the input what D multiplies, `x[.., rows]`, and nothing else.
"""

import math

import jax
import jax.numpy as jnp

from jaxpara.tree import Where
from jaxpara.weights.reparam import Reparam, reparam
from jaxpara.weights.weight import Factors, Method, Pick, Term, shape_of


def _init(rank: int, key, base):
    like = shape_of(base)
    *lead, rows, columns = like.shape
    if rank > rows:
        raise ValueError(f"rank={rank} rows of a leaf of shape {like.shape}: give {rows} at most")

    def choose(key):
        return jnp.sort(jax.random.permutation(key, rows)[:rank]).astype(jnp.int32)

    chosen = jax.vmap(choose)(jax.random.split(key, math.prod(lead)))
    update = jnp.zeros((*lead, rank, columns), like.dtype)
    return base, {"rows": chosen.reshape(*lead, rank), "update": update}


def _axes(rank: int, ndim: int):
    lead = tuple(range(-ndim, -2))
    return {"rows": (*lead, "row"), "update": (*lead, "row", -1)}


def _factors(rank: int, parts, shape: tuple[int, ...]):
    along = _axes(rank, len(shape))
    rows = Pick(parts["rows"], along["rows"], -2, shape[-2])
    return Factors(1.0, (rows, Term(parts["update"], along["update"])))


def _separable(rank: int, ndim: int):
    return frozenset(range(-ndim, 0)) - {-2}


def _merge(rank: int, w, parts):
    # Written into its rows: a sum with zeros elsewhere would turn -0.0 into 0.0.
    write = lambda w, rows, update: w.at[rows].add(update, unique_indices=True)  # noqa: E731
    for _ in range(w.ndim - 2):
        write = jax.vmap(write)
    return write(jnp.asarray(w), parts["rows"], parts["update"])


def paca(*, rank: int = 8, where: Where = None) -> Reparam:
    """Trains randomly chosen input rows of a weight, which are drawn once, when it is attached.

    The gradient is the full one restricted to these rows, and the backward pass keeps only the
    inputs that they see. What is stored is the change of the rows, which starts at zero: the
    frozen weight stays what it was, and several sets of rows can be kept beside it.

    Args:
      rank: number of rows; leading axes of a leaf (layers, experts) have rows of their own.
      where: the leaves, see `jaxpara.tree.matcher`.

    Returns:
      The reparameterisation; `merge` writes the rows.

    Raises:
      ValueError: the rank is not positive; when attached: it is more than a leaf's rows.

    References: [paca].
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: give at least 1")
    method = Method(
        name=f"paca(rank={rank})",
        settings=rank,
        init=_init,
        effective=None,
        factors=_factors,
        axes=_axes,
        separable=_separable,
        freezes=True,
        merge=_merge,
    )
    return reparam(method, where)
