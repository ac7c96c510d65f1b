"""Options of quantisers where papers choose otherwise than the defaults here."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxpara as jp
from jaxpara.weights.weight import Weight
from tests.weights.kit import attached, effective


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def replaced(weight, **parts):
    return Weight(weight.base, {**weight.parts, **parts}, weight.method)


def test_at_two_bits_a_full_grid_has_four_levels_and_a_symmetric_one_three():
    w = np.concatenate([normal(0, 64, 4), -np.abs(normal(1, 8, 4)) * 3]).astype(np.float32)
    for full, low in ((True, -2), (False, -1)):
        lsq, lr_qat = (make(bits=2, full=full) for make in (jp.lsq, jp.lr_qat))
        state = attached(lsq, w)["w"]
        assert state.parts["scale"].shape == (1, 1, 4)
        scale = np.float64(state.parts["scale"][0])
        # The paper's start, 2 <|W|> / sqrt(Q), does not depend on the lower end.
        np.testing.assert_allclose(scale[0], 2 * np.mean(np.abs(w), 0), rtol=1e-6)
        wanted = np.clip(np.round(w / scale), low, 1)
        np.testing.assert_allclose(lsq.effective({"w": state})["w"], wanted * scale, rtol=1e-6)
        merged = lsq.merge({"w": state})["w"]
        assert list(np.unique(merged.base)) == list(range(low, 2))
        packed = jp.weights.pack({"w": merged})
        assert packed["w"].base.dtype == jnp.uint8
        np.testing.assert_array_equal(lsq.effective(packed)["w"], lsq.effective({"w": state})["w"])
        state = attached(lr_qat, w)["w"]
        b = 3 * normal(2, 8, 4).astype(np.float32)
        state = replaced(state, b=b)
        scale = np.float64(state.parts["scale"][0])
        update = np.float64(state.parts["a"]) @ np.float64(b)
        wanted = np.clip(np.round(np.clip(w / scale, low, 1) + update), low, 1)
        merged = lr_qat.merge({"w": state})["w"]
        assert np.mean(merged.base != wanted) < 0.01 and set(np.unique(wanted)) >= {low, 1}
        assert np.min(merged.base) == low
    with pytest.raises(TypeError, match="full"):
        jp.l4q(full=True)


def test_easy_quant_keeps_the_outliers_of_a_layer_wherever_they_are():
    w = np.stack([normal(4, 64, 16), normal(5, 64, 16)])
    w[0, :20, 3] *= 30  # more than a column has room for
    outliers = np.abs(w) >= 3 * np.std(w, axis=(1, 2), keepdims=True)
    by = {kind: jp.easy_quant(bits=3, share=0.05, by=kind) for kind in ("layer", "column")}
    found = {kind: effective(t, w) for kind, t in by.items()}
    assert 10 < np.sum(outliers[0]) <= 0.05 * 64 * 16
    np.testing.assert_array_equal(found["layer"][outliers], w[outliers])
    assert np.any(found["column"][outliers] != w[outliers])
    # What is left is on the grid of its column, at a minimum of the squared error.
    state = attached(by["layer"], w)["w"]
    scale = np.float64(state.parts["scale"][:, 0])
    rest = np.where(outliers, 0, w)
    q = np.clip(np.round(rest / scale), -3, 3)
    kept = np.where(outliers, w, q * scale)
    np.testing.assert_allclose(found["layer"], kept, atol=1e-6 * np.max(np.abs(w)))
    best = np.sum(rest * q, 1) / np.maximum(np.sum(q * q, 1), 1)
    np.testing.assert_allclose(scale[:, 0], best, rtol=2e-5)
    # Where there is no room for all, the largest stay.
    few = effective(jp.easy_quant(bits=3, share=4 / 1024, by="layer"), w)
    largest = np.argsort(-np.abs(w[0]).ravel())[:4]
    np.testing.assert_array_equal(few[0].ravel()[largest], w[0].ravel()[largest])
    with pytest.raises(ValueError, match="by='row': give 'column' or 'layer'"):
        jp.easy_quant(by="row")
