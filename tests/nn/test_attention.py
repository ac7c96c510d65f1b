"""Attention against numpy's complex rotations, and its blocks against all scores at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpara import nn

BATCH, WIDTH, HEADS, BASE = 2, 16, 2, 10_000.0
SIZE = WIDTH // HEADS


def documents(time):
    """Where documents start: in the first sequence twice, once inside a block."""
    return np.zeros((BATCH, time), bool) | (np.arange(time) == 3) | (np.arange(time) == 70)


def made():
    mixer = nn.mixers.attention(heads=HEADS)(WIDTH)
    return mixer, mixer.init(jax.random.key(0))


def inputs(time):
    return jax.random.normal(jax.random.key(1), (BATCH, time, WIDTH))


def attended(x, max_length, reset=None):
    mixer, params = made()
    return mixer.run(params, mixer.start(params, BATCH, max_length, x.dtype), x, reset)[1]


def by_numpy(x, reset):
    """Query by query in float64; a pair of entries is a complex number that turns with time."""
    time = x.shape[1]
    kernel = np.asarray(made()[1]["kernel"], np.float64)
    q, k, v = np.split(np.asarray(x, np.float64) @ kernel, 3, axis=-1)
    half = SIZE // 2
    turns = np.arange(time)[:, None] * BASE ** (-np.arange(half) / half)
    out = np.zeros((BATCH, time, WIDTH))
    for b, h, t in np.ndindex(BATCH, HEADS, time):
        part = slice(h * SIZE, (h + 1) * SIZE)
        qc, kc = (
            (a[b, :, part][:, : SIZE // 2] + 1j * a[b, :, part][:, SIZE // 2 :])
            * np.exp(1j * turns)
            for a in (q, k)
        )
        first = max(np.flatnonzero(reset[b, : t + 1]), default=0)
        scores = np.real(kc[first : t + 1] @ np.conj(qc[t])) / np.sqrt(SIZE)
        p = np.exp(scores - scores.max())
        out[b, t, part] = (p / p.sum()) @ v[b, first : t + 1, part]
    return out


# One block; blocks that see the slots up to their own, the last one shorter; blocks that see all.
@pytest.mark.parametrize(("time", "max_length"), [(6, 8), (150, 150), (150, 160)])
def test_attention_equals_softmax_over_complex_rotations(time, max_length):
    x, reset = inputs(time), documents(time)
    y = jax.jit(attended, static_argnums=1)(x, max_length, jnp.asarray(reset))
    # 1e-4: angles of 150 turns are rounded to 1e-5 of a turn in float32.
    np.testing.assert_allclose(y, by_numpy(x, reset), rtol=1e-4, atol=3e-6)


def test_blocks_have_the_gradients_of_all_scores_at_once(monkeypatch):
    x, weights = inputs(150), np.random.default_rng(0).normal(size=(BATCH, 150, WIDTH))
    gradient = jax.grad(lambda x: jnp.sum(weights * attended(x, 150, jnp.asarray(documents(150)))))
    found = jax.jit(gradient)(x)
    monkeypatch.setattr("jaxpara.nn.attention._BLOCK", 150)
    whole = jax.jit(lambda x: gradient(x))(x)
    # 1e-5: gradients of keys are summed over blocks of queries in another order.
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=2e-6 * np.max(np.abs(whole)))
    assert not np.array_equal(found, whole)  # two programs were compared
