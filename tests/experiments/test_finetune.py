"""Adapting a trained model: order of the chain, what is trained and kept, merging, going on."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import jaxpara as jp
from experiments import export_adapters, finetune
from experiments.adapt import adapter_files
from experiments.adapt.finetuning import slow_scales, started_from
from experiments.adapt.storage import bits_per_weight
from experiments.run import checkpoints, folders
from experiments.shell import build
from experiments.shell.overrides import replaced
from jaxpara.types import TrainState
from tests.experiments.programs import ending, statuses
from tests.experiments.saved_run import MODEL, random_params, save_run

KEY = jax.random.key(0)
SMALL = (
    "data=stdlib data.prefetch=0 data.validation_fraction=0.3 batch_size=2 window=8 "
    "evaluation.windows=4 evaluation.length=8 evaluation.batch_size=4 steps=2 eval_every=2 "
    "log_every=1 rank=2"
).split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with some Python text and the run of a tiny model."""
    folder = tmp_path_factory.mktemp("finetune")
    text = folder / "text"
    text.mkdir()
    for i in range(6):
        (text / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 4)
    save_run(folder / "base")
    return folder


def tuned(place, name, *overrides):
    """Runs the program in a folder of its own; returns that folder."""
    folder = place / name
    places = [f"data.root={place / 'text'}", f"from={place / 'base'}"]
    given = replaced([*SMALL, *places], overrides)
    code = ending(finetune, place, *given, f"hydra.run.dir={folder}")
    assert code is None, code
    return folder


def state_of(folder):
    """The trained state, its transform, and the summary."""
    cfg = folders.load_config(folder)
    model = build.build_model(cfg)
    params = checkpoints.load_params(folder, jax.eval_shape(model.init, KEY), which="last")
    transform = build.build_transform(cfg)
    return params, transform, json.loads((folder / "summary.json").read_text())


def composed(*overrides):
    with initialize_config_module("experiments.conf", version_base="1.3"):
        return compose("finetune", [*overrides, "from=null"])


def test_the_order_on_the_command_line_is_the_order_of_the_chain():
    for order in (["lora", "fake_quant"], ["fake_quant", "lora"]):
        cfg = composed(f"transform=[{','.join(order)}]", "bits=3", "rank=5")
        assert list(cfg.transform) == order
        first, second = build.build_transform(cfg).members
        names = {"lora": "lora(rank=5)", "fake_quant": "fake_quant(bits=3)"}
        assert [first.method.name, second.method.name] == [names[name] for name in order]
        assert first.where == second.where == "**/kernel"
    assert build.build_transform(composed("transform=full")) is None


@pytest.mark.parametrize(
    "given, said",
    [
        (
            "transform=[lora,lorra]",
            r"transform=\[lora,lorra\]: lorra is unknown; choose from bdwp, ",
        ),
        ("transform=full,[lora],[nf5,lora]", r"transform=\[nf5,lora\]: nf5 is unknown"),
        ("transform=[lora,lora]", "lora is listed 2 times"),
    ],
)
def test_an_unknown_or_repeated_transform_is_refused_before_hydra_runs(given, said):
    with pytest.raises(folders.RunError, match=said):
        finetune.check_transforms(["from=x", given])
    for fine in ("transform=full,[lora],[nf4,lora]", "transform=[]", "transform=choice([lora],x)"):
        finetune.check_transforms([fine, "name=lorra"])


def test_the_page_and_the_help_set_what_one_transform_has_besides():
    override = "+transform.lora.alpha=16"
    assert f"`{override}`" in (folders.REPOSITORY / "docs/guides/finetuning.md").read_text()
    assert f" {override} " in (folders.REPOSITORY / "experiments/conf/finetune.yaml").read_text()
    cfg = composed("transform=[lora,fake_quant]", override)
    assert build.build_transform(cfg).members[0].method.settings.scale == 16 / 8


def test_a_setting_that_a_transform_refuses_is_said_with_its_name():
    for overrides, said in (
        ("rank=0", "lora: rank=0"),
        ("+transform.lora.rnk=2", r"lora\.rnk: .*lora.rank\?"),
    ):
        cfg = composed("transform=[lora]", overrides)
        with pytest.raises(folders.RunError, match=said):
            build.build_transform(cfg)


QUICK = ("full", "fake_quant")
TRANSFORMS = [
    pytest.param(path.stem, marks=[] if path.stem in QUICK else [pytest.mark.slow])
    for path in sorted((folders.REPOSITORY / "experiments/conf/transform").glob("*.yaml"))
]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_adapts_a_stack_of_kernels_and_leaves_the_function(name):
    cfg = composed(f"transform=[{name}]")
    transform = build.build_transform(cfg)
    if name == "full":
        assert transform is None
        return
    draw = np.random.default_rng(0).standard_normal
    params = {"block": {"kernel": jnp.asarray(draw((2, 64, 32)), jnp.float32)}}
    state = transform.attach(KEY, params)
    dense = transform.effective(state)["block"]["kernel"]
    whole = params["block"]["kernel"]
    # Quantisers and sparse masks change it at the start, a ternary one by half of its norm.
    assert np.linalg.norm(dense - whole) < 0.6 * np.linalg.norm(whole)
    shapes = jax.eval_shape(lambda: state)
    assert 1 < bits_per_weight(shapes) <= 32
    assert jax.tree.leaves(jp.split(state, transform.trainable(state))[0])


def test_bits_a_weight_count_grids_scales_and_adapters():
    params = {"kernel": jnp.ones((2, 64, 32))}

    def bits(t):
        return bits_per_weight(jax.eval_shape(t.attach, KEY, params))

    scale = 32 / 64  # of a float for each column of 64
    adapters = 32 * 4 * (64 + 32) / (64 * 32)
    assert bits(jp.fake_quant(bits=3)) == 3 + scale
    assert bits(jp.fake_quant(bits=4, group=16)) == 4 + 32 / 16
    assert bits(jp.chain(jp.lora(), jp.fake_quant(bits=2))) == 2 + scale
    assert bits(jp.chain(jp.fake_quant(bits=4), jp.lora(rank=4))) == 4 + scale + adapters
    assert bits(jp.l4q(bits=4)) == 4 + 2 * scale
    assert bits(jp.lr_qat(bits=3, downcast="fixed8")) == 3 + scale
    assert bits(jp.lr_qat(bits=3, downcast="int8")) == 3 + scale
    assert bits(jp.nf4()) == 4 + 32 / 64
    # Two matrices of 32 scales: bytes, one step, and a mean.
    assert bits(jp.nf4(scale_block=256)) == 4 + 8 / 64 + 2 * 32 / (64 * 32)
    assert bits(jp.lora(rank=4)) == 32  # merged
    assert bits_per_weight(params) == 32


def test_scales_take_smaller_steps_than_what_they_scale():
    state = jp.l4q().attach(KEY, {"kernel": jnp.ones((8, 4)), "scale": jnp.ones(4)})
    optimizer = slow_scales(optimizer=optax.sgd(1.0), factor=0.25)
    gradient = jax.tree.map(jnp.ones_like, state)
    updates, _ = optimizer.update(gradient, optimizer.init(state), state)
    grid, inner = updates["kernel"], updates["kernel"].base
    np.testing.assert_array_equal(grid.parts["scale"], -0.25 * jnp.ones((1, 1, 4)))
    np.testing.assert_array_equal(grid.parts["offset"], -0.25 * jnp.ones((1, 1, 4)))
    np.testing.assert_array_equal(inner.parts["a"], -jnp.ones((8, 8)))
    np.testing.assert_array_equal(updates["scale"], -jnp.ones(4))  # a norm's, no grid's


@pytest.mark.slow
def test_a_finetuned_run_trains_its_adapters_merges_to_the_same_and_says_so(place, capsys):
    folder = tuned(place, "lora_q", "transform=[lora,fake_quant]", "bits=3")
    said = capsys.readouterr().out
    assert "as the weight flows: lora > fake_quant" in said
    assert "head/kernel [8, 256] lora(rank=2) > fake_quant(bits=3): dot_general" in said
    state, transform, summary = state_of(folder)
    like = jax.eval_shape(transform.effective, state)
    base = checkpoints.load_params(place / "base", like)
    # LoRA freezes what it does not adapt, too.
    np.testing.assert_array_equal(state["embedding"]["table"], base["embedding"]["table"])
    head = state["head"]["kernel"]
    np.testing.assert_array_equal(head.base.base, base["head"]["kernel"])
    assert np.any(head.base.parts["b"] != 0)
    train, _ = jp.split(state, transform.trainable(state))
    count = sum(leaf.size for leaf in jax.tree.leaves(train))
    assert summary["trainable_parameters"] == count < summary["parameters"]
    assert summary["step_memory_bytes"] > 0 and 3 < summary["bits_per_weight"] < 3 + 32 / 8 + 1
    # The integers are those of the forward pass; programs that differ round sums differently.
    trained, merged = summary["validation_bits_per_byte"], summary["merged_bits_per_byte"]
    assert math.isclose(trained, merged, rel_tol=1e-6)
    assert not any(name.startswith("rounded") for name in summary)
    again = jp.weights.with_adapters(transform.attach(KEY, base), adapter_files.load(folder))
    jax.tree.map(np.testing.assert_array_equal, state, again)
    # Somebody may begin from it again: with what it computes, whatever it was made of.
    model = build.build_model(OmegaConf.create({"model": folders.load_config(folder).model}))
    first = started_from(model, str(folder)).init(KEY)
    jax.tree.map(np.testing.assert_array_equal, first, jax.jit(transform.effective)(state))


@pytest.mark.slow
def test_going_on_with_a_finetuned_run_equals_not_stopping(place):
    whole = tuned(
        place, "whole", "transform=[fake_quant,lora]", "steps=4", "checkpoint.keep_last=9"
    )
    part, base = place / "part", place / "base"
    shutil.copytree(whole, part)
    shutil.rmtree(checkpoints.path_of(part, 4))
    (part / "summary.json").unlink()
    assert "asks to read" in ending(finetune, place, f"resume={part}")
    trusted = f"trust={place / 'text'}"
    base.rename(place / "gone")  # what it began with is in its own folder
    assert ending(finetune, place, f"resume={part}", trusted) is None
    shutil.rmtree(part / "checkpoints")
    (part / "summary.json").unlink()
    assert "data.root" not in ending(finetune, place, f"resume={part}", trusted)
    said = ending(finetune, place, f"resume={part}", f"trust=[{place / 'text'},{base}]")
    assert f"from='{base}': no such folder" in said, "without a checkpoint it begins again"
    (place / "gone").rename(base)
    assert ending(finetune, place, f"resume={part}", f"trust=[{place / 'text'},{base}]") is None
    (a, _, first), (b, _, second) = state_of(whole), state_of(part)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert first["validation_bits_per_byte"] == second["validation_bits_per_byte"]
    # What is dense when merged is rounded as well, and fewer bits are no better here.
    assert first["rounded_8_bits_per_byte"] == pytest.approx(
        first["merged_bits_per_byte"], rel=0.01
    )
    assert first["rounded_2_bits_per_weight"] < first["rounded_8_bits_per_weight"] < 32
    assert bits_per_weight(a) == first["bits_per_weight"]


@pytest.mark.slow
def test_what_cannot_be_started_from_is_said(place, tmp_path):
    (tmp_path / "other").mkdir()
    OmegaConf.save(OmegaConf.create({"task": 1}), tmp_path / "other/config.yaml")
    with pytest.raises(folders.RunError, match="is not of a language model"):
        finetune.take_model(OmegaConf.create({"from": str(tmp_path / "other")}))
    missing = ending(finetune, place, *SMALL, "from=nowhere")
    assert "from='nowhere': no such folder" in missing and "data=stdlib_base" in missing
    assert "give from=FOLDER" in ending(finetune, place, *SMALL)
    wider = ending(finetune, place, *SMALL, f"from={place / 'base'}", "model.width=32")
    assert "error: model.width=32: from=" in wider and "brings its model" in wider
    save_run(tmp_path / "letters", model={**MODEL, "vocab_size": 4})
    given = [f"from={tmp_path / 'letters'}", f"data.root={place / 'text'}"]
    letters = ending(finetune, place, *SMALL, *given)
    assert "is not of a language model that reads this data, which has 256 tokens" in letters
    nothing = ending(finetune, place, *SMALL, f"from={place / 'base'}", "where=kern", "data=stdlib")
    assert "where='kern' selects none" in nothing
    with pytest.raises(folders.RunError, match="holds no adapters"):
        adapter_files.load(tmp_path)


def test_no_transform_is_written_in_two_ways():
    for given in ("transform=full", "transform=[]"):
        task = OmegaConf.to_container(composed(given), resolve=True)["task"]
        assert not task["transform"]["members"]
    assert build.chain_of(None) is None


@pytest.mark.slow
def test_a_run_of_lora_is_exported_for_peft(tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.numpy")
    lora = {"lora": {"_target_": "jaxpara.lora", "rank": 2}}
    cfg = OmegaConf.create({"model": MODEL, "transform": lora, "where": "**/kernel"})
    model, folder = build.build_model(cfg), tmp_path / "run"
    folder.mkdir()
    OmegaConf.save(cfg, folder / "config.yaml")
    state = TrainState(random_params(model), (), jnp.zeros((), jnp.int32), KEY)
    with checkpoints.saver(folder, keep_last=1, keep_best=0, best=("loss", "min")) as save:
        save(state, {}, None)
    names = "names={blocks/*/mlp/up/kernel: 'model.layers.{}.up'}"
    assert ending(export_adapters, tmp_path, "run=run", names) is None
    assert "run/peft/adapter_model.safetensors" in capsys.readouterr().out
    tensors = safetensors.load_file(folder / "peft" / "adapter_model.safetensors")
    up = state.params["blocks"][0]["mlp"]["up"]["kernel"].parts
    np.testing.assert_array_equal(
        tensors["base_model.model.model.layers.0.up.lora_A.weight"], up["a"][0].T
    )
    head = state.params["head"]["kernel"].parts["b"]
    np.testing.assert_array_equal(tensors["base_model.model.head.lora_B.weight"], head.T)
    assert len(tensors) == 2 * 6


@pytest.mark.slow
def test_a_sweep_finds_its_jobs_again_whatever_the_model_of_the_base(place, capfd):
    given = [*SMALL, f"data.root={place / 'text'}", f"from={place / 'base'}", "hydra.sweep.dir=s"]
    for expected in ("finished", "finished before"):
        assert ending(finetune, place, *given, "transform=[lora],[ia3]", "-m") is None
        assert list(statuses(capfd.readouterr().out).values())[-2:] == [expected] * 2
