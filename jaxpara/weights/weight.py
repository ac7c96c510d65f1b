"""Weights that are computed from parts: what stands in a parameter tree instead of an array.

    effective = f(base, parts)                                       any method
    effective = (base + scale * (product of the factors)) * scaling  an additive one

Axes of a weight are counted from its end, since leading axes (layers of a stacked
leaf, experts, heads) are batches. A method says along which of them each of its parts
runs; whoever slices the weight then slices its parts, and builds nothing.
"""

import dataclasses
import functools
import string
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpara.weights.precision import narrowed, unfused, wide

Axes = tuple[int | str, ...]
"""The axes of a part: negative numbers are axes of the weight, names are its own."""


class Pick(NamedTuple):
    """A factor of zeros and ones that is never built: entry `(i, k)` is one where `index[k] == i`.

    Attributes:
      index: integers, distinct along the last axis.
      names: axes of the index, the last one a name that counts what is picked.
      axis: of the weight, where it is picked.
      size: of that axis.
    """

    index: jax.Array
    names: Axes
    axis: int
    size: int

    @property
    def axes(self) -> Axes:
        """Axes of the matrix."""
        return (*self.names[:-1], self.axis, self.names[-1])

    def matrix(self, dtype: Any) -> jax.Array:
        """The zeros and ones."""
        return jnp.swapaxes(jax.nn.one_hot(self.index, self.size, dtype=dtype), -1, -2)


class Term(NamedTuple):
    """A factor that is an array."""

    array: jax.Array
    axes: Axes


class Factors(NamedTuple):
    """What an additive method adds: `scale` times the product of factors over their own axes.

    Attributes:
      scale: a number.
      terms: summed over the axes that are names; none adds nothing.
    """

    scale: float
    terms: tuple[Term | Pick, ...]


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
        computed from slices alone.
      freezes: whether the base is left as it is while the parts are trained.
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
      penalty: `(settings, dense base, parts) -> scalar`, to be added to the loss.
      beyond: what `product` does that the product with the effective weight does not, said as
        missing: "its activations are not quantised"; empty if nothing.
      share: for leaves that have parts in common, in the place of `init`: `(this method, key,
        {path: base}) -> (pools, {path: Weight})`. A weight's `shared` names its pools, which stand
        once beside the parameters, see `Pooled`; its method may differ from leaf to leaf.
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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "parts"),
    meta_fields=("method", "shared"),
)
@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight that is computed from a base and parts.

    Attributes:
      base: an array, or another such weight.
      parts: arrays of the method.
      method: see `Method`.
      shared: `(name of a part, name of its pool)` for parts that are not here but in a pool.
    """

    base: Any
    parts: dict[str, jax.Array]
    method: Method
    shared: tuple[tuple[str, str], ...] = ()


def is_weight(leaf: Any) -> bool:
    """Whether a leaf is a `Weight`, as `is_leaf` of `jax.tree` functions."""
    return isinstance(leaf, Weight)


def shape_of(weight: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array or of what a `Weight` computes."""
    if is_weight(weight):
        return jax.eval_shape(dense, weight)
    return jax.ShapeDtypeStruct(jnp.shape(weight), jnp.result_type(weight))


def dense(weight: Any) -> jax.Array:
    """The array that a weight stands for: the definition, and the oracle.

    Args:
      weight: an array or a `Weight`.

    Returns:
      The effective weight.
    """
    if not is_weight(weight):
        return weight
    base, method = jnp.asarray(dense(weight.base)), weight.method
    if method.effective is not None:
        return method.effective(method.settings, base, weight.parts)
    assert method.factors is not None
    factors = method.factors(method.settings, weight.parts, base.shape)
    whole, total = tuple(range(-base.ndim, 0)), wide(base)
    if factors.terms:
        # The product is rounded before the sum in every program: a fused multiply-add in one and
        # not in another would put a quantiser that follows on two sides of a tie.
        total = total + unfused(product(factors, whole))
    if method.scaling is not None:
        scaling = method.scaling(method.settings, base, weight.parts)
        total = total * spread(scaling, whole).astype(total.dtype)
    return narrowed(total, base.dtype)


def product(factors: Factors, over: Axes) -> jax.Array:
    """What an additive method adds, in float32 or wider."""

    def one(term):
        return term if isinstance(term, Pick) else term._replace(array=wide(term.array))

    return factors.scale * contract(factors._replace(terms=tuple(map(one, factors.terms))), over)


def spread(term: Term, over: Axes) -> jax.Array:
    """An array with its axes where `over` has them, and axes of size one for the others."""
    order = sorted(range(len(term.axes)), key=lambda i: over.index(term.axes[i]))
    array = term.array.transpose(order)
    sizes = {term.axes[i]: size for i, size in zip(order, array.shape, strict=True)}
    return array.reshape([sizes.get(axis, 1) for axis in over])


def contract(
    factors: Factors,
    out: Axes,
    *,
    operand: tuple[jax.Array, Axes] | None = None,
    **options: Any,
) -> jax.Array:
    """Multiplies factors, and an operand if there is one, term by term.

    The term that shares most summed axes with what is there comes first, so that
    `x A B` is `(x A) B` where `x` runs along the axes of `A` and `(x B^T) A^T` where it runs
    along those of `B`.

    Args:
      factors: their scale is left out.
      out: axes of the result.
      operand: an array and its axes, which may have names of their own.
      options: for `jnp.einsum`.

    Returns:
      The product over the axes `out`.
    """
    terms = list(factors.terms)
    if operand is None:
        first = next(term for term in terms if isinstance(term, Term))
        terms = [term for term in terms if term is not first]
        now, axes = first
    else:
        now, axes = operand
    while terms:
        summed = [axis for axis in axes if axis not in out]
        # A pick whose own two axes are not there yet has nothing to pick from.
        terms.sort(
            key=lambda term: (
                isinstance(term, Pick) and not {*term.axes[-2:]} & {*axes},
                -sum(axis in summed for axis in term.axes),
            )
        )
        term = terms.pop(0)
        if isinstance(term, Pick):
            if not (term.axis in axes and term.axis in out):
                now, axes = _picked(now, axes, term)
                continue
            term = Term(term.matrix(now.dtype), term.axes)
        later = {*out, *(axis for other in terms for axis in other.axes)}
        kept = tuple(dict.fromkeys(a for a in (*axes, *term.axes) if a in later))
        now, axes = _einsum((now, axes), term, kept, **options), kept
    return _einsum((now, axes), None, out, **options) if axes != out else now


def _picked(now: jax.Array, axes: Axes, pick: Pick) -> tuple[jax.Array, Axes]:
    """The product with a pick: entries are taken along its axis, or put back there."""
    *lead, name = pick.names
    inner = tuple(axis for axis in axes if axis not in lead)
    old, new = (pick.axis, name) if pick.axis in inner else (name, pick.axis)
    at = inner.index(old)

    def one(now, index):
        if new == name:
            return jnp.take(now, index, at, mode="clip")
        zeros = jnp.zeros((*now.shape[:at], pick.size, *now.shape[at + 1 :]), now.dtype)
        return zeros.at[(*(slice(None),) * at, index)].add(now, unique_indices=True)

    run, remaining = one, axes
    # The first leading axis is the outermost map: wrap from the last one.
    places = []
    for axis in lead:
        places.append(remaining.index(axis) if axis in remaining else None)
        remaining = tuple(a for a in remaining if a != axis)
    for place in reversed(places):
        run = jax.vmap(run, (place, 0))
    return run(now, pick.index), (*lead, *(new if axis == old else axis for axis in inner))


def _einsum(a, b, out: Axes, **options: Any) -> jax.Array:
    operands = [a] if b is None else [a, b]
    names = dict.fromkeys(axis for _, axes in operands for axis in axes)
    letters = dict(zip(names, string.ascii_letters, strict=False))
    word = lambda axes: "".join(letters[axis] for axis in axes)  # noqa: E731
    spec = ",".join(word(axes) for _, axes in operands) + "->" + word(out)
    return jnp.einsum(spec, *(array for array, _ in operands), **options)


def cut(weight: Any, axis: int, one: Callable[[jax.Array, int], jax.Array]) -> Any | None:
    """Slices a weight by slicing what it is made of.

    Args:
      weight: an array or a `Weight`.
      axis: of the weight, counted from its end.
      one: `(array, position of the axis) -> slice`; may drop the axis if it is a leading one.

    Returns:
      The sliced weight, or None if the method cannot be sliced along this axis.
    """
    if not is_weight(weight):
        return one(weight, weight.ndim + axis)
    method, ndim = weight.method, len(shape_of(weight).shape)
    if axis not in method.separable(method.settings, ndim):
        return None
    base = cut(weight.base, axis, one)
    if base is None:
        return None
    axes = method.axes(method.settings, ndim)
    parts = {
        name: one(part, axes[name].index(axis)) if axis in axes[name] else part
        for name, part in weight.parts.items()
    }
    return Weight(base, parts, method)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("params", "pools"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Pooled:
    """Parameters some of whose weights have parts in common.

    Attributes:
      params: the tree; its weights name their pools, see `Weight.shared`.
      pools: arrays that stand here once, by name.
    """

    params: Any
    pools: dict[str, Any]


def is_pooled(node: Any) -> bool:
    """Whether a node is a `Pooled`, as `is_leaf` of `jax.tree` functions."""
    return isinstance(node, Pooled)


def resolved(state: Any) -> Any:
    """The tree in which every weight has its parts, those from pools too.

    Args:
      state: any tree, with a `Pooled` in it or not.

    Returns:
      The tree. A pool stands in each weight of it, so its gradient is the sum over them.
    """

    def of(pools):
        def one(leaf):
            if not is_weight(leaf):
                return leaf
            common = {part: pools[name] for part, name in leaf.shared}
            return dataclasses.replace(leaf, base=one(leaf.base), parts={**leaf.parts, **common})

        return one

    def opened(node):
        if not is_pooled(node):
            return node
        return jax.tree.map(of(node.pools), node.params, is_leaf=is_weight)

    return jax.tree.map(opened, state, is_leaf=lambda node: is_pooled(node) or is_weight(node))


def unresolved(weight: Any) -> Any:
    """A weight without the parts that stand in pools: undoes `resolved`."""
    if not is_weight(weight):
        return weight
    common = dict(weight.shared)
    own = {name: part for name, part in weight.parts.items() if name not in common}
    return dataclasses.replace(weight, base=unresolved(weight.base), parts=own)
