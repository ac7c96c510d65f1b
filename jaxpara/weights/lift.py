"""Runs a function of parameters on weights that are not arrays, building them late or never.

The function is traced on the shapes of the effective weights, and its jaxpr is walked with the
weights themselves as values (see `walk`). Rules of `custom_jvp` and `custom_vjp` functions are
theirs: such a function gets dense arrays.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpara import compat
from jaxpara.arguments import kind_of
from jaxpara.tree import by_path, path_of
from jaxpara.weights.lazy import array, is_lazy
from jaxpara.weights.matrices import lazy_leaf, matrices_of
from jaxpara.weights.pools import is_pooled, whole
from jaxpara.weights.walk import Use, Walk
from jaxpara.weights.weight import is_weight, shape_of

LIFTED = "lifted_from"


class Report(NamedTuple):
    """Every use of every reparameterised leaf in one call of a function.

    Attributes:
      uses: in the order of the program; a loop's body counts once.
      leaves: path -> (names of the methods, innermost first; shape).
      parts, bases: how many numbers they hold.
    """

    uses: tuple[Use, ...]
    leaves: dict[str, tuple[tuple[str, ...], tuple[int, ...]]]
    parts: int
    bases: int

    def __str__(self) -> str:
        lines = [
            f"{len(self.leaves)} leaves; {self.parts:,} numbers in parts, {self.bases:,} in bases"
        ]
        for path, (methods, shape) in self.leaves.items():
            uses = [
                f"{u.primitive}: {u.how}{u.remark and f' ({u.remark})'}"
                for u in self.uses
                if u.path == path
            ]
            lines.append(
                f"  {path} {list(shape)} {' > '.join(methods)}: {', '.join(uses) or 'not used'}"
            )
        return "\n".join(lines)


class _Call(NamedTuple):
    """A function with what is not an array bound to it, and the arrays."""

    function: Callable[[Any, list[Any]], Any]
    arrays: list[Any]
    signature: Any


def _is_array(leaf: Any) -> bool:
    # NumPy's integers and truth values may be sizes and branches, as Python's are.
    kinds = (float, complex, np.ndarray, np.inexact, jax.Array, jax.ShapeDtypeStruct)
    return isinstance(leaf, kinds)


def _bind(function, args, kwargs) -> _Call:
    leaves, structure = jax.tree.flatten((args, kwargs))
    static = {i: leaf for i, leaf in enumerate(leaves) if not _is_array(leaf)}
    for leaf in static.values():
        if getattr(type(leaf), "__hash__", None) is None:
            raise TypeError(
                f"lift: an input of type {type(leaf).__name__} is neither an array nor hashable; "
                "bind it to the function first, with functools.partial or a lambda"
            )

    def call(params, arrays):
        left = iter(arrays)
        whole = [static[i] if i in static else next(left) for i in range(len(leaves))]
        args, kwargs = jax.tree.unflatten(structure, whole)
        return function(params, *args, **kwargs)

    arrays = [leaf for i, leaf in enumerate(leaves) if i not in static]
    # By type too: 1 and True are equal and different branches.
    typed = tuple((i, type(leaf), leaf) for i, leaf in static.items())
    return _Call(call, arrays, (structure, typed))


class _Traced(NamedTuple):
    """A function traced on effective shapes."""

    jaxpr: Any
    out_tree: Any


def _shape(keys: Any, leaf: Any) -> jax.ShapeDtypeStruct:
    if not is_weight(leaf) and not hasattr(leaf, "dtype"):
        try:
            jax.typeof(leaf)
        except TypeError:
            raise TypeError(
                f"lift: the leaf {path_of(keys)!r} of the state is a {kind_of(leaf)}, not an "
                "array: attach to the arrays only, as eqx.partition(module, eqx.is_array) gives "
                "them, and put the rest back in the function"
            ) from None
    return shape_of(leaf)


def _trace(function, state, arrays) -> _Traced:
    shapes = jax.tree_util.tree_map_with_path(_shape, whole(state), is_leaf=is_weight)
    closed, out = jax.make_jaxpr(function, return_shape=True)(shapes, arrays)
    return _Traced(closed, jax.tree.structure(out))


def traced(
    function: Callable[..., Any], state: Any, args: Any, kwargs: Any
) -> tuple[_Traced, Any, list[Any]]:
    """A function traced on the shapes of effective weights.

    Args:
      function: of parameters, lifted or not.
      state: the parameters, some of them `Weight`s.
      args, kwargs: arrays or shapes.

    Returns:
      The trace, the values that it closes over, and the inputs that are arrays.
    """
    # Not `__wrapped__`: other libraries' functions have that too.
    call = _bind(getattr(function, LIFTED, function), args, kwargs)
    found = _trace(call.function, state, call.arrays)
    return found, getattr(found.jaxpr, "consts", ()), call.arrays


def _evaluate(trace: _Traced, uses: dict[Any, Use], consts, state, arrays):
    def lazy(keys, leaf):
        return lazy_leaf(leaf, path_of(keys)) if is_weight(leaf) else leaf

    state = jax.tree_util.tree_map_with_path(lazy, whole(state), is_leaf=is_weight)
    flat = [*jax.tree.leaves(state, is_leaf=is_lazy), *arrays]
    outs = Walk(uses).run(compat.open_jaxpr(trace.jaxpr), consts, flat)
    return jax.tree.unflatten(trace.out_tree, list(map(array, outs)))


def _signature(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    try:
        return structure, tuple(map(jax.typeof, leaves))
    except TypeError:  # some are no arrays
        jax.tree_util.tree_map_with_path(_shape, whole(tree), is_leaf=is_weight)
        raise


def lift(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function of parameters run on a tree in which some leaves are `Weight`s.

    `lift(f)(state, *inputs) == f(effective(state), *inputs)`, in values and gradients.

    Args:
      function: `(params, *inputs, **inputs) -> outputs`, traceable. Inputs that are not arrays
        (integers, truth values, text, functions) are passed on unchanged, so they may be sizes
        and branches. They must be hashable, and another value or type is another signature.

    Returns:
      A function of the same type. It is traced once for each signature, and again under other
      settings of JAX, such as `enable_x64`. An eager call is compiled as a whole.

    Raises:
      TypeError: `function` cannot be called; when called, for an input that is neither an array
        nor hashable, or a leaf of the state that is no array.
      ValueError: when called, for one of the two parts of a state that `jp.split` makes.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxpara as jp
      >>> def network(params, x):
      ...     return jnp.tanh(x @ params["w"])
      >>> t = jp.lora(rank=2)
      >>> state = t.attach(jax.random.key(0), {"w": jnp.ones((8, 3))})
      >>> x = jnp.ones((5, 8))
      >>> found = jp.lift(network)(state, x)  # x W + s (x A) B: A B is never built
      >>> bool(jnp.allclose(found, network(t.effective(state), x)))
      True
    """
    if not callable(function):
        raise TypeError(f"lift got {function!r}; expected a function (params, *inputs) -> outputs")
    known: dict[Any, Any] = {}

    @functools.wraps(function)
    def lifted(state, *args, **kwargs):
        if not any(map(is_weight, jax.tree.leaves(state, is_leaf=is_weight))):
            return function(state, *args, **kwargs)
        call = _bind(function, args, kwargs)
        arguments = call.signature, _signature(state), _signature(call.arrays)
        signature = arguments, compat.trace_context()
        if signature not in known:
            trace = _trace(call.function, state, call.arrays)
            consts = getattr(trace.jaxpr, "consts", ())
            if any(map(compat.is_tracer, consts)):
                # It closes over values of a surrounding transform: this trace is for this call.
                return _evaluate(trace, {}, consts, state, call.arrays)
            known[signature] = jax.jit(functools.partial(_evaluate, trace, {})), consts
        run, consts = known[signature]
        return run(consts, state, call.arrays)

    setattr(lifted, LIFTED, function)
    return lifted


def report(function: Callable[..., Any], state: Any, *args: Any, **kwargs: Any) -> Report:
    """How a function uses the reparameterised leaves of a tree; nothing is computed.

    Args:
      function: of parameters, lifted or not.
      state: the tree.
      args, kwargs: arrays or shapes.

    Returns:
      The report.

    Raises:
      ValueError: two leaves have the same path.
    """
    trace, consts, arrays = traced(function, state, args, kwargs)
    uses: dict[Any, Use] = {}
    jax.eval_shape(functools.partial(_evaluate, trace, uses), consts, state, arrays)
    pools = [node.pools for node in jax.tree.leaves(state, is_leaf=is_pooled) if is_pooled(node)]
    leaves, bases = {}, 0
    parts = sum(pool.size for pool in jax.tree.leaves(pools))
    for path, leaf in by_path(whole(state), is_leaf=is_weight).items():
        if not is_weight(leaf):
            continue
        methods, inner, held = [], matrices_of(leaf)[0], 0
        while is_weight(inner):
            methods.append(inner.method.name)
            common = dict(inner.shared)
            parts += sum(part.size for name, part in inner.parts.items() if name not in common)
            held = math.prod(shape_of(inner).shape)  # not the bytes of what is packed
            inner = inner.base
        bases += held
        leaves[path] = (tuple(reversed(methods)), shape_of(leaf).shape)
    return Report(tuple(uses.values()), leaves, parts, bases)
