"""Rules of products with lazy weights.

An additive weight is never built: a product with `W + s A B` is `x W + s (x A) B`. A method may
also bring a product of its own (`Method.product`).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpara import compat
from jaxpara.weights.factors import Axes, Factors, Pick, Term, contract, product, spread
from jaxpara.weights.lazy import (
    Lazy,
    arranged,
    cast,
    final_axes,
    is_lazy,
    is_plain,
    reshaped,
    sizes,
)
from jaxpara.weights.order import in_order
from jaxpara.weights.precision import multiplied_as, narrowed, wide
from jaxpara.weights.weight import dense, is_weight, shape_of


def additive(lazy: Lazy) -> bool:
    """Whether the weight is a base plus a product of factors."""
    return lazy.weight.method.factors is not None


def factors_of(lazy: Lazy) -> Factors:
    """What is added, cast as the weight is."""
    weight = lazy.weight
    assert weight.method.factors is not None
    shape = shape_of(weight).shape
    factors = weight.method.factors(weight.method.settings, weight.parts, shape)
    terms = (t if isinstance(t, Pick) else _cast(lazy, t) for t in factors.terms)
    return factors._replace(terms=tuple(terms))


def _cast(lazy: Lazy, term: Term) -> Term:
    return term._replace(array=cast(term.array, lazy.casts))


def scaling_of(lazy: Lazy) -> Term | None:
    """What the sum is multiplied by, if anything."""
    method = lazy.weight.method
    if method.scaling is None:
        return None
    # Not cast as the weight is: the product is rounded once, after it is scaled.
    return method.scaling(method.settings, dense(lazy.weight.base), lazy.weight.parts)


def base_of(lazy: Lazy) -> Any:
    """What the factors are added to, as a value of the walk."""
    base = lazy.weight.base
    if is_weight(base):
        return dataclasses.replace(lazy, weight=base)
    return arranged(cast(base, lazy.casts), lazy.axes)


def dot_general(walk: Any, eqn: Any, operands: list[Any]) -> list[Any] | None:
    """A matmul with any batch and contracting axes, the weight on either side."""
    if all(map(is_lazy, operands)):
        return None
    side = 1 if is_lazy(operands[1]) else 0
    lazy = operands[side]
    other = jnp.asarray(operands[1 - side])
    if not is_plain(lazy) or not (additive(lazy) or _ascending(eqn, lazy, side)):
        ordered = in_order(walk, eqn, lazy, side, other)
        if ordered is None:
            return None
        outs = dot_general(walk, ordered.equation, ordered.operands)
        return None if outs is None else [ordered.restore(outs[0])]
    if not additive(lazy):
        return _own_product(walk, eqn, lazy, side, other)
    # No rule scales or sums in a dtype in which the dense product would not multiply.
    given, dtype = other, multiplied_as(other.dtype, eqn.invars[side].aval.dtype)
    other = other.astype(dtype)
    contracting, batch = eqn.params["dimension_numbers"]
    axes: list[Any] = list(final_axes(lazy))
    # The operand's own axes get names; shared ones are those of the weight.
    own: list[Any] = [f"free {i}" for i in range(other.ndim)]
    for theirs, ours in (
        *zip(contracting[1 - side], contracting[side], strict=True),
        *zip(batch[1 - side], batch[side], strict=True),
    ):
        own[theirs] = axes[ours]

    def free(names, which):
        return [a for i, a in enumerate(names) if i not in (*contracting[which], *batch[which])]

    sides = {side: axes, 1 - side: own}
    out = (*(sides[0][i] for i in batch[0]), *free(sides[0], 0), *free(sides[1], 1))
    scaling = scaling_of(lazy)
    if scaling is not None:
        # A scaled axis that is summed scales the operand, one that stays scales the product.
        if {*scaling.axes} <= {*own}:
            given = other = (other * spread(scaling, tuple(own))).astype(dtype)
            scaling = None
        elif not {*scaling.axes} <= {*out}:
            return None
    walk.note(eqn, lazy, "rule")
    # The base may be lazy itself: the same equation on it, which takes the operand as it came.
    replaced = [given, given]
    replaced[side] = base_of(lazy)
    if is_lazy(replaced[side]):
        (total,) = walk.step(eqn, replaced)
    else:
        (total,) = compat.bind(eqn, replaced)
    factors = factors_of(lazy)
    if factors.terms:
        options = {"precision": eqn.params["precision"]}
        added = contract(factors, tuple(out), operand=(other, tuple(own)), **options)
        total = total + (factors.scale * added).astype(total.dtype)
    if scaling is not None:
        total = (total * spread(scaling, tuple(out))).astype(total.dtype)
    return [total]


def _batched(weight: Any, lead: Axes) -> bool:
    """Whether everything that a weight is made of has these leading axes."""
    if not is_weight(weight):
        return True
    axes = weight.method.axes(weight.method.settings, len(shape_of(weight).shape))
    parts = all(tuple(axes[name])[: len(lead)] == lead for name in weight.parts)
    return parts and _batched(weight.base, lead)


def _ascending(eqn: Any, lazy: Lazy, side: int) -> bool:
    """Whether batches of the weight are batches of the product in the same order."""
    batch = [final_axes(lazy)[i] for i in eqn.params["dimension_numbers"][1][side]]
    return batch == sorted(batch)


def _own_product(walk: Any, eqn: Any, lazy: Lazy, side: int, x: Any) -> list[Any] | None:
    """`x @ W` by the method itself, where the contraction is over the axis -2 of the weight."""
    axes = final_axes(lazy)
    lead = tuple(range(-len(axes), -2))
    contracting, batch = eqn.params["dimension_numbers"]
    fits = [axes[i] for i in contracting[side]] == [-2]
    if not fits or tuple(axes[i] for i in batch[side]) != lead:
        return None
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(multiplied_as(x.dtype, eqn.invars[side].aval.dtype))
    own = (*batch[1 - side], *contracting[1 - side])
    free = [i for i in range(jnp.ndim(x)) if i not in own]
    x = jnp.transpose(x, (*batch[1 - side], *free, *contracting[1 - side]))
    y = own_product(eqn, lazy, x)
    if y is None:
        return None
    walk.note(eqn, lazy, "rule")
    return [y if side == 1 else jnp.moveaxis(y, -1, len(lead))]


def own_product(eqn: Any, lazy: Lazy, x: jax.Array) -> jax.Array | None:
    """A method's own product.

    Args:
      eqn: whose precision and dtype it takes.
      lazy: the weight.
      x: `[*lead, .., rows]`.

    Returns:
      `[*lead, .., columns]`; None if the method has none, or parts that are not there for each of
      the leading axes.
    """
    weight, method = lazy.weight, lazy.weight.method
    lead = tuple(range(-len(shape_of(weight).shape), -2))
    if method.product is None or not _batched(weight, lead):
        return None
    out = eqn.outvars[0].aval.dtype

    def run(x, base, parts):
        assert method.product is not None
        after = functools.partial(cast, casts=lazy.casts)
        options = {"precision": eqn.params["precision"], "preferred_element_type": out}
        return method.product(method.settings, x, base, parts, after, **options)

    for _ in lead:
        run = jax.vmap(run)
    return run(x, weight.base, weight.parts).astype(out)


def gather(walk: Any, eqn: Any, operands: list[Any]) -> list[Any] | None:
    """Rows of a matrix, as an embedding takes them: `(A B)[rows] = A[rows] B`."""
    lazy, indices = operands
    if not is_lazy(lazy) or not additive(lazy):
        return None
    numbers = eqn.params["dimension_numbers"]
    along = lazy.axes[0] and lazy.axes[0][0].axis
    rest = [atom for axis in lazy.axes[1:] for atom in axis]
    rows = (
        len(shape_of(lazy.weight).shape) == 2
        and {atom.axis for atom in lazy.axes[0]} == {along}
        and [*lazy.axes[0]] == sorted(lazy.axes[0])
        and all(atom.axis == -3 - along for atom in rest)
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(numbers.start_index_map) == (0,)
        and not numbers.operand_batching_dims
        and tuple(eqn.params["slice_sizes"]) == (1, *sizes(lazy.axes)[1:])
        and tuple(numbers.offset_dims)
        == tuple(range(indices.ndim - 1, indices.ndim + len(lazy.axes) - 2))
    )
    if not rows:
        return None
    walk.note(eqn, lazy, "rule")

    def taken(array):
        return lax.gather(
            array,
            indices,
            numbers._replace(offset_dims=(indices.ndim - 1,)),
            (1, array.shape[1]),
            unique_indices=eqn.params["unique_indices"],
            indices_are_sorted=eqn.params["indices_are_sorted"],
            mode=eqn.params["mode"],
            fill_value=eqn.params["fill_value"],
        )

    # The base may be lazy itself: the same equation on it.
    base = base_of(lazy)
    step = walk.step if is_lazy(base) else compat.bind
    (own,) = step(eqn, [base, indices])
    total = wide(own)
    batch = tuple(f"row {i}" for i in range(indices.ndim - 1))
    out = (*batch, -3 - along)

    def rows_of(term):
        if isinstance(term, Pick):
            term = Term(term.matrix(total.dtype), term.axes)
        if along not in term.axes:
            return term
        rest = tuple(axis for axis in term.axes if axis != along)
        array = jnp.moveaxis(term.array, term.axes.index(along), 0)
        found = taken(array.reshape(array.shape[0], -1))
        return Term(found.reshape(*found.shape[:-1], *array.shape[1:]), (*batch, *rest))

    def as_taken(array):
        """`[.., the other axis]` with its pieces where the rows have them."""
        here = sorted(rest)
        array = reshaped(array, [*array.shape[: len(batch)], *(atom.size for atom in here)])
        array = jnp.moveaxis(
            array, [len(batch) + here.index(atom) for atom in rest], range(len(batch), array.ndim)
        )
        return reshaped(array, total.shape)

    factors = factors_of(lazy)
    if factors.terms:
        added = product(factors._replace(terms=tuple(map(rows_of, factors.terms))), out)
        total = total + as_taken(added)
    scaling = scaling_of(lazy)
    if scaling is not None:
        share = spread(rows_of(scaling), out)
        shape = (*total.shape[: len(batch)], *sizes((tuple(rest),)))
        total = total * as_taken(jnp.broadcast_to(share, shape))
    return [narrowed(total, own.dtype)]
