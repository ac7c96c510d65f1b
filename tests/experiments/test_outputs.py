"""Files that commands are told to write: no other is written over, and nothing is done first."""

import os

import jax
import jax.numpy as jnp
import pytest
from omegaconf import OmegaConf

from experiments import compare, export_adapters, fit_choice, generate, plot, train_tokenizer
from experiments.run import checkpoints, outputs
from experiments.run.folders import RunError
from experiments.shell.build import build_model
from jaxpara.types import TrainState
from tests.experiments.documents import write_texts
from tests.experiments.programs import ending, everything
from tests.experiments.saved_run import MODEL
from tests.experiments.test_figures import run_named


@pytest.fixture
def lora(tmp_path):
    """A run of LoRA, with one checkpoint."""
    transform = {"lora": {"_target_": "jaxpara.lora", "rank": 2}}
    cfg = OmegaConf.create({"model": MODEL, "transform": transform, "where": "**/up/kernel"})
    folder = tmp_path / "run"
    folder.mkdir()
    OmegaConf.save(cfg, folder / "config.yaml")
    params = jax.jit(build_model(cfg).init)(jax.random.key(0))
    state = TrainState(params, (), jnp.zeros((), jnp.int32), jax.random.key(0))
    with checkpoints.saver(folder, keep_last=1, keep_best=0, best=("loss", "min")) as save:
        save(state, {}, None)
    return folder


def test_a_new_file_is_one_that_is_not_there_in_a_folder_that_can_be_made(tmp_path):
    assert outputs.new(tmp_path / "deep" / "a.json") == tmp_path / "deep" / "a.json"
    assert not (tmp_path / "deep").exists()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("file", "link", "."):
        with pytest.raises(RunError, match="exists: give another name, or remove it first"):
            outputs.new(tmp_path / name)
    with pytest.raises(RunError, match="nothing can be written to .*file: give another place"):
        outputs.new(tmp_path / "file" / "a.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(RunError, match="nothing can be written to .*closed"):
        outputs.new(tmp_path / "closed" / "a.json")


TAKEN = {
    "fit_choice": (fit_choice, [], "config.yaml"),
    "train_tokenizer": (train_tokenizer, ["data=text", "data.path=text"], "tokenizer.json"),
    "generate": (generate, ["run=run", "prompt=a"], "o.jsonl"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_file_that_is_there_is_not_written_over_and_nothing_is_done(tmp_path, name, monkeypatch):
    program, given, output = TAKEN[name]
    monkeypatch.setattr(fit_choice, "measure_point", lambda *_: pytest.fail("it has begun"))
    (tmp_path / "text").mkdir()
    write_texts(tmp_path / "text")
    (tmp_path / "run").mkdir()
    OmegaConf.save({"model": MODEL}, tmp_path / "run" / "config.yaml")
    (tmp_path / output).write_text('{"merges": "mine"}')
    before = everything(tmp_path)
    assert "exists: give another name" in ending(program, tmp_path, *given, f"output={output}")
    (tmp_path / "file").touch()
    assert "nothing can be written" in ending(program, tmp_path, *given, "output=file/x.json")
    (tmp_path / "file").unlink()
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_adapters_that_are_there_are_not_written_over(tmp_path, lora, name):
    pytest.importorskip("safetensors")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / name).write_text("mine")
    before = everything(tmp_path)
    said = ending(export_adapters, tmp_path, "run=run", "output=theirs")
    assert f"theirs/{name}' exists" in said and everything(tmp_path) == before
    assert ending(export_adapters, tmp_path, "run=run") is None
    assert f"{name}' exists" in ending(export_adapters, tmp_path, "run=run") or name.endswith("son")


def test_no_adapters_are_written_through_a_link_of_the_run(tmp_path, lora):
    pytest.importorskip("safetensors")
    (tmp_path / "outside").mkdir()
    (lora / "peft").symlink_to(tmp_path / "outside")
    for given in ([], ["output=run/peft"]):
        trusted = f"trust={tmp_path}/outside"
        said = ending(export_adapters, tmp_path, "run=run", trusted, *given)
        assert "is a link in the run's folder" in said
    assert not list((tmp_path / "outside").iterdir())
    assert ending(export_adapters, tmp_path, "run=run", trusted, "output=mine/deep") is None
    assert len(list((tmp_path / "mine" / "deep").iterdir())) == 2


@pytest.mark.parametrize("program, name", [(plot, "x.png"), (compare, "x.csv")])
def test_no_figure_or_table_is_written_among_what_a_run_keeps(tmp_path, program, name):
    folder = run_named(tmp_path / "run", "a")
    (folder / "checkpoints" / "2").mkdir(parents=True)
    before = everything(folder)
    said = ending(program, tmp_path, "runs=run", f"output=run/checkpoints/2/{name}")
    assert "is among the checkpoints of the run" in said and everything(folder) == before


def test_a_run_keeps_its_own_figure(tmp_path):
    folder = run_named(tmp_path / "run", "a")
    assert ending(plot, tmp_path, "runs=run", "output=mine.png") is None
    assert ending(plot, tmp_path, "runs=run", "output=mine.png") is None, "its own is replaced"
    (tmp_path / "mine.png").rename(folder / "loss.png")  # of this program, without a table
    before = everything(folder)
    said = ending(plot, tmp_path, "runs=run", "output=run/loss.png")
    assert "no earlier figure of this command" in said and everything(folder) == before
