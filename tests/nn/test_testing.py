"""The exported checks pass what is right and name what is wrong."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxpara as jp
from jaxpara.testing import check_model, check_scan


@pytest.mark.slow
def test_check_scan_accepts_our_scan():
    check_scan(functools.partial(jp.newton_scan, solver=jp.shooting(chunks=4)))


def wrong_direction(f, init, xs=None, length=None, reverse=False, unroll=1):
    return lax.scan(f, init, xs, length, False, unroll)


def no_gradient(f, init, xs=None, length=None, reverse=False, unroll=1):
    return lax.scan(f, lax.stop_gradient(init), xs, length, reverse, unroll)


def no_outputs(f, init, xs=None, length=None, reverse=False, unroll=1):
    return lax.scan(f, init, xs, length, reverse, unroll)[0], None


@pytest.mark.parametrize(
    ("scan", "message"),
    [
        (wrong_direction, r"reversed: values, leaf .*off by"),
        (no_gradient, r"diagonal: gradients, leaf .*off by"),
        (no_outputs, r"diagonal: values: structure"),
    ],
)
def test_check_scan_names_what_is_wrong(scan, message):
    with pytest.raises(AssertionError, match=message):
        check_scan(scan)


def running_sum(decay):
    """A model whose output is a decaying sum of its tokens; right if `decay` is 0.5."""

    def run(params, state, tokens):
        def step(s, x):
            s = 0.5 * s + x
            return s, s

        state, ys = lax.scan(step, state, tokens.T.astype(jnp.float32))
        return decay * 2 * state, ys.T

    def start(params, batch, length):
        return jnp.zeros(batch)

    def apply(params, tokens):
        return run(params, start(params, tokens.shape[0], 0), tokens)[1]

    return jp.Model(lambda key: {}, apply, start, run)


def test_check_model_accepts_the_laws_and_names_the_broken_one():
    tokens = jnp.arange(10).reshape(2, 5)
    check_model(running_sum(0.5), tokens)
    with pytest.raises(AssertionError, match="run in pieces == run of the whole"):
        check_model(running_sum(0.4), tokens)
    wrong = running_sum(0.5)._replace(apply=lambda params, tokens: jnp.zeros(tokens.shape))
    with pytest.raises(AssertionError, match="apply == run from start"):
        check_model(wrong, tokens)
    with pytest.raises(ValueError, match="no start or no run"):
        check_model(jp.Model(lambda key: {}, lambda params, x: x), tokens)
    with pytest.raises(ValueError, match="expected at least two steps"):
        check_model(running_sum(0.5), tokens[:, :1])


def test_vmap_of_a_scan_is_part_of_the_check():
    def forgets_rows(f, init, xs=None, length=None, reverse=False, unroll=1):
        @jax.custom_batching.custom_vmap
        def same_for_all(init):
            return init

        @same_for_all.def_vmap
        def _(axis_size, batched, init):
            return jax.tree.map(lambda a: jnp.broadcast_to(a[:1], a.shape), init), batched[0]

        @jax.custom_jvp
        def enter(init):
            return same_for_all(init)

        enter.defjvp(lambda p, t: (enter(*p), *t))
        return lax.scan(f, enter(init), xs, length, reverse, unroll)

    with pytest.raises(AssertionError, match="under vmap"):
        check_scan(forgets_rows)
