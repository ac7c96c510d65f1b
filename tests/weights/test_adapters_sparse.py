"""N:M sparsity: exact counts, straight gradients, the decay of what is pruned; BDWP's two masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from jaxpara.weights.sparse import largest

KEY = jax.random.key(0)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def with_ties(seed, *shape):
    return np.round(2 * normal(seed, *shape)) / 2


def mask_by_hand(w, n, m, axis):
    """A loop over groups; of equal magnitudes the first remain."""
    rows = np.moveaxis(w, axis, -1)
    mask = np.zeros(rows.shape, bool)
    for place in np.ndindex(*rows.shape[:-1]):
        for start in range(0, rows.shape[-1], m):
            group = np.abs(rows[place][start : start + m])
            mask[place][start + np.argsort(-group, kind="stable")[:n]] = True
    return np.moveaxis(mask, -1, axis)


SLOW = [pytest.param(*nm, marks=pytest.mark.slow) for nm in ((1, 2), (3, 4), (4, 4), (2, 8))]


@pytest.mark.parametrize(("n", "m"), [(2, 4), *SLOW])
def test_exactly_n_of_each_m_remain_along_either_axis_ties_included(n, m):
    for w in (normal(0, 2, 16, 8), with_ties(1, 2, 16, 8), np.zeros((2, 16, 8))):
        for axis in (-2, -1):
            mask = np.asarray(jax.jit(largest, static_argnums=(1, 2, 3))(w, n, m, axis))
            np.testing.assert_array_equal(mask, mask_by_hand(w, n, m, axis))
            groups = np.moveaxis(mask, axis, -1).reshape(-1, m)
            assert (groups.sum(axis=1) == n).all()


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def test_gradients_pass_straight_and_the_penalty_decays_pruned_weights(double):
    w, weights = with_ties(0, 2, 8, 4), normal(1, 2, 8, 4)
    t = jp.sparse_nm(n=2, m=4, decay=3e-2)
    state = t.attach(KEY, {"w": w, "bias": normal(2, 4)})
    mask = mask_by_hand(w, 2, 4, -2)
    np.testing.assert_array_equal(t.effective(state)["w"], w * mask)
    np.testing.assert_array_equal(t.merge(state)["w"], w * mask)

    def loss(state):
        return jnp.sum(weights * t.effective(state)["w"]) + t.penalty(state)

    found = jax.jit(jax.grad(loss))(state)["w"].base
    np.testing.assert_allclose(found, weights + 3e-2 * (1 - mask) * w, rtol=1e-13)
    np.testing.assert_allclose(t.penalty(state), 1.5e-2 * np.sum(w[~mask] ** 2), rtol=1e-13)
    plain = jp.sparse_nm(decay=0.0)
    np.testing.assert_array_equal(jax.grad(plain.penalty)(plain.attach(KEY, {"w": w}))["w"].base, 0)


@pytest.mark.slow
def test_the_decay_does_not_depend_on_how_often_a_weight_is_used():
    t = jp.sparse_nm(n=1, m=2, decay=1.0)
    state = t.attach(KEY, {"w": np.float32(normal(0, 4, 4))})
    twice = jp.lift(lambda p, x: x @ p["w"] @ p["w"])

    def of(weight):
        x = jnp.zeros((1, 4))
        return jax.grad(lambda s: weight * jnp.sum(twice(s, x)) + t.penalty(s))(state)["w"].base

    mask = mask_by_hand(state["w"].base, 1, 2, -2)
    np.testing.assert_array_equal(of(1.0), np.where(mask, 0, state["w"].base))
    np.testing.assert_array_equal(of(8.0), of(1.0))


@pytest.mark.slow
def test_methods_without_a_penalty_have_none_and_a_chain_has_those_of_its_members():
    w = {"w": np.float32(normal(0, 4, 4))}
    assert jp.lora(rank=2).penalty(jp.lora(rank=2).attach(KEY, w)) == 0
    sparse = jp.sparse_nm(n=1, m=2)
    both = jp.chain(sparse, jp.fake_quant())
    alone = sparse.penalty(sparse.attach(KEY, w))
    assert alone > 0
    assert both.penalty(both.attach(KEY, w)) == alone


def test_bdwp_gradients_against_a_hand_written_backward_pass(double):
    w, x, g = normal(0, 8, 4), normal(1, 3, 5, 8), normal(2, 3, 5, 4)
    t = jp.bdwp(n=1, m=2)
    state = t.attach(KEY, w)
    forward, backward = (w * mask_by_hand(w, 1, 2, axis) for axis in (-2, -1))

    def run(state, x):
        return jnp.einsum("bti,io->bto", x, state)

    out, pull = jax.vjp(jp.lift(run), state, x)
    np.testing.assert_allclose(out, x @ forward, rtol=1e-12)
    of_state, of_x = pull(g)
    np.testing.assert_allclose(of_x, g @ backward.T, rtol=1e-12)
    np.testing.assert_allclose(of_state.base, np.einsum("bti,bto->io", x, g), rtol=1e-12)
    # Forward mode is the same linear map.
    dx = normal(3, 3, 5, 8)
    tangent = jax.jvp(lambda x: jp.lift(run)(state, x), (x,), (dx,))[1]
    np.testing.assert_allclose(tangent, dx @ backward, rtol=1e-12)
    # The derivative of the dense weights would be another one.
    assert not np.allclose(forward, backward)
    assert [use.how for use in t.report(state, run, x).uses] == ["rule"]


@pytest.mark.slow
def test_bdwp_in_a_scan_over_layers(double):
    w, x = normal(0, 3, 8, 8), normal(1, 5, 8)
    t = jp.bdwp(n=2, m=4)
    state = t.attach(KEY, w)
    run = jp.lift(lambda w, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0])
    found = jax.grad(lambda s, x: jnp.sum(run(s, x)), (0, 1))(state, x)
    inputs, h = [], x
    for layer in w:
        inputs.append(h)
        h = np.tanh(h @ (layer * mask_by_hand(layer, 2, 4, -2)))
    g, wanted = np.ones_like(h), []
    for layer, before in zip(w[::-1], inputs[::-1], strict=True):
        g = g * (1 - h**2)
        wanted.append(before.T @ g)
        g, h = g @ (layer * mask_by_hand(layer, 2, 4, -1)).T, before
    np.testing.assert_allclose(found[0].base, np.stack(wanted[::-1]), rtol=1e-10)
    np.testing.assert_allclose(found[1], g, rtol=1e-10)


@pytest.mark.slow
def test_bdwp_gradients_of_single_examples_add_up(double):
    w, x = normal(0, 8, 4), normal(1, 3, 8)
    t = jp.bdwp(n=1, m=2)
    state = t.attach(KEY, w)
    run = jp.lift(lambda w, x: jnp.sum(jnp.sin(x @ w)))
    both = jax.grad(run, (0, 1))
    (each, rows), (whole, inputs) = jax.vmap(both, (None, 0))(state, x), both(state, x)
    np.testing.assert_allclose(each.base.sum(0), whole.base, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(rows, inputs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jp.sparse_nm(n=5, m=4), "n=5, m=4: of each group of m weights n remain"),
        (lambda: jp.bdwp(n=0), "n=0, m=4"),
        (lambda: jp.sparse_nm(decay=-1.0), "decay=-1.0: give zero or more"),
        (
            lambda: jp.sparse_nm().attach(KEY, {"w": normal(0, 6, 4)}),
            r"m=4 does not divide the 6 rows .* give one of \[2, 3, 6\], or narrow where=",
        ),
        (
            lambda: jp.bdwp().attach(KEY, {"w": normal(0, 8, 6)}),
            r"m=4 does not divide the 6 columns",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
