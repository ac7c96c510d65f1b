"""Hugging Face PEFT itself reads our files and we read its: where torch and peft are installed.

`pip install torch peft` into the environment of the tests lets these run; they are in no extra, for
torch is large. tests/experiments/test_adapters.py holds the files to PEFT's formulas without them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from experiments.adapt import peft_files

peft = pytest.importorskip("peft", reason="pip install torch peft")
torch = pytest.importorskip("torch")

RANK, ALPHA, LAYERS = 3, 5.0, 2
NAMES = {
    "embedding/table": "embed",
    "conv/kernel": "conv",
    "blocks/*/kernel": "layers.{}.dense",
    "head/kernel": "head",
}
TOKENS = np.array([[1, 2, 5, 0], [7, 0, 1, 1]])


def numbers(seed, *shape):
    return 0.3 * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


PARAMS = {
    "embedding": {"table": jnp.asarray(numbers(0, 8, 6))},
    "conv": {"kernel": jnp.asarray(numbers(1, 3, 6, 6))},  # window, in, out
    "blocks": [{"kernel": jnp.asarray(numbers(2, LAYERS, 6, 6))}],
    "head": {"kernel": jnp.asarray(numbers(3, 6, 5))},
}


def apply(params, tokens):
    """Plain JAX: an embedding, a convolution over time, a scan over layers, a head."""
    h = params["embedding"]["table"][tokens]
    dims = ("NWC", "WIO", "NWC")
    h = lax.conv_general_dilated(h, params["conv"]["kernel"], (1,), "SAME", dimension_numbers=dims)
    h, _ = lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), h, params["blocks"][0]["kernel"])
    return h @ params["head"]["kernel"]


def torch_model():
    """The same in PyTorch."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(8, 6)
            self.conv = torch.nn.Conv1d(6, 6, 3, padding=1, bias=False)
            layers = [{"dense": torch.nn.Linear(6, 6, bias=False)} for _ in range(LAYERS)]
            self.layers = torch.nn.ModuleList(map(torch.nn.ModuleDict, layers))
            self.head = torch.nn.Linear(6, 5, bias=False)

        def forward(self, tokens):
            h = self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
            for layer in self.layers:
                h = h + torch.tanh(layer["dense"](h))
            return self.head(h)

    net, load = Net(), lambda to, array: to.weight.data.copy_(torch.tensor(np.array(array)))
    load(net.embed, PARAMS["embedding"]["table"])
    load(net.conv, PARAMS["conv"]["kernel"].transpose(2, 1, 0))
    for layer, kernel in zip(net.layers, PARAMS["blocks"][0]["kernel"], strict=True):
        load(layer["dense"], kernel.T)
    load(net.head, PARAMS["head"]["kernel"].T)
    return net


def adapted(stabilised):
    """LoRA of every leaf, its adapters far from where they start."""
    own = {"rank": RANK, "alpha": ALPHA, "rank_stabilised": stabilised}
    t = jp.chain(
        jp.lora(**own, where=lambda path, leaf: path != "conv/kernel"),
        jp.lora(**own, where="conv/kernel", window=1),
    )
    state = t.attach(jax.random.key(0), PARAMS)
    train, frozen = jp.split(state, t.trainable(state))
    moved = jax.tree.map(lambda leaf: jnp.asarray(numbers(7, *leaf.shape)), train)
    return t, jp.combine(moved, frozen)


def outputs(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).numpy()


@pytest.mark.slow
@pytest.mark.filterwarnings("error:.*missing adapter keys", "error:.*unexpected keys")
@pytest.mark.parametrize("stabilised", [False, True])
def test_peft_computes_with_our_files_what_the_merged_model_computes(tmp_path, stabilised):
    t, state = adapted(stabilised)
    peft_files.save(tmp_path, state, names=NAMES)
    wanted = np.asarray(apply(t.merge(state), TOKENS))
    assert np.abs(wanted - apply(PARAMS, TOKENS)).max() > 0.1
    close = {"rtol": 1e-6, "atol": 1e-6}  # the outputs are of order one
    model = peft.PeftModel.from_pretrained(torch_model(), str(tmp_path))
    np.testing.assert_allclose(outputs(model), wanted, **close)
    np.testing.assert_allclose(outputs(model.merge_and_unload()), wanted, **close)
    model = peft.get_peft_model(torch_model(), peft.PeftConfig.from_pretrained(str(tmp_path)))
    read = peft.load_peft_weights(str(tmp_path), device="cpu")
    loaded = peft.set_peft_model_state_dict(model, read)
    assert not loaded.unexpected_keys and not [k for k in loaded.missing_keys if "lora" in k]
    np.testing.assert_allclose(outputs(model), wanted, **close)


@pytest.mark.slow
@pytest.mark.parametrize("stabilised", [False, True])
def test_what_peft_saved_computes_here_what_it_computes_there(tmp_path, stabilised):
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        use_rslora=stabilised,
        target_modules=["embed", "conv", "dense", "head"],
    )
    model = peft.get_peft_model(torch_model(), config)
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            parameter.data.copy_(torch.tensor(numbers(seed, *parameter.shape)))
    model.save_pretrained(str(tmp_path))
    t, state = adapted(stabilised)
    state = peft_files.load(tmp_path, state, names=NAMES)
    wanted = outputs(model)
    assert np.abs(wanted - apply(PARAMS, TOKENS)).max() > 0.1
    np.testing.assert_allclose(jp.lift(apply)(state, TOKENS), wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(apply(t.merge(state), TOKENS), wanted, rtol=1e-6, atol=1e-6)
