"""A run that was interrupted goes on as if it had not been."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from omegaconf import OmegaConf

from experiments.inject import injection
from experiments.run import (
    checkpoints,
    claim,
    folders,
    metrics,
    opening,
    resuming,
    seals,
    trainer,
)
from experiments.run.loggers import Logger
from experiments.run.settings import make_settings
from experiments.run.task import Table, Task
from jaxpara.train import init_state
from jaxpara.types import Model
from tests.experiments.interrupted_runs import check_same_files, check_same_state, stopper

STEPS = 10
NUMBERS = {
    "name": "toy",
    "seed": 0,
    "steps": STEPS,
    "batch_size": 4,
    "accumulate": 1,
    "log_every": 2,
    "eval_every": 4,
    "checkpoint": {"every": 4, "keep_last": 1, "keep_best": 1},
    "profile": False,
    "trace": {"start": 1, "steps": 1},
    "peak_flops": None,
}
OPTIMIZER = optax.adam(optax.cosine_decay_schedule(0.1, STEPS))


class Numbers:
    """Batches of random numbers; fetched ahead they would be the same."""

    def __init__(self):
        self.index = 0

    def __next__(self):
        self.index += 1
        return np.random.default_rng(self.index).normal(size=(4, 3)).astype(np.float32)

    def get_state(self):
        return {"index": self.index}

    def set_state(self, state):
        self.index = state["index"]


def toy():
    """A task that draws from its key and its data, with a table and something at the end."""

    def loss(params, batch, key):
        value = jnp.mean((batch @ params["w"] + jax.random.normal(key)) ** 2)
        return value, {"loss": value}

    def norm(params):
        return float(jnp.linalg.norm(params["w"]))

    def finish(folder, params, summary):
        (folder / "finished.txt").write_text(str(norm(params)))
        summary["end"] = norm(params)

    return Task(
        model=Model(lambda key: {"w": jax.random.normal(key, (3,))}, lambda params, x: x),
        loss=loss,
        batches=Numbers(),
        tokens_per_step=4,
        columns=("norm",),
        evaluate=lambda step, params: {"norm": norm(params)},
        best=("norm", "min"),
        describe=lambda figures: f"norm {figures['norm']:.3f}",
        finish=finish,
        about="numbers",
        tables={"signs": Table(("sign",), lambda p: [{"sign": int(x > 0)} for x in p["w"]], str)},
    )


def run_toy(folder, *, resume=False, sinks=(), config=NUMBERS, **changes):
    if not resume:
        opening.open_run(folder, OmegaConf.create(NUMBERS))
    return trainer.train(
        toy()._replace(**changes),
        optimizer=OPTIMIZER,
        projection=None,
        settings=make_settings(NUMBERS),
        folder=folder,
        sinks=sinks,
        config=config,
        resume=resume,
    )


@pytest.fixture
def stop_after(monkeypatch):
    return stopper(monkeypatch)


LIKE = jax.eval_shape(lambda: init_state(toy().model, OPTIMIZER, jax.random.key(0)))


@pytest.fixture(scope="module")
def whole_toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "run"
    assert run_toy(folder) == ("finished", None, STEPS)
    return folder


@pytest.mark.parametrize("at", [1, 3, 5, 8, 10])
def test_a_run_interrupted_and_resumed_equals_one_that_was_not(tmp_path, whole_toy, stop_after, at):
    folder = tmp_path / "run"
    stop_after(at)
    assert run_toy(folder) == ("interrupted", signal.SIGINT, at)
    assert folders.status(folder) == "interrupted" and checkpoints.steps(folder)[-1] == at
    assert max(metrics.read(folder / "metrics.csv")["step"]) <= at
    stop_after(None)
    assert run_toy(folder, resume=True) == ("finished", None, STEPS)
    check_same_files(folder, whole_toy)
    check_same_state(folder, whole_toy, LIKE)


OPTIM = {"_target_": "optax.adam", "learning_rate": 0.1, "b1": 0.9}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"optim": {**OPTIM, "b1": 0.8}},
            "optim.b1=0.8, and .*4 was trained with 0.9:\nwrite that",
        ),
        ({"optim": OPTIM, "steps": 12}, "config.yaml has steps=12, and .* with 10"),
        ({}, "optim._target_=None, and .* with optax.adam"),
        ({"optim": OPTIM, "projection": {"bound": 1}}, "projection.bound=1, and .* with None"),
        ({"optim": {**OPTIM, "_target_": "optax.gone"}}, "_target_=optax.gone, and"),
    ],
)
def test_a_config_that_was_changed_since_the_checkpoint_is_refused(
    tmp_path, stop_after, changes, message
):
    stop_after(4)
    run_toy(tmp_path / "run", config={**NUMBERS, "optim": OPTIM})
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    with pytest.raises(folders.RunError, match=message):
        run_toy(tmp_path / "run", resume=True, config={**NUMBERS, **changes})
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before


def test_what_may_change_in_a_config_is_not_compared(tmp_path, stop_after):
    data = {"_target_": "experiments.data.text.load", "path": "there", "data_files": ["x", "z"]}
    old = {"mixers": [[{"_target_": "jaxpara.train.renamed"}]]}
    stop_after(4)
    run_toy(tmp_path / "run", config={**NUMBERS, "data": data, "model": old})
    stop_after(None)
    now = {**NUMBERS, "data": {**data, "path": "here", "data_files": ["y", "z"]}, "trust": "x"}
    new = {"mixers": [[{"_target_": "jaxpara.train.optimizer"}]]}
    now = {**now, "profile": True, "model": new}
    assert run_toy(tmp_path / "run", resume=True, config=now).status == "finished"


def test_a_list_of_settings_is_compared_item_by_item():
    before = {"model": {"mixers": [{"_target_": "jaxpara.nn.gone"}, {"width": 3}]}}
    resuming.check_same({"model.mixers": before["model"]["mixers"]}, before, "an earlier version")
    after = {"model": {"mixers": [{"_target_": "jaxpara.nn.decoder"}, {"width": 4}]}}
    with pytest.raises(folders.RunError, match=r"has model.mixers\[1\].width=4, and c was .* 3:"):
        resuming.check_same(resuming.compared(before), after, "c")


def test_a_checkpoint_of_before_settings_were_kept_continues(tmp_path, stop_after, monkeypatch):
    stop_after(4)
    monkeypatch.setattr(trainer, "compared", lambda config: None)
    with pytest.raises(seals.Damaged, match="settings is None; expected settings by name"):
        run_toy(tmp_path / "run")
        run_toy(tmp_path / "run", resume=True)
    resuming.check_same(None, NUMBERS, "checkpoints/4")


def test_a_run_interrupted_twice_equals_one_that_was_not(tmp_path, whole_toy, stop_after):
    folder = tmp_path / "run"
    for at, resume in ((2, False), (5, True), (None, True)):
        stop_after(at)  # counted from where it goes on
        run_toy(folder, resume=resume)
    check_same_files(folder, whole_toy)


def test_rows_after_the_last_checkpoint_are_written_once(tmp_path, whole_toy, stop_after):
    folder = tmp_path / "run"
    stop_after(7)
    run_toy(folder)
    shutil.rmtree(folder / "checkpoints" / "7")  # as if killed then: 4 is the last one
    assert checkpoints.steps(folder) == [4]
    assert max(metrics.read(folder / "metrics.csv")["step"]) == 6
    with (folder / "metrics.csv").open("a") as file:
        file.write("8,32,1.")
    stop_after(None)
    run_toy(folder, resume=True)
    check_same_files(folder, whole_toy)


@pytest.mark.parametrize("then", ["moved", "replaced", "copied over"])
def test_a_folder_that_is_taken_away_from_a_run_is_not_written_to(tmp_path, capsys, then):
    folder, there = tmp_path / "run", tmp_path / "there"

    def take(step, params):
        if step == 4:
            folder.rename(there)
            if then == "replaced":
                folder.mkdir()
            if then == "copied over":
                shutil.copytree(there, folder)
        return {"norm": 1.0}

    with claim.claimed(folder):
        with pytest.raises(folders.RunError, match="run was moved, removed or replaced while its"):
            run_toy(folder, evaluate=take)
    written = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []
    assert "summary.json" not in written and not checkpoints.steps(folder)
    assert run_toy(there, resume=True).status == "finished"


def test_a_table_that_is_missing_is_said(tmp_path, stop_after, capsys):
    stop_after(5)
    run_toy(tmp_path / "run")
    (tmp_path / "run" / "metrics.csv").unlink()
    run_toy(tmp_path / "run", resume=True)
    assert "metrics.csv is missing: its rows up to step 5 are lost" in capsys.readouterr().err


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    tmp_path, whole_toy, stop_after, capsys
):
    folder = tmp_path / "run"
    stop_after(3)
    run_toy(folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / "summary.json").unlink()
    assert folders.status(folder) is None
    stop_after(None)
    capsys.readouterr()
    assert run_toy(folder, resume=True) == ("finished", None, STEPS)
    assert "has no checkpoint: its run begins again" in capsys.readouterr().err
    check_same_files(folder, whole_toy)
    check_same_state(folder, whole_toy, LIKE)


def test_a_run_whose_last_checkpoint_is_damaged_continues_from_the_one_before(
    tmp_path, whole_toy, stop_after, capsys
):
    folder = tmp_path / "run"
    stop_after(9)
    run_toy(folder)
    assert checkpoints.steps(folder) == [8, 9] or checkpoints.steps(folder) == [4, 9]
    before, last = checkpoints.steps(folder)
    params = checkpoints.path_of(folder, last) / "params"
    file = max((f for f in params.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    injection.flip(file, np.random.default_rng(0))
    stop_after(None)
    assert run_toy(folder, resume=True) == ("finished", None, STEPS)
    said = capsys.readouterr().err
    assert f"{file} is damaged: it is not what was written; the checkpoint of step {before}" in said
    assert checkpoints.steps(folder)[-1] == STEPS
    shutil.rmtree(folder / "damaged")
    check_same_files(folder, whole_toy)
    check_same_state(folder, whole_toy, LIKE)


def test_a_solved_task_that_was_interrupted_while_finishing_trains_no_further(tmp_path):
    def fail(folder, params, summary):
        raise RuntimeError("killed while finishing")

    solved = {"solved": lambda figures: True}
    with pytest.raises(RuntimeError, match="killed"):
        run_toy(tmp_path / "run", finish=fail, **solved)
    assert folders.status(tmp_path / "run") == "failed"
    assert run_toy(tmp_path / "run", resume=True, **solved) == ("finished", None, 4)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["norm"] == summary["end"]


def test_ctrl_c_while_finishing_prints_the_command_to_continue(tmp_path, capsys):
    def press(folder, params, summary):
        raise KeyboardInterrupt

    folder, solved = tmp_path / "run", {"solved": lambda figures: True}
    with pytest.raises(KeyboardInterrupt):
        run_toy(folder, finish=press, **solved)
    assert folders.status(folder) == "interrupted"
    said = capsys.readouterr().out
    assert f"interrupted. The last checkpoint is {checkpoints.path_of(folder, 4)}. Continue" in said
    assert checkpoints.resume_command(folder) in said
    assert run_toy(folder, resume=True, **solved) == ("finished", None, 4)


@pytest.mark.parametrize(
    "code, remedy",
    [
        (errno.ENOSPC, "Make room there"),
        (errno.EROFS, "Check that it can be written to"),
        (errno.ENOTCONN, "Check that it can be written to"),
    ],
)
def test_a_full_disk_at_a_row_names_the_last_checkpoint(tmp_path, whole_toy, code, remedy):
    folder = tmp_path / "run"

    def full(place):
        def write(step, values):
            if step == 6:
                raise OSError(code, os.strerror(code))

        return Logger(write, lambda: None)

    with pytest.raises(folders.RunError) as caught:
        run_toy(folder, sinks=[full])
    assert re.search(
        rf"{os.strerror(code)}. The last checkpoint is {folder}/checkpoints/4. {remedy}, "
        rf"then continue with\n  python -m experiments.train resume={folder}$",
        str(caught.value),
    )
    assert folders.status(folder) == "failed"
    assert run_toy(folder, resume=True).status == "finished"
    check_same_files(folder, whole_toy)


def test_a_config_of_another_version_is_said_to_be_one():
    old = {name: value for name, value in NUMBERS.items() if name != "trace"}
    with pytest.raises(folders.RunError, match="x: the config has no trace: another version"):
        make_settings(old, place=Path("x"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "steps=0: expected a whole number, at least 1"),
        ({"accumulate": 3}, "accumulate=3 does not divide batch_size=4: give a batch_size that"),
        (
            {"checkpoint": {"every": 0, "keep_last": 1, "keep_best": 1}},
            "checkpoint.every=0: expected",
        ),
        (
            {"checkpoint": {"every": 1, "keep_last": 0, "keep_best": 1}},
            "keep_last=0: expected",
        ),
        ({"checkpoint": {"every": 1, "keep_last": 1, "keep_best": -1}}, "keep_best=-1: expected"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(folders.RunError, match=message):
        make_settings({**NUMBERS, **changes})


def test_a_setting_of_a_folder_that_does_not_fit_names_its_file():
    for changes in ({"profile": True, "trace": {"start": 9, "steps": 9}}, {"accumulate": 3}):
        with pytest.raises(folders.RunError, match="^run/config.yaml: (trace.start|accumulate)="):
            make_settings({**NUMBERS, **changes}, place=Path("run/config.yaml"))


def test_recording_the_environment_writes_nothing_into_the_repository(tmp_path, monkeypatch):
    def git(*arguments):
        name = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", tmp_path, *name, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("text")
    git("add", "file")
    git("commit", "-m", "one")
    os.utime(tmp_path / "file", (1, 1))  # `git status` would note in the index that it is the same
    index = (tmp_path / ".git" / "index").read_bytes()
    monkeypatch.setattr(folders, "REPOSITORY", tmp_path)
    known = folders.environment()
    assert len(known["git_commit"]) == 40 and known["git_dirty"] is False
    assert (tmp_path / ".git" / "index").read_bytes() == index
    git("status")
    assert (tmp_path / ".git" / "index").read_bytes() != index, "or the test would show nothing"
