"""MoS: pools that stand once, indices that never collide, and LoRA as its limit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from tests.recurrence.kit import QUICK

KEY = jax.random.key(0)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def params():
    """Five matrices of one size, three of them in a stack, and one of another."""
    blocks = [{"kernel": normal(i, 8, 12)} for i in range(2)]
    return {"blocks": blocks, "stack": normal(2, 3, 8, 12), "head": normal(3, 12, 8)}


MATRICES = 5
T = jp.mos(rank=6, budget=2, shards=4, private=1, where=lambda path, leaf: path != "head")


def attached():
    return jax.jit(T.attach, compiler_options=QUICK)(KEY, params())


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def moved(state):
    """The state with pools that are not zero."""
    pools = {name: normal(9, *pool.shape) for name, pool in state.pools.items()}
    return dataclasses.replace(state, pools=pools)


def indices(state):
    """For each side the shards of the five matrices, `[5, rank, shards]`."""
    leaves = [*(block["kernel"] for block in state.params["blocks"]), state.params["stack"]]
    return {
        side: np.concatenate([leaf.parts[f"at_{side}"].reshape(-1, 6, 4) for leaf in leaves])
        for side in "ab"
    }


def test_the_pools_hold_as_many_numbers_as_lora_of_the_budget_at_any_rank():
    for rank in (2, 6):
        t = jp.mos(rank=rank, budget=2, shards=4, private=1)
        state = jax.eval_shape(t.attach, KEY, params())
        assert isinstance(state, jp.Pooled)
        train, _ = jp.split(state, t.trainable(state))
        count = sum(leaf.size for leaf in jax.tree.leaves(train))
        assert count == 2 * (MATRICES + 1) * (8 + 12)
        assert state.params["stack"].parts["at_a"].shape == (3, rank, 4)
        # One that shares with none has no more vectors than its pool.
        assert state.params["head"].parts["at_a"].shape == (2, 4)


def test_private_shards_belong_to_one_matrix_and_none_is_taken_twice():
    for index in indices(attached()).values():
        taken = index.reshape(MATRICES, -1)
        assert all(len(set(row)) == 24 for row in taken)
        users = [sum(shard in row for row in taken) for shard in range(2 * MATRICES * 4)]
        private = index[:, -1].reshape(-1)  # the last vector of each matrix
        assert sorted(private) == list(range(MATRICES * 4, 2 * MATRICES * 4))
        assert all(users[shard] == 1 for shard in private)
        assert max(users) > 1
    a, b = indices(attached()).values()
    assert not np.array_equal(a, b)  # drawn apart


def by_hand(state):
    """The five effective weights by a loop over shards."""
    blocks = [block["kernel"] for block in state.params["blocks"]]
    bases = np.concatenate(
        [leaf.base.reshape(-1, 8, 12) for leaf in [*blocks, state.params["stack"]]]
    )
    pools = {name.split("_")[1]: np.asarray(pool) for name, pool in state.pools.items()}
    out = []
    for i, base in enumerate(bases):
        rows = {
            side: np.stack([np.concatenate([pools[side][k] for k in vector]) for vector in at[i]])
            for side, at in indices(state).items()
        }
        out.append(base + 2 * rows["a"].T @ rows["b"])
    return np.stack(out)


def effective(state):
    tree = T.effective(state)
    return np.concatenate([*(b["kernel"][None] for b in tree["blocks"]), tree["stack"]])


def test_weights_are_assembled_from_shards_and_pools_get_summed_gradients(double):
    state = moved(attached())
    np.testing.assert_allclose(effective(state), by_hand(state), rtol=1e-12, atol=1e-14)
    weights = normal(5, MATRICES, 8, 12)

    def value(pools):
        tree = T.effective(dataclasses.replace(state, pools=pools))
        stacked = jnp.concatenate([*(b["kernel"][None] for b in tree["blocks"]), tree["stack"]])
        return jnp.sum(weights * stacked)

    found = jax.jit(jax.grad(value), compiler_options=QUICK)(state.pools)
    # The gradient of a pool is the segment sum of those of the matrices.
    pools = {name.split("_")[1]: np.asarray(pool) for name, pool in state.pools.items()}
    at = indices(state)
    for side, other in ("ab", "ba"):
        wanted = np.zeros_like(pools[side])
        for i in range(MATRICES):
            partner = np.stack([np.concatenate([pools[other][k] for k in v]) for v in at[other][i]])
            g = weights[i] if side == "a" else weights[i].T
            vectors = 2 * (g @ partner.T).T
            np.add.at(wanted, at[side][i].reshape(-1), vectors.reshape(24, -1))
        (name,) = [n for n in found if n.split("_")[1] == side]
        np.testing.assert_allclose(found[name], wanted, rtol=1e-12)


@pytest.mark.slow
def test_with_whole_vectors_all_private_it_is_lora(double):
    w = {"w": normal(0, 3, 8, 12)}
    lora, mos = jp.lora(rank=2), jp.mos(rank=2, budget=2, shards=1, private=2)
    theirs, ours = lora.attach(KEY, w), mos.attach(KEY, w)
    parts = {"a": normal(1, 3, 8, 2), "b": normal(2, 3, 2, 12)}
    theirs = {"w": dataclasses.replace(theirs["w"], parts=parts)}
    for side, rows in (("a", parts["a"].swapaxes(1, 2)), ("b", parts["b"])):
        (name,) = [n for n in ours.pools if n.split("_")[1] == side]
        pool = np.zeros(ours.pools[name].shape)
        pool[np.asarray(ours.params["w"].parts[f"at_{side}"])[..., 0]] = rows
        ours = dataclasses.replace(ours, pools={**ours.pools, name: pool})
    np.testing.assert_allclose(mos.effective(ours)["w"], lora.effective(theirs)["w"], rtol=1e-13)


def test_alpha_over_the_rank_scales_the_update(double):
    w = normal(0, 8, 6)
    updates = []
    for alpha in (None, 2.0, 6.0):
        t = jp.mos(rank=2, shards=2, alpha=alpha)
        state = moved(t.attach(KEY, {"w": w}))
        updates.append(np.asarray(t.effective(state)["w"]) - w)
    assert np.all(updates[1] != 0)
    for found, scale in zip(updates, (2.0, 1.0, 3.0), strict=True):
        np.testing.assert_allclose(found, scale * updates[1], rtol=1e-9)


def test_the_pool_is_held_once_and_is_a_scan_constant():
    state = attached()
    assert len(state.pools) == 2
    assert "a" not in state.params["stack"].parts
    x = jnp.ones((5, 8))

    def function(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w)[:, :8], None), x, p["stack"])[0]

    report = T.report(state, function, x)
    assert [(use.primitive, use.how) for use in report.uses] == [("dot_general", "rule")]
    shards = sum(pool.size for pool in state.pools.values())
    assert report.parts == shards + 2 * MATRICES * 24
    (pool,) = [pool for name, pool in state.pools.items() if name.split("_")[1] == "a"]
    text = str(jax.make_jaxpr(jp.lift(function))(state, x))
    stacked = f"3,{pool.shape[0]},{pool.shape[1]}"
    assert f"[{pool.shape[0]},{pool.shape[1]}]" in text and stacked not in text


@pytest.mark.slow
def test_a_model_of_pooled_weights_is_a_model():
    model = jp.nn.swiglu(8, 12)
    t = jp.chain(jp.mos(rank=2, budget=1, shards=2, private=0), jp.lora(rank=2, where="down/*"))
    tuned = t(model)
    state = tuned.init(KEY)
    x = jnp.ones((3, 8))
    wanted = model.apply(t.merge(state), x)
    np.testing.assert_allclose(tuned.apply(state, x), wanted, rtol=1e-5, atol=1e-6)
    train, frozen = jp.split(state, t.trainable(state))
    # The adapters of `down` froze its pools below them; those of `up` are trained.
    assert set(train.params["down"]["kernel"].parts) == {"a", "b"}
    assert {name for name, pool in train.pools.items() if pool is not None} == {
        f"0_{side}_8x24_float32" for side in "ab"
    }
    again = jp.combine(train, frozen)
    jax.tree.map(np.testing.assert_array_equal, again, state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jp.mos(shards=0), "shards=0: give at least 1"),
        (lambda: jp.mos(private=3), "private=3: give 0 to 2"),
        (lambda: jp.mos(private=2), "rank=8 with private=budget=2: nothing is shared"),
        (
            lambda: jp.mos(rank=2, shards=3).attach(KEY, params()),
            "shards=3 does not divide the 8 rows and 12 columns of .* give one of .1, 2, 4.",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
