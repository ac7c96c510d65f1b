"""A convolution with `W + s A B` where the window belongs to A: one with A, then a matmul."""

from typing import Any

import jax.numpy as jnp

from jaxpara import compat
from jaxpara.weights.lazy import final_axes, is_lazy
from jaxpara.weights.products import additive, base_of, factors_of, scaling_of
from jaxpara.weights.weight import Axes, Factors, Term, contract, spread


def _parted(factors: Factors, inputs: set[Any], output: Any) -> tuple[Term, Factors, str] | None:
    """The factor that is a kernel, the others, and the name that they share; None if not so."""
    kernels = [t for t in factors.terms if isinstance(t, Term) and inputs <= {*t.axes}]
    if len(kernels) != 1:
        return None
    (kernel,) = kernels
    names = [axis for axis in kernel.axes if axis not in inputs]
    others = tuple(term for term in factors.terms if term is not kernel)
    along = {axis for term in others for axis in term.axes}
    if len(names) != 1 or not isinstance(names[0], str) or along & inputs or output not in along:
        return None
    return kernel, Factors(factors.scale, others), names[0]


def conv(walk: Any, eqn: Any, operands: list[Any]) -> list[Any] | None:
    """A convolution of an array with an additive kernel, without groups."""
    x, lazy = operands
    if is_lazy(x) or not additive(lazy):
        return None
    params = eqn.params
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return None
    numbers = params["dimension_numbers"]
    axes: Axes = final_axes(lazy)
    output = axes[numbers.rhs_spec[0]]
    factors, scaling = factors_of(lazy), scaling_of(lazy)
    parted = _parted(factors, {*axes} - {output}, output)
    if factors.terms and parted is None:
        return None
    if scaling is not None and scaling.axes != (output,):
        return None
    walk.note(eqn, lazy, "rule")
    base = base_of(lazy)
    (total,) = walk.step(eqn, [x, base]) if is_lazy(base) else compat.bind(eqn, [x, base])
    feature = numbers.out_spec[1]
    if parted is not None:
        kernel, rest, name = parted
        thin = spread(kernel, tuple(name if axis == output else axis for axis in axes))
        (inner,) = compat.bind(eqn, [x, thin])
        matrix = contract(rest, (name, output))
        added = jnp.tensordot(inner, matrix, ((feature,), (0,)), precision=params["precision"])
        total = total + (rest.scale * jnp.moveaxis(added, -1, feature)).astype(total.dtype)
    if scaling is not None:
        shape = [1] * total.ndim
        shape[feature] = -1
        total = (total * scaling.array.reshape(shape)).astype(total.dtype)
    return [total]
