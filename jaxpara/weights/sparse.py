"""N:M sparsity: in each group of M weights the N largest remain, while all of them are trained."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float

from jaxpara.sizes import finite, needed
from jaxpara.tree import Where
from jaxpara.types import AnyArray
from jaxpara.weights.method import computed
from jaxpara.weights.precision import wide
from jaxpara.weights.reparam import Reparam, reparam
from jaxpara.weights.weight import dense, shape_of


class _Settings(NamedTuple):
    n: int
    m: int
    decay: float


def largest(w: Float[AnyArray, "..."], n: int, m: int, axis: int) -> Bool[Array, "..."]:
    """Where the `n` largest magnitudes of each group of `m` are; ties go to the first.

    Args:
      w: weights; `m` divides the axis.
      n: how many remain.
      m: consecutive entries that are a group.
      axis: along which groups run, counted from the end.

    Returns:
      Booleans in the shape of `w`, exactly `n` true in each group.
    """
    at = w.ndim + axis
    groups = jnp.abs(w).reshape(*w.shape[:at], w.shape[at] // m, m, *w.shape[at + 1 :])
    place = lax.broadcasted_iota(jnp.int32, groups.shape, at + 1)
    before = jnp.zeros(groups.shape, jnp.int32)
    for j in range(m):
        other = lax.index_in_dim(groups, j, at + 1)
        before = before + ((other > groups) | ((other == groups) & (j < place)))
    return (before < n).reshape(w.shape)


def _init(settings: _Settings, key, base):
    _check(settings.m, shape_of(base).shape, -2)
    return base, {}


def _init_both(settings: _Settings, key, base):
    for axis in (-2, -1):
        _check(settings.m, shape_of(base).shape, axis)
    return base, {}


def _check(m: int, shape: tuple[int, ...], axis: int) -> None:
    if shape[axis] % m:
        fitting = [k for k in range(2, shape[axis] + 1) if shape[axis] % k == 0]
        name = {-2: "rows", -1: "columns"}[axis]
        another = f"give one of {fitting}, or " if fitting else ""
        raise ValueError(
            f"m={m} does not divide the {shape[axis]} {name} of a leaf of shape {shape}: {another}"
            "narrow where="
        )


def _effective(settings: _Settings, w, parts):
    """Masked; the gradient passes straight through to every entry."""
    kept = jnp.where(largest(w, settings.n, settings.m, -2), w, 0)
    return lax.stop_gradient(kept) + (w - lax.stop_gradient(w))


def _penalty(settings: _Settings, w, parts):
    pruned = jnp.where(largest(w, settings.n, settings.m, -2), 0, w)
    return 0.5 * settings.decay * jnp.sum(wide(pruned) ** 2)


def _product(settings: _Settings, x, base, parts, cast, **options: Any):
    """`x @ (W * M)`, whose gradient of x is `G (W * M_b)^T` and of W, dense, `x^T G`."""

    @jax.custom_jvp
    def product(x, forward, backward):
        return jnp.matmul(x, forward, **options)

    def tangents(primals, given):
        x, forward, backward = primals
        out = product(x, forward, backward)
        terms = [jnp.zeros_like(out)]
        if not isinstance(given[0], SymbolicZero):
            terms.append(jnp.matmul(given[0], backward, **options))
        if not isinstance(given[1], SymbolicZero):
            terms.append(jnp.matmul(x, given[1], **options))
        return out, sum(terms[1:], terms[0])

    product.defjvp(tangents, symbolic_zeros=True)

    @jax.checkpoint
    def run(x, base):
        w = dense(base)
        seen = jnp.where(largest(w, settings.n, settings.m, -1), w, 0)
        forward = _effective(settings, w, parts)
        return product(x, cast(forward), lax.stop_gradient(cast(seen)))

    return run(x, base)


def _none(settings: _Settings, ndim: int):
    return {}


def _between_groups(settings: _Settings, ndim: int):
    return frozenset(range(-ndim, 0)) - {-2}


def _leading(settings: _Settings, ndim: int):
    return frozenset(range(-ndim, -2))


def _checked(n: int, m: int, decay: float = 0.0) -> _Settings:
    n, m, decay = needed(n=n), needed(m=m), finite(decay=decay)
    if not 1 <= n <= m:
        raise ValueError(f"n={n}, m={m}: of each group of m weights n remain, with 1 <= n <= m")
    if decay < 0:
        raise ValueError(f"decay={decay}: give zero or more")
    return _Settings(n, m, decay)


def sparse_nm(*, n: int = 2, m: int = 4, decay: float = 2e-4, where: Where = None) -> Reparam:
    """Trains a weight with only the `n` largest entries of each group of `m` along the inputs.

    The forward pass sees `W * M`; the gradient passes straight through to all of W. SR-STE pulls
    the pruned entries towards zero, so that the mask settles: add `t.penalty(state)`, which is
    `decay / 2` times the sum of their squares, to the loss. (Added inside the backward pass, as
    the paper writes it, the pull would depend on how often a weight is used and on how gradients
    of devices and of parts of a batch are added up.)

    Args:
      n: how many remain.
      m: consecutive entries along the contraction axis -2 that are a group.
      decay: of the pruned entries, in `penalty`; zero is the plain straight-through estimator.
      where: the leaves: a glob (`*` within a name, `**` across names), a compiled regular
        expression, or a function of (path, leaf); None: floating leaves of two or more axes.

    Returns:
      The reparameterisation; every floating leaf is trained, `merge` gives the masked weights.

    Raises:
      ValueError: `n` is not between 1 and `m`, or the decay is negative; when attached: `m` does
        not divide a leaf's rows.

    References: [srste].
    """
    method = computed(
        f"sparse_nm({n}:{m})",
        _checked(n, m, decay),
        init=_init,
        effective=_effective,
        axes=_none,
        separable=_between_groups,
        penalty=_penalty,
    )
    return reparam(method, where)


def bdwp(*, n: int = 2, m: int = 4, where: Where = None) -> Reparam:
    """N:M sparsity of both products with a weight: of the forward and of the backward pass.

    `y = x (W * M)` with groups along the inputs, and `dL/dx = G (W * M_b)^T` with groups along the
    outputs, so that both contractions are over sparse groups; `dL/dW = x^T G` is dense. The
    gradient of x is not the derivative of y: where a product meets no rule (see `t.report`) it is
    the straight-through one of the forward mask.

    Args:
      n: how many remain.
      m: consecutive entries that are a group, along each of the last two axes.
      where: the leaves: a glob (`*` within a name, `**` across names), a compiled regular
        expression, or a function of (path, leaf); None: floating leaves of two or more axes.

    Returns:
      The reparameterisation; every floating leaf is trained, `merge` gives `W * M`.

    Raises:
      ValueError: `n` is not between 1 and `m`; when attached: `m` does not divide a leaf's rows
        and columns.

    References: [bdwp].
    """
    method = computed(
        f"bdwp({n}:{m})",
        _checked(n, m),
        init=_init_both,
        effective=_effective,
        axes=_none,
        separable=_leading,
        product=_product,
        beyond="the backward pass is not sparse",
    )
    return reparam(method, where)
