"""MoS: adapters put together from shards that all layers draw from common pools. [mos]"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpara.sizes import finite, needed
from jaxpara.tree import Where
from jaxpara.weights.factors import Factors, Term
from jaxpara.weights.method import Method, additive
from jaxpara.weights.reparam import Reparam, reparam
from jaxpara.weights.weight import Weight, shape_of


class _Settings(NamedTuple):
    rank: int
    budget: int
    shards: int
    private: int
    scale: float


def _share(method: Method, key, bases: Mapping[str, Any]):
    """One pair of pools for each size of matrix, and for each matrix the shards that it takes."""
    settings: _Settings = method.settings
    shapes = {path: shape_of(base) for path, base in bases.items()}
    kinds: dict[Any, list[str]] = {}
    for path, like in shapes.items():
        kinds.setdefault((*like.shape[-2:], like.dtype), []).append(path)
    pools, indices = {}, {path: {} for path in shapes}
    shared: dict[str, tuple[tuple[str, str], ...]] = {}
    for i, ((rows, columns, dtype), paths) in enumerate(kinds.items()):
        leads = [shapes[path].shape[:-2] for path in paths]
        count = sum(map(math.prod, leads))
        _check(settings.shards, rows, columns, paths[0])
        keys = jax.random.split(jax.random.fold_in(key, i), 3)
        total, bound = settings.budget * count * settings.shards, rows**-0.5
        a = (total, rows // settings.shards)
        begin = {
            "a": jax.random.uniform(keys[0], a, dtype, -bound, bound),
            "b": jnp.zeros((total, columns // settings.shards), dtype),
        }
        names = {side: f"{side}_{rows}x{columns}_{dtype}" for side in begin}
        pools |= {names[side]: pool for side, pool in begin.items()}
        shared |= dict.fromkeys(paths, tuple(names.items()))
        for side, own in zip(begin, keys[1:], strict=True):
            index, start = _indices(settings, own, count), 0
            for path, lead in zip(paths, leads, strict=True):
                size = math.prod(lead)
                taken = index[start : start + size].reshape(*lead, *index.shape[1:])
                indices[path][f"at_{side}"] = taken
                start += size
    weights = {
        path: Weight(base, indices[path], method, shared[path]) for path, base in bases.items()
    }
    return pools, weights


def _check(shards: int, rows: int, columns: int, path: str) -> None:
    if rows % shards or columns % shards:
        both = math.gcd(rows, columns)
        fitting = [k for k in range(1, both + 1) if both % k == 0]
        raise ValueError(
            f"shards={shards} does not divide the {rows} rows and {columns} columns of "
            f"{path!r}: give one of {fitting}, or narrow where="
        )


def _indices(settings: _Settings, key, count: int):
    """`[count, rank, shards]`: each matrix takes different common shards and its private ones."""
    budget, shards, private = settings.budget, settings.shards, settings.private
    common = (budget - private) * count * shards
    # None twice: few matrices, or one, have no more to share.
    rank = min(settings.rank, private + (budget - private) * count)
    wanted = (rank - private) * shards

    def choose(key):
        return jax.random.permutation(key, common)[:wanted]

    own = common + jnp.arange(count * private * shards).reshape(count, -1)
    shared = jax.vmap(choose)(jax.random.split(key, count))
    index = jnp.concatenate([shared.reshape(count, wanted), own], axis=1)
    return index.reshape(count, rank, shards).astype(jnp.int32)


def _axes(settings: _Settings, ndim: int):
    lead = tuple(range(-ndim, -2))
    index, pool = (*lead, "rank", "shard"), ("pool", "piece")
    return {"at_a": index, "at_b": index, "a": pool, "b": pool}


def _factors(settings: _Settings, parts, shape: tuple[int, ...]):
    lead = tuple(range(-len(shape), -2))

    def matrix(side):
        shards = jnp.take(parts[side], parts[f"at_{side}"], axis=0, mode="clip")
        return shards.reshape(*shards.shape[:-2], -1)

    terms = [Term(matrix(side), (*lead, "rank", axis)) for side, axis in (("a", -2), ("b", -1))]
    return Factors(settings.scale, tuple(terms))


def _leading(settings: _Settings, ndim: int):
    return frozenset(range(-ndim, -2))


def mos(
    *,
    rank: int = 8,
    budget: int = 2,
    shards: int = 4,
    private: int = 1,
    alpha: float | None = None,
    where: Where = None,
) -> Reparam:
    """Trains `W + s A B` whose A and B are put together from shards in common pools.

    A vector of rank one is cut into shards. Each matrix takes the shards of `rank` vectors, by
    indices that are drawn once, separately for A and for B. `private` of these vectors are its
    own. The others come from the shards that all matrices of its size share, none twice. A matrix
    that shares with no other has rank `budget`. Pools hold as many numbers as LoRA of rank
    `budget`, `budget * matrices * (rows + columns)`, whatever the rank. They are kept once beside
    the parameters (`Pooled`). In a scan over layers they are constants of the scan.

    Args:
      rank: of the update of each matrix.
      budget: the rank that LoRA would have with as many numbers.
      shards: the number of shards that a vector is cut into.
      private: the number of vectors, of the `rank`, that no other matrix uses.
      alpha: `s = alpha / rank`; None means `2 rank`, so `s = 2`.
      where: the leaves that share: a glob (`*` within a name, `**` across names), a compiled
        regular expression, or a function of (path, leaf); None: floating leaves of two or more
        axes. `chain` several for several pools.

    Returns:
      The reparameterisation.

    Raises:
      ValueError: a number is out of range; when attached: `shards` does not divide the rows and
        columns of a leaf.

    References: [mos].
    """
    rank, budget = needed(rank=rank), needed(budget=budget)
    shards, private = needed(shards=shards), needed(private=private)
    if min(rank, budget, shards) < 1:
        raise ValueError(f"rank={rank}, budget={budget}, shards={shards}: give at least 1")
    if not 0 <= private <= min(rank, budget):
        raise ValueError(
            f"private={private}: give 0 to {min(rank, budget)}, the smaller of rank and budget"
        )
    if private == budget and rank > budget:
        raise ValueError(
            f"rank={rank} with private=budget={budget}: nothing is shared that could make up the "
            f"rank: give private={budget - 1} at most"
        )
    alpha = 2.0 * rank if alpha is None else finite(alpha=alpha)
    method = additive(
        f"mos(rank={rank}, budget={budget})",
        _Settings(rank, budget, shards, private, float(alpha / rank)),
        factors=_factors,
        axes=_axes,
        separable=_leading,
        share=_share,
    )
    return reparam(method, where)
