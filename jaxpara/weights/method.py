"""A method: one way to compute a weight from a base and parts.

    effective = f(base, parts)                                       `computed`
    effective = (base + scale * (product of the factors)) * scaling  `additive`

A method says along which axes of the weight each of its parts runs; whoever slices the weight then
slices its parts, and builds nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxpara.weights.factors import Axes, Factors, Term


class Method(NamedTuple):
    """One way to compute a weight; equal settings make equal, hashable methods.

    Attributes:
      name: for reports.
      settings: a hashable value, handed to every function below.
      init: `(settings, key, base) -> (base, parts)`, the base as it is kept; must leave the
        effective weight as it is, or as close as the method allows. A third value is the method
        of this leaf, where the base as it is kept does not tell its dtype.
      effective: `(settings, dense base, parts) -> dense`; None for additive methods.
      factors: `(settings, parts, shape of the weight) -> Factors`; None for the others.
      axes: `(settings, ndim) -> axes of each part`.
      separable: `(settings, ndim) -> axes` along which a slice of the effective weight is
        computed from slices only.
      freezes: whether the base is frozen while the parts are trained.
      merge: `(settings, dense base, parts) -> Weight | dense`, what is deployed; None means
        the effective weight.
      product: `(settings, x, base, parts, cast, **options) -> x @ W` for a floating `x[.., rows]`
        and a weight of two axes, if the method multiplies in a way of its own: `base` as it is
        kept, `cast` for the weight's dtype in the function, `options` of `jnp.matmul`. It keeps
        what it keeps for the backward pass; the rule is met where the axis -2 is contracted.
      sample: `(settings, key, shape of the weight, parts) -> parts` with the random choices of one
        call made; None for methods without any.
      remark: `(settings, weight) -> text`, what a report says of `product`; may be empty.
      scaling: `(settings, dense base, parts) -> Term`, by which an additive weight is multiplied
        in the end.
      penalty: `(settings, dense base, parts) -> scalar`, a term of the loss.
      beyond: what `product` does that the product with the effective weight does not, worded as
        missing: "its activations are not quantised"; empty if nothing.
      share: for leaves that have parts in common, in place of `init`: `(this method, key,
        {path: base}) -> (pools, {path: Weight})`. A weight's `shared` names its pools, which are
        kept once beside the parameters, see `Pooled`; its method may differ from leaf to leaf.
    """

    name: str
    settings: Any
    init: Callable[..., tuple[Any, ...]] | None
    effective: Callable[..., jax.Array] | None
    factors: Callable[..., Factors] | None
    axes: Callable[..., Mapping[str, Axes]]
    separable: Callable[..., frozenset[int]]
    freezes: bool
    merge: Callable[..., Any] | None = None
    product: Callable[..., jax.Array] | None = None
    scaling: Callable[..., Term] | None = None
    penalty: Callable[..., jax.Array] | None = None
    share: Callable[..., Any] | None = None
    sample: Callable[..., dict[str, jax.Array]] | None = None
    remark: Callable[..., str] | None = None
    beyond: str = ""

    def __repr__(self) -> str:
        return f"Method({self.name})"


def every_axis(settings: Any, ndim: int) -> frozenset[int]:
    """`separable` of a method that computes a slice along any axis from slices."""
    return frozenset(range(-ndim, 0))


def additive(
    name: str,
    settings: Any,
    *,
    init: Callable[..., tuple[Any, ...]] | None = None,
    factors: Callable[..., Factors],
    axes: Callable[..., Mapping[str, Axes]],
    separable: Callable[..., frozenset[int]] = every_axis,
    scaling: Callable[..., Term] | None = None,
    merge: Callable[..., Any] | None = None,
    sample: Callable[..., dict[str, jax.Array]] | None = None,
    share: Callable[..., Any] | None = None,
) -> Method:
    """A method that freezes the base and adds a product of trained factors.

    Products with such a weight are never dense: `x W + s (x A) B` follows from the factors.

    Args:
      name, settings, init, factors, axes, separable, scaling, merge, sample, share: see `Method`.

    Returns:
      The method.
    """
    return Method(
        name,
        settings,
        init=init,
        effective=None,
        factors=factors,
        axes=axes,
        separable=separable,
        freezes=True,
        scaling=scaling,
        merge=merge,
        sample=sample,
        share=share,
    )


def computed(
    name: str,
    settings: Any,
    *,
    init: Callable[..., tuple[Any, ...]] | None,
    effective: Callable[..., jax.Array],
    axes: Callable[..., Mapping[str, Axes]],
    separable: Callable[..., frozenset[int]],
    freezes: bool = False,
    merge: Callable[..., Any] | None = None,
    product: Callable[..., jax.Array] | None = None,
    sample: Callable[..., dict[str, jax.Array]] | None = None,
    remark: Callable[..., str] | None = None,
    penalty: Callable[..., jax.Array] | None = None,
    beyond: str = "",
) -> Method:
    """A method that computes the weight by a function of its own, as quantisers do.

    Args:
      name, settings, init, effective, axes, separable, freezes, merge: see `Method`.
      product, sample, remark, penalty, beyond: likewise.

    Returns:
      The method.
    """
    return Method(
        name,
        settings,
        init=init,
        effective=effective,
        factors=None,
        axes=axes,
        separable=separable,
        freezes=freezes,
        merge=merge,
        product=product,
        sample=sample,
        remark=remark,
        penalty=penalty,
        beyond=beyond,
    )


def without_window(method: Method) -> Method:
    """A method for leaves whose layout is known, which says what `window=` would say.

    Args:
      method: any.

    Returns:
      The method, its `window` setting at 0 if it has one.
    """
    if getattr(method.settings, "window", 0):
        return method._replace(settings=method.settings._replace(window=0))
    return method
