"""A small recurrence, and the comparison of `newton_scan` with `lax.scan` on any other."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxpara as jp
from tests.recurrence.kit import QUICK

SHOOTING = jp.shooting(chunks=3)
SOLVERS = {"shooting": SHOOTING, "newton": jp.newton(), "sequential": jp.sequential()}
XS = np.linspace(-1.0, 1.0, 14, dtype=np.float32).reshape(7, 2)
H0 = np.array([0.3, -0.2], np.float32)


def step(h, x):
    h = jnp.tanh(0.8 * h + x)
    return h, h * x


def quick(function):
    return jax.jit(function, compiler_options=QUICK)


def ours(*args, solver=SHOOTING, **named):
    return jp.newton_scan(*args, solver=solver, **named)


def assert_same(found, wanted, tolerance=2e-6):
    """Equal structures, dtypes and values."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for f, w in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (f.shape, f.dtype) == (w.shape, w.dtype)
        if jnp.issubdtype(f.dtype, jax.dtypes.prng_key):
            f, w = jax.random.key_data(f), jax.random.key_data(w)
        if jnp.issubdtype(f.dtype, jnp.floating):
            f, w = (v.astype(jnp.promote_types(v.dtype, jnp.float32)) for v in (f, w))
        np.testing.assert_allclose(f, w, rtol=tolerance, atol=tolerance)


def values_and_gradients(f, scan):
    """What the scan of `f` returns, and the gradients of the sum of its squares."""

    def loss(init, xs):
        out = scan(f, init, xs)
        return sum(jnp.sum(v**2) for v in jax.tree.leaves(out)), out

    return jax.value_and_grad(loss, (0, 1), has_aux=True)


def by_both(run, scan=ours):
    """What `run(scan)` and `run(lax.scan)` give, as one program: two would cost more to compile."""
    return quick(lambda *args: (run(scan)(*args), run(lax.scan)(*args)))


def assert_runs_agree(run, *args, scan=ours, tolerance=2e-6):
    found, wanted = by_both(run, scan)(*args)
    assert_same(found, wanted, tolerance)


def assert_is_lax_scan(
    f, init, xs=None, length=None, reverse=False, unroll=1, *, solver=SHOOTING, tol=2e-6
):
    def run(scan):
        return lambda init, xs: scan(f, init, xs, length, reverse, unroll)

    assert_runs_agree(run, init, xs, scan=lambda *args: ours(*args, solver=solver), tolerance=tol)
