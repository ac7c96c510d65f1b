"""DEER, quasi-DEER and ELK, reimplemented from their papers to measure their cost as published.

Each takes one sequence, holds all its Jacobians, and solves the linear recurrence of an iteration
by an associative scan, on every platform:

    DEER:        h' from the elements (J_t, f_t - J_t h_{t-1}), J_t the full Jacobian
    quasi-DEER:  the same with the diagonal of J_t
    ELK:         h' is the filtered mean of h'_t = d_t h'_{t-1} + f_t - d_t h_{t-1} + w_t, with d_t
                 the diagonal of J_t, under the observations h_t = h'_t + v_t; w_t has variance 1,
                 v_t has 1 / `damping`

until max |h' - h| <= tol, from zeros. Gradients are implicit: all three do one more associative
scan over the full Jacobian, or over its diagonal if it is known to be diagonal and the method is
not DEER. [deer] [elk]
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

METHODS = ("deer", "quasi_deer", "elk")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def solve(
    step: Callable[[Any, jax.Array, Any], jax.Array],
    options: tuple[str, bool, float, float, int],
    params: Any,
    init: jax.Array,
    xs: Any,
) -> jax.Array:
    """Computes all states of `h_t = step(params, h_{t-1}, x_t)` for one sequence.

    Args:
      step: the recurrence.
      options: the method; whether the Jacobian is known to be diagonal, which DEER does not use;
        `tol`; ELK's `damping`, 1e-8 in the paper's code; the largest number of iterations.
      params: of the step.
      init: `[state]`.
      xs: leaves `[time, ...]`.

    Returns:
      `[time, state]`.
    """
    method, diagonal, tol, damping, max_iters = options
    length = jax.tree.leaves(xs)[0].shape[0]

    def improved(states):
        before = _before(init, states)
        ends = jax.vmap(lambda h, x: step(params, h, x))(before, xs)
        if method == "deer":
            jacobians = _jacobians(step, params, before, xs)
            offsets = ends - jnp.einsum("tij,tj->ti", jacobians, before)
            return _recur(jacobians, offsets.at[0].set(ends[0]))
        slopes = _slopes(step, params, before, xs, diagonal)
        offsets = (ends - slopes * before).at[0].set(ends[0])
        if method != "elk":
            return _recur(slopes, offsets)
        return _filtered(slopes.at[0].set(0.0), offsets, states, damping)

    def proceed(carry):
        states, _, count = carry
        new = improved(states)
        new = jnp.where(jnp.isnan(new), 0.0, jnp.clip(new, -1e8, 1e8))
        return new, jnp.max(jnp.abs(new - states)), count + 1

    guess = jnp.zeros((length, *init.shape), init.dtype)
    start = (guess, jnp.full((), jnp.inf, init.dtype), jnp.zeros((), jnp.int32))
    return lax.while_loop(lambda c: (c[1] > tol) & (c[2] < max_iters), proceed, start)[0]


@solve.defjvp
def _solve_jvp(step, options, primals, tangents):
    params, init, xs = primals
    states = solve(step, options, params, init, xs)
    before = _before(init, states)
    method, diagonal, *_ = options
    if diagonal and method != "deer":
        jacobians = _slopes(step, params, before, xs, diagonal)
    else:
        jacobians = _jacobians(step, params, before, xs)
    d_params, d_init, d_xs = tangents
    every = jax.vmap(step, in_axes=(None, 0, 0))
    _, offsets = jax.jvp(lambda p, x: every(p, before, x), (params, xs), (d_params, d_xs))
    first = jacobians[0] @ d_init if jacobians.ndim == 3 else jacobians[0] * d_init
    return states, _recur(jacobians, offsets.at[0].add(first))


def _before(init: jax.Array, states: jax.Array) -> jax.Array:
    return jnp.concatenate([init[None], states[:-1]])


def _jacobians(step, params, before, xs) -> jax.Array:
    return jax.vmap(lambda h, x: jax.jacfwd(lambda h: step(params, h, x))(h))(before, xs)


def _slopes(step, params, before, xs, diagonal: bool) -> jax.Array:
    """Computes diagonals `[time, D]`, by one tangent if the Jacobian is known to be diagonal."""
    if not diagonal:
        return jnp.diagonal(_jacobians(step, params, before, xs), axis1=1, axis2=2)

    def one(h, x):
        return jax.jvp(lambda h: step(params, h, x), (h,), (jnp.ones_like(h),))[1]

    return jax.vmap(one)(before, xs)


def _recur(a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes all `h_t = a_t h_{t-1} + b_t` from zero; `a` is `[time, D, D]` or `[time, D]`."""

    def combine(left, right):
        (a1, b1), (a2, b2) = left, right
        if a.ndim == b.ndim:
            return a2 * a1, a2 * b1 + b2
        return a2 @ a1, jnp.einsum("...ij,...j->...i", a2, b1) + b2

    return lax.associative_scan(combine, (a, b))[1]


def _filtered(slopes: jax.Array, offsets: jax.Array, seen: jax.Array, damping: float) -> jax.Array:
    """Computes the filtered means of independent scalar chains, `[time, D]`.

    An element is the law of a state given the state h at its left end, `N(a h + b, c)`, and the
    likelihood of h under the observations inside: `exp(eta h - j h^2 / 2)`.
    """
    gain = damping / (1 + damping)  # of an observation after one step's noise of variance 1
    first = (
        slopes * (1 - gain),
        offsets + gain * (seen - offsets),
        jnp.full_like(slopes, 1 - gain),
        slopes * gain * (seen - offsets),
        slopes**2 * gain,
    )

    def combine(left, right):
        a1, b1, c1, eta1, j1 = left
        a2, b2, c2, eta2, j2 = right
        spread = 1 + c1 * j2
        return (
            a1 * a2 / spread,
            a2 * (b1 + c1 * eta2) / spread + b2,
            a2**2 * c1 / spread + c2,
            a1 * (eta2 - j2 * b1) / spread + eta1,
            a1**2 * j2 / spread + j1,
        )

    return lax.associative_scan(combine, first)[1]
