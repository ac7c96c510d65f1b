"""The fused solver: a whole multiple-shooting solve in one kernel, and its gradients in another.

The kernel is made from the user's step, see `elementwise`. `shooting` takes over for a step that
no kernel takes, on a platform without kernels, and where time is sharded over a mesh axis. The
reason is logged once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpara.recurrence.kernel.elementwise import prepare
from jaxpara.recurrence.lanes import vary_like
from jaxpara.recurrence.solve import explicit_meshes, sharded_time
from jaxpara.recurrence.solve.linear_kernel import KERNELS, in_words, say
from jaxpara.recurrence.solve.shooting import shooting
from jaxpara.recurrence.solve.tangent_leaves import floating
from jaxpara.recurrence.system import Leaves, Settings, Solution, System
from pallas_kernels import nonlinear_recurrence


def fused(system: System, settings: Settings, guess: Leaves | None = None) -> Solution:
    """Solves in one kernel where it can, by `shooting` where it cannot; arguments as for that.

    A kernel starts from the exact state before each window and has no use for a guess.
    """
    try:
        return _by_kernel(system, settings)
    except NotImplementedError as refusal:
        say(in_words(refusal), "shooting")
    if guess is not None and guess[0].shape[0] == 1:
        guess = None  # of a solve that did run in a kernel
    return shooting(system, settings, guess)


def obstacle(system: System, settings: Settings) -> str | None:
    """Why `shooting` runs instead, found by tracing the kernel, or None; arguments as for that."""
    try:
        jax.eval_shape(lambda: _by_kernel(system, settings).states)
    except NotImplementedError as refusal:
        return in_words(refusal)
    return None


def _by_kernel(system: System, settings: Settings) -> Solution:
    if settings.axis is not None:
        raise NotImplementedError(f"time is sharded over {settings.axis!r}")
    if settings.implementation != "xla" and (why := explicit_meshes.no_kernel()):
        raise NotImplementedError(why)
    init, xs = list(system.init), jax.tree.leaves(system.xs)
    tree = jax.tree.structure(system.xs)

    def step(consts: Leaves, state: Leaves, x: Leaves) -> Any:
        del consts
        return system.step(state, jax.tree.unflatten(tree, x))

    prepared = prepare(step, [], init, xs)
    operands = prepared.operands([], _turned(xs, system.reverse))
    # Inside shard_map a kernel takes operands that vary over the same mesh axes.
    inputs, params, first = vary_like((*operands, prepared.rows(init)), operands, init)
    solved = nonlinear_recurrence.forward(
        prepared.cell,
        first,
        inputs,
        params,
        tol=settings.tol,
        max_iters=settings.max_iters,
        certain=system.certain and not system.kinks,  # see `certificate`
        reverse=system.reverse,
        affine=prepared.affine,  # then one correction is exact but for rounding
        chunks=settings.chunks,
        window=settings.window,
        implementation=settings.implementation or KERNELS,
    )
    solved = vary_like(solved, first)  # kernels say nothing about mesh axes
    states = _turned(prepared.leaves(solved.states), system.reverse)
    before = sharded_time.preceding(None, init, states)
    # Outputs that are states are not computed again: the caller drops them from the step.
    ys = jax.vmap(lambda s, x: system.step(s, x)[1])(before, system.xs)
    steps = jnp.max(solved.fallback_steps)
    return Solution(
        states,
        ys,
        steps == 0,
        jnp.max(solved.iterations),
        jnp.max(solved.residual),
        steps,
        [leaf[None] for leaf in init],
    )


def gradients(
    step: Callable[..., Any],
    settings: Settings,
    consts: Leaves,
    init: Leaves,
    xs: Leaves,
    states: Leaves,
    cotangents: Leaves,
    reverse: bool = False,
    still: Callable[..., Any] = lambda *inputs: inputs,
) -> tuple[list[jax.Array], list[jax.Array]] | None:
    """Gradients of `sum(states * cotangents)` by one kernel, or None if there is none.

    Args:
      step: `(consts, state, x) -> (state, ys)`.
      settings: as for `fused`.
      consts, init, xs: what the states were solved from.
      states: `[time, *leaf]`.
      cotangents: of the states.
      reverse: scan order runs against time, as for `System`.
      still: `(consts, xs) -> (consts, xs)`, stops the derivative by what has none.

    Returns:
      Those of `init`, and those of the floating leaves of `consts` and `xs`, in this order.
    """
    if settings.axis is not None:
        return None
    if settings.implementation != "xla" and explicit_meshes.no_kernel():
        return None  # `fused` has said why
    (c, x), fill = floating((list(consts), list(xs)))
    try:
        prepared = prepare(step, consts, init, xs)

        def operands(*given: jax.Array) -> Any:
            consts, xs = still(*fill(given))
            return vary_like(prepared.operands(consts, _turned(xs, reverse)), states)

        (inputs, params), pull = jax.vjp(operands, *c, *x)
        found = nonlinear_recurrence.backward(
            prepared.cell,
            prepared.rows(init),
            inputs,
            params,
            prepared.rows(_turned(states, reverse)),
            prepared.rows(_turned(cotangents, reverse)),
            reverse=reverse,
            chunks=settings.chunks,
            window=settings.window,
            implementation=settings.implementation or KERNELS,
        )
    except NotImplementedError as refusal:
        say(in_words(refusal), "chunked adjoint")
        return None
    found = vary_like(found, states)

    def summed(gradient: jax.Array, param: jax.Array) -> jax.Array:
        shared = param.shape[0] == 1
        whole = jnp.sum(gradient, axis=0, keepdims=True) if shared else gradient
        return whole.astype(param.dtype)

    d_params = [summed(d, p) for d, p in zip(found.params, params, strict=True)]
    return prepared.leaves(found.init), list(pull((found.xs, d_params)))


def _turned(leaves: Leaves, reverse: bool) -> list[jax.Array]:
    """Leaves in scan order back in time order, in which kernels read them, or the other way.

    The caller has turned them into scan order; XLA cancels the two, and nothing is copied.
    """
    return [leaf[::-1] for leaf in leaves] if reverse else list(leaves)


def refusal(
    step: Callable[..., Any], consts: Sequence[Any], init: Sequence[Any], xs: Sequence[Any]
) -> str | None:
    """Why no kernel can run a step, in words, or None; the leaves may be shapes."""
    try:
        prepare(step, consts, init, xs)
    except NotImplementedError as error:
        return str(error)
    return None
