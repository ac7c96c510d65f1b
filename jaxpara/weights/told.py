"""What `attach` is told, or proves, of the layouts of leaves."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpara.tree import select
from jaxpara.types import Params
from jaxpara.weights.lazy import Axes
from jaxpara.weights.matrices import Layout, axes_for, in_matrices, matrices_of
from jaxpara.weights.uses import Layouts
from jaxpara.weights.uses import layout as proved
from jaxpara.weights.weight import is_weight, resolved


def layouts_of(
    function: Callable[..., Any] | None,
    params: Params,
    inputs: Sequence[Any],
    layout: Layouts | Mapping[str, Layout] | None,
) -> Layouts:
    """What is known of the leaves, from what `attach` is given."""
    if not isinstance(inputs, (tuple, list)):
        raise ValueError(
            f"attach got inputs= of type {type(inputs).__name__}: give a tuple, inputs=(x,)"
        )
    if function is not None:
        if layout is not None:
            raise ValueError("attach got function= and layout=: give one of them")
        return proved(function, params, *inputs)
    if inputs:
        raise ValueError("attach got inputs= and no function=: give the function that takes them")
    if layout is None:
        return Layouts({}, {})
    if isinstance(layout, Layouts):
        return layout
    paths = select(params, "**")
    for path in layout:
        if path not in paths:
            near = difflib.get_close_matches(path, paths, n=3, cutoff=0.3) or list(paths)[:3]
            raise ValueError(
                f"attach got layout= of {path!r}, which is no leaf of the parameters; near it are "
                f"{', '.join(map(repr, near))}"
            )
    return Layouts(layout, {})


def as_matrices(path: str, leaf: Any, layouts: Layouts) -> tuple[Any, Axes | None]:
    """A leaf of a state as `[*batch, inputs, outputs]`, and how to put it back."""
    if is_weight(leaf):
        return matrices_of(leaf)
    layout = layouts.known.get(path)
    axes = None if layout is None else axes_for(layout, jnp.shape(leaf))
    return (leaf if axes is None else in_matrices(leaf, axes)), axes


def any_known(state: Any) -> bool:
    """Whether the layout of any weight of a state was given to `attach`."""
    leaves = jax.tree.leaves(resolved(state), is_leaf=is_weight)
    return any(matrices_of(leaf)[1] is not None for leaf in leaves)
