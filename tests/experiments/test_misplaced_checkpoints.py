"""Checkpoints that are intact, and in the place of others."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest
from omegaconf import OmegaConf

from experiments.run import checkpoints, resuming, saved_values
from experiments.run.folders import RunError
from experiments.run.seals import Damaged
from jaxpara.types import TrainState

PARAMS = {"w": jnp.arange(3.0)}


def test_a_checkpoint_under_another_name_or_of_another_run_is_not_read(tmp_path):
    with checkpoints.saver(tmp_path, keep_last=9, keep_best=0, best=("loss", "min")) as save:
        for step in (1, 2):
            run = {"data": {"next_index": step}, "settings": {"seed": 1}}
            save(TrainState(PARAMS, (), jnp.int32(step), jax.random.key(0)), run, None)
    OmegaConf.save({"seed": 1}, tmp_path / "config.yaml")
    checkpoints.load_params(tmp_path, jax.eval_shape(lambda: PARAMS))
    OmegaConf.save({"seed": 2}, tmp_path / "config.yaml")
    with pytest.raises(RunError, match="has seed=2, and .*2 was trained with 1"):
        checkpoints.load_params(tmp_path, jax.eval_shape(lambda: PARAMS))
    for name in ("from", "logger", "checkpoint"):
        OmegaConf.save({"seed": 1, name: "other"}, tmp_path / "config.yaml")
        checkpoints.load_params(tmp_path, jax.eval_shape(lambda: PARAMS))
    for name in ("steps", "batch_size"):  # as of another run, whatever depends on it
        OmegaConf.save({"seed": 1, name: 4}, tmp_path / "config.yaml")
        with pytest.raises(RunError, match=f"has {name}=4, and .*2 was trained with None"):
            checkpoints.load_params(tmp_path, jax.eval_shape(lambda: PARAMS))
    (tmp_path / "config.yaml").unlink()
    shutil.rmtree(tmp_path / "checkpoints/1")
    (tmp_path / "checkpoints/2").rename(tmp_path / "checkpoints/5")
    with pytest.raises(RunError, match="5 is damaged: data has next_index=2; expected 5"):
        checkpoints.load_params(tmp_path, jax.eval_shape(lambda: PARAMS))


@pytest.mark.parametrize("path", [["transform"], ["task", "transform", "members"]])
def test_transforms_in_another_order_are_another_run(path):
    def config(*names):
        values = {name: {"bits": 4} for name in names}
        for key in reversed(path):
            values = {key: values}
        return values

    saved = json.loads(json.dumps(resuming.compared(config("nf4", "lora"))))
    resuming.check_same(saved, config("nf4", "lora"), "it")
    said = f"has lora > nf4 in {'.'.join(path)}, and it was trained with nf4 > lora"
    with pytest.raises(RunError, match=said):
        resuming.check_same(saved, config("lora", "nf4"), "it")
    other = {"model": {"width": 8, "depth": 2}}  # no other mapping has an order
    resuming.check_same(resuming.compared(other), {"model": {"depth": 2, "width": 8}}, "it")


def test_a_best_checkpoint_that_cannot_be_read_is_not_passed_over_in_silence(tmp_path, capsys):
    with checkpoints.saver(tmp_path, keep_last=9, keep_best=0, best=("loss", "min")) as save:
        for step in (1, 2):
            state = TrainState(PARAMS, (), jnp.int32(step), jax.random.key(0))
            save(state, {}, {"loss": float(-step)})
    like = jax.eval_shape(lambda: PARAMS)
    checkpoints.load_params(tmp_path, like)
    assert capsys.readouterr().err == ""
    (tmp_path / "checkpoints/2/run/metadata").write_text("{}")
    checkpoints.load_params(tmp_path, like)
    assert "2/run/metadata" in (said := capsys.readouterr().err) and "passed over" in said


@pytest.mark.parametrize(
    "position, named",
    [
        ({"next_index": 1.5}, "next_index=1.5; expected 2, its step"),
        ({"next_index": 3}, "next_index=3; expected 2, its step"),
        ({"begin": {"document": {"file": 0.5}, "token": 0}, "block": 0, "step": 2}, "file=0.5"),
        ({"begin": {"document": [3, -1], "token": 0}, "block": 0, "step": 2}, "document=-1"),
    ],
)
def test_a_position_that_is_not_of_its_step_is_refused(position, named):
    for data in (position, {"position": position, "in": {"share": 0.5}}):
        with pytest.raises(Damaged, match=f"checkpoints/2 is damaged: data has {named}"):
            saved_values.check_position(data, 2, "checkpoints/2")
    known = {"begin": {"document": {"file": 0, "done": False, "next": None}}, "step": 2}
    for data in ({"next_index": 2}, known):
        saved_values.check_position(data, 2, "checkpoints/2")
