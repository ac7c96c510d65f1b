"""Adapters alone: out of a state and back, and on disk as Hugging Face PEFT names them."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpara as jp
from experiments.adapt import peft_files
from experiments.adapt.finetuning import check_ranks
from experiments.run.folders import RunError

KEY = jax.random.key(0)


def parameters():
    draw = np.random.default_rng(0).standard_normal
    return {
        "blocks": [{"kernel": jnp.asarray(draw((3, 8, 6)), jnp.float32)}],
        "bias": jnp.zeros(6),
    }


def moved(state):
    """Every floating number of a state changed, so that nothing is what `attach` made."""
    return jax.tree.map(lambda leaf: leaf + 0.25 if leaf.dtype == jnp.float32 else leaf, state)


CHAINS = {
    "lora": jp.lora(rank=2),
    "lr_qat": jp.lr_qat(rank=2, downcast="fixed8"),
    "l4q": jp.l4q(rank=2),
    "lora_on_integers": jp.chain(jp.fake_quant(), jp.lora(rank=2)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_adapters_put_back_onto_the_same_base_give_the_same_state(name):
    t, params = CHAINS[name], parameters()
    state = t.attach(KEY, params)
    train, frozen = jp.split(state, t.trainable(state))
    state = jp.combine(moved(train), frozen)
    saved = jax.tree.map(np.asarray, jp.weights.adapters(state))  # as from a file
    fresh = t.attach(jax.random.key(1), params)
    again = jp.weights.with_adapters(fresh, saved)
    jax.tree.map(np.testing.assert_array_equal, state, again)
    assert not np.array_equal(jax.tree.leaves(fresh)[-1], jax.tree.leaves(again)[-1])


def test_adapters_are_plain_trees_in_the_structure_of_the_parameters():
    state = jp.l4q(rank=2).attach(KEY, parameters())
    parts = jp.weights.adapters(state)["blocks"]["0"]["kernel"]
    assert set(parts) == {"scale", "offset", "base"} and set(parts["base"]) == {"a", "b"}
    assert parts["base"]["a"].shape == (3, 8, 2)
    lone = jp.lora(rank=2).attach(KEY, jnp.ones((4, 5)))
    assert set(jp.weights.adapters(lone)) == {"a", "b"}
    again = jp.weights.with_adapters(lone, {"a": np.ones((4, 2)), "b": np.ones((2, 5))})
    np.testing.assert_array_equal(again.parts["b"], np.ones((2, 5)))


def test_what_leaves_have_in_common_is_saved_once():
    t = jp.mos(rank=2, shards=2, where="**/kernel")
    params = {"one": {"kernel": jnp.ones((8, 6))}, "two": {"kernel": jnp.ones((8, 6))}}
    state = moved(t.attach(KEY, params))
    saved = jp.weights.adapters(state)
    assert set(saved) == {"params", "pools"} and saved["pools"]
    again = jp.weights.with_adapters(t.attach(KEY, params), saved)
    # The base was moved too, the parts alone come back.
    jax.tree.map(np.testing.assert_array_equal, jp.weights.adapters(again), saved)
    saved["pools"].popitem()
    with pytest.raises(ValueError, match="there is no 'pools/"):
        jp.weights.with_adapters(state, saved)


def test_what_trains_the_weight_itself_has_no_adapters():
    state = jp.fake_quant().attach(KEY, parameters())
    with pytest.raises(ValueError, match="trains the weight 'blocks/0/kernel' itself"):
        jp.weights.adapters(state)
    with pytest.raises(ValueError, match="no leaf of the state is reparameterised"):
        jp.weights.adapters(parameters())


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda parts: parts.pop("b"), "there is no 'blocks/0/kernel/b'"),
        (lambda parts: parts.update(c=np.ones(2)), "the state has no 'blocks/0/kernel/c'"),
        (lambda parts: parts.update(a=np.ones((3, 8, 4))), "has shape (3, 8, 4) and the state"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_by_name(change, said):
    state = jp.lora(rank=2).attach(KEY, parameters())
    saved = jp.weights.adapters(state)
    change(saved["blocks"]["0"]["kernel"])
    with pytest.raises(ValueError, match=re.escape(said)):
        jp.weights.with_adapters(state, saved)


NAMES = {"blocks/*/kernel": "model.layers.{}.mlp.up_proj"}


@pytest.mark.parametrize("stabilised", [False, True])
def test_peft_files_hold_the_adapters_transposed_under_the_names_of_modules(tmp_path, stabilised):
    safetensors = pytest.importorskip("safetensors.numpy")
    t = jp.lora(rank=4, alpha=6.0, rank_stabilised=stabilised)
    state = moved(t.attach(KEY, parameters()))
    peft_files.save(tmp_path, state, names=NAMES)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    assert config["peft_type"] == "LORA" and config["r"] == 4 and not config["fan_in_fan_out"]
    assert config["target_modules"] == [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    assert (
        {key.split(".", 2)[2] for key in tensors}
        == {f"model.layers.{i}.mlp.up_proj.lora_{x}.weight" for i in range(3) for x in "AB"}
        == {key.removeprefix("base_model.model.") for key in tensors}
    )
    # What PEFT computes: y = x W^T + (alpha / r) x A^T B^T, with PyTorch's W [out, in].
    weight = t.effective(state)["blocks"][0]["kernel"]
    for i in range(3):
        module = f"base_model.model.model.layers.{i}.mlp.up_proj"
        a, b = (tensors[f"{module}.lora_{x}.weight"] for x in "AB")
        assert a.shape == (4, 8) and b.shape == (6, 4)
        base = np.asarray(state["blocks"][0]["kernel"].base[i]).T
        whole = base + config["lora_alpha"] / config["r"] * (b @ a)
        np.testing.assert_allclose(whole.T, weight[i], rtol=2e-6, atol=1e-6)
    fresh = t.attach(jax.random.key(1), parameters())
    again = peft_files.load(tmp_path, fresh, names=NAMES)
    jax.tree.map(
        np.testing.assert_array_equal, jp.weights.adapters(again), jp.weights.adapters(state)
    )


@pytest.mark.slow
def test_peft_files_name_embeddings_and_lay_out_convolutions_as_pytorch_does(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    draw = np.random.default_rng(0).standard_normal
    params = {
        "embedding": {"table": jnp.asarray(draw((7, 4)), jnp.float32)},
        "conv": {
            "kernel": jnp.asarray(draw((2, 3, 2, 4, 6)), jnp.float32)
        },  # two of [3, 2, in, out]
    }
    t = jp.chain(
        jp.lora(rank=2, where="embedding/table"), jp.lora(rank=2, where="conv/kernel", window=2)
    )
    state = moved(t.attach(KEY, params))
    peft_files.save(tmp_path, state, names={"conv/kernel": "convs.{}"})
    tensors = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    tensors = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    assert set(tensors) == {
        *(f"convs.{i}.lora_{x}.weight" for i in range(2) for x in "AB"),
        *(f"embedding.lora_embedding_{x}" for x in "AB"),
    }
    weights = t.effective(state)
    # PEFT: y = E[token] + s A^T[token] B^T, and torch's conv with W[out, in, h, w] + s (B * A).
    a, b = (tensors[f"embedding.lora_embedding_{x}"] for x in "AB")
    table = np.asarray(state["embedding"]["table"].base)
    np.testing.assert_allclose(
        table + 2 * (b @ a).T, weights["embedding"]["table"], rtol=2e-6, atol=1e-6
    )
    for i in range(2):
        a, b = (tensors[f"convs.{i}.lora_{x}.weight"] for x in "AB")
        assert a.shape == (2, 4, 3, 2) and b.shape == (6, 2, 1, 1)
        whole = np.asarray(state["conv"]["kernel"].base[i]).transpose(3, 2, 0, 1)
        whole = whole + 2 * np.einsum("or,rihw->oihw", b[..., 0, 0], a)
        np.testing.assert_allclose(
            whole.transpose(2, 3, 1, 0), weights["conv"]["kernel"][i], rtol=2e-6, atol=1e-6
        )
    fresh = t.attach(jax.random.key(1), params)
    again = peft_files.load(tmp_path, fresh, names={"conv/kernel": "convs.{}"})
    jax.tree.map(
        np.testing.assert_array_equal, jp.weights.adapters(again), jp.weights.adapters(state)
    )


@pytest.mark.parametrize(
    "change, said",
    [
        ({"peft_type": "LOHA"}, "holds LOHA, and only plain LoRA can be read"),
        ({"use_dora": True}, "holds LORA with use_dora=True"),
        ({"alpha_pattern": {"up": 4}}, "holds LORA with alpha_pattern={'up': 4}"),
        ({"bias": "all"}, "holds LORA with bias=all"),
    ],
)
def test_what_peft_calls_lora_and_is_more_is_refused(tmp_path, change, said):
    pytest.importorskip("safetensors.numpy")
    state = jp.lora(rank=2).attach(KEY, parameters())
    with pytest.raises(RunError, match="has no adapter_config.json"):
        peft_files.load(tmp_path, state)
    peft_files.save(tmp_path, state)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RunError, match=re.escape(said)):
        peft_files.load(tmp_path, state)


def test_peft_files_that_do_not_fit_are_refused(tmp_path):
    pytest.importorskip("safetensors.numpy")
    state = jp.lora(rank=4).attach(KEY, parameters())
    peft_files.save(tmp_path, state)
    assert len(list(peft_files.slots(state, {}))) == 3
    with pytest.raises(RunError, match="attach jp.lora\\(rank=4, alpha=8\\)"):
        peft_files.load(tmp_path, jp.lora(rank=2).attach(KEY, parameters()))
    with pytest.raises(RunError, match="has no base_model.model.model.layers.0"):
        peft_files.load(tmp_path, state, names=NAMES)
    with pytest.raises(RunError, match="1 leading axes \\(3,\\), and 'up' has 0 pairs"):
        peft_files.save(tmp_path, state, names={"**": "up"})
    with pytest.raises(RunError, match="'blocks/up' selects no leaf .*; choose from blocks/0/k"):
        peft_files.save(tmp_path, state, names={"blocks/up": "up.{}"})
    two = jp.lora(rank=4).attach(KEY, {"a": jnp.ones((3, 8, 5)), "b": jnp.ones((3, 8, 5))})
    with pytest.raises(RunError, match="a and b are both called up.0"):
        peft_files.save(tmp_path, two, names={"*": "up.{}"})
    other = jp.lora(rank=4).attach(KEY, {"blocks": [{"kernel": jnp.ones((3, 8, 5))}]})
    with pytest.raises(RunError, match="it belongs to another model"):
        peft_files.load(tmp_path, other)
    fewer = jp.lora(rank=4).attach(KEY, {"blocks": [{"kernel": jnp.ones((2, 8, 6))}]})
    with pytest.raises(RunError, match="the state has no leaf for base_model.model.blocks.0.2"):
        peft_files.load(tmp_path, fewer)
    with pytest.raises(RunError, match="and PEFT reads only LoRA: "):
        peft_files.save(tmp_path, jp.l4q().attach(KEY, parameters()))
    with pytest.raises(RunError, match=r"fake_quant\(bits=4\) > lora\(rank=2\), and PEFT reads"):
        peft_files.save(tmp_path, CHAINS["lora_on_integers"].attach(KEY, parameters()))


@pytest.mark.parametrize("chained", [False, True])
def test_a_rank_above_its_matrix_is_refused_with_the_leaf_and_its_size(chained):
    params = {"mlp": {"kernel": jnp.ones((2, 6, 4))}}

    def state(rank):
        lora = jp.lora(rank=rank, where="**/kernel")
        more = [jp.fake_quant(bits=4, where="**/kernel")] if chained else []
        return jp.chain(lora, *more).attach(jax.random.key(0), params)

    check_ranks(jax.eval_shape(lambda: state(4)))
    with pytest.raises(
        RunError, match="rank=5 is too large for mlp/kernel, .*\n?.*6 x 4:\ngive rank=4"
    ):
        check_ranks(jax.eval_shape(lambda: state(5)))
