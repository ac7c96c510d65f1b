"""(IA)^3: a frozen weight whose columns, or rows, are multiplied by trained numbers. [ia3]"""

import jax.numpy as jnp

from jaxpara.sizes import whole
from jaxpara.tree import Where
from jaxpara.weights.factors import Factors, Term
from jaxpara.weights.method import additive
from jaxpara.weights.reparam import Reparam, reparam
from jaxpara.weights.weight import shape_of


def _init(axis: int, key, base):
    like = shape_of(base)
    return base, {"factor": jnp.ones((*like.shape[:-2], like.shape[axis]), like.dtype)}


def _axes(axis: int, ndim: int):
    return {"factor": (*range(-ndim, -2), axis)}


def _factors(axis: int, parts, shape: tuple[int, ...]):
    return Factors(1.0, ())


def _scaling(axis: int, base, parts):
    return Term(parts["factor"], _axes(axis, base.ndim)["factor"])


def ia3(*, axis: int = -1, where: Where = None) -> Reparam:
    """Trains one factor for each output, or input, of a weight; the weight is frozen.

    The paper scales keys and values, `x W * l`, the columns of their matrices; and the hidden
    activations of an MLP, `(h * l) W`, the rows of its second matrix.

    Args:
      axis: of the weight: -1 for columns, which are outputs, -2 for rows, which are inputs.
      where: the leaves: a glob (`*` within a name, `**` across names), a compiled regular
        expression, or a function of (path, leaf); None: floating leaves of two or more axes.

    Returns:
      The reparameterisation; the factors start at one.

    Raises:
      ValueError: the axis is neither -1 nor -2.

    References: [ia3].
    """
    axis = whole(axis=axis)
    if axis not in (-1, -2):
        raise ValueError(f"axis={axis}: give -1 to scale the outputs or -2 to scale the inputs")
    method = additive(
        "ia3" if axis == -1 else "ia3(axis=-2)",
        axis,
        init=_init,
        factors=_factors,
        axes=_axes,
        scaling=_scaling,
    )
    return reparam(method, where)
