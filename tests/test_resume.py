"""A run that was interrupted goes on as if it had not been."""

import errno
import json
import re
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from omegaconf import OmegaConf

from experiments import checkpoints, metrics, runs, train, trainer
from experiments.build import build
from experiments.loggers import Logger
from experiments.resuming import check_overrides, cut_table, resume_arguments
from experiments.task import Table, Task
from jaxpara.train import init_state
from jaxpara.types import Model

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
TINY = (
    "steps=10 mixer=attention mixer.heads=2 model.width=8 model.layers=1 batch_size=2 window=16 "
    "log_every=2 eval_every=4 "
    "evaluation.windows=6 evaluation.length=16 evaluation.batch_size=4 check.batch_size=2 "
    "check.length=16 sample.length=8"
).split()
# Of the machine, not of the run.
MEASURED = {"seconds", "tokens_per_second", "memory_bytes", "model_flops_per_second"}
MEASURED |= {"training_seconds", "compile_seconds", "model_flops_per_token", "solvers"}


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


def run_toy(folder, *, resume=False, sinks=(), **changes):
    if not resume:
        runs.open_run(folder, OmegaConf.create(NUMBERS))
    return trainer.train(
        toy()._replace(**changes),
        optimizer=OPTIMIZER,
        projection=None,
        settings=trainer.make_settings(NUMBERS),
        folder=folder,
        sinks=sinks,
        config=NUMBERS,
        resume=resume,
    )


@pytest.fixture
def stop_after(monkeypatch):
    """Ctrl-C at exactly that step; None lets runs come to their end."""

    def choose(step):
        @contextmanager
        def stop_signal():
            asked = 0

            def stopped():  # asked once a step, and once more at the end
                nonlocal asked
                asked += 1
                return signal.SIGINT if step is not None and asked >= step else None

            yield stopped

        monkeypatch.setattr(trainer, "stop_signal", stop_signal)

    return choose


def check_same_state(folder, whole, like):
    """The last checkpoints hold the same numbers, bit for bit."""
    found = []
    for one in (folder, whole):
        state, run = checkpoints.restore(one, checkpoints.steps(one)[-1], like)
        state = state._replace(key=jax.random.key_data(state.key))
        run["memory"] = run["memory"]["losses"]
        found.append((jax.tree.leaves(state), run))
    assert all(map(np.array_equal, found[0][0], found[1][0]))
    assert found[0][1] == found[1][1]
    assert checkpoints.steps(folder) == checkpoints.steps(whole)


def check_same_files(folder, whole):
    """Tables and summary agree in all but what depends on the machine; the same files are there."""
    names = [{path.name for path in f.iterdir()} for f in (folder, whole)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith(".csv"):
            rows, expected = metrics.read(folder / name), metrics.read(whole / name)
            assert list(rows) == list(expected)
            assert all(rows[c] == expected[c] for c in set(rows) - MEASURED), name
    one, two = (json.loads((f / "summary.json").read_text()) for f in (folder, whole))
    assert one.keys() | MEASURED == two.keys() | MEASURED
    assert {k: one[k] for k in one.keys() - MEASURED} == {k: two[k] for k in two.keys() - MEASURED}


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
    assert runs.status(folder) == "interrupted" and checkpoints.steps(folder)[-1] == at
    assert max(metrics.read(folder / "metrics.csv")["step"]) <= at
    stop_after(None)
    assert run_toy(folder, resume=True) == ("finished", None, STEPS)
    check_same_files(folder, whole_toy)
    check_same_state(folder, whole_toy, LIKE)


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


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path, whole_toy, stop_after):
    folder = tmp_path / "run"
    stop_after(3)
    run_toy(folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / "summary.json").unlink()
    assert runs.status(folder) is None
    stop_after(None)
    assert run_toy(folder, resume=True) == ("finished", None, STEPS)
    check_same_files(folder, whole_toy)
    check_same_state(folder, whole_toy, LIKE)


def test_a_solved_task_that_was_interrupted_while_finishing_trains_no_further(tmp_path):
    def fail(folder, params, summary):
        raise RuntimeError("killed while finishing")

    solved = {"solved": lambda figures: True}
    with pytest.raises(RuntimeError, match="killed"):
        run_toy(tmp_path / "run", finish=fail, **solved)
    assert runs.status(tmp_path / "run") == "failed"
    assert run_toy(tmp_path / "run", resume=True, **solved) == ("finished", None, 4)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["norm"] == summary["end"]


def test_no_room_for_a_row_is_said_with_the_last_checkpoint_and_the_way_on(tmp_path, whole_toy):
    folder = tmp_path / "run"

    def full(place):
        def write(step, values):
            if step == 6:
                raise OSError(errno.ENOSPC, "No space left on device")

        return Logger(write, lambda: None)

    with pytest.raises(runs.RunError) as caught:
        run_toy(folder, sinks=[full])
    assert re.search(
        rf"No space left on device. The last checkpoint is {folder}/checkpoints/4; make room, then "
        rf"go on with\n  python -m experiments.train resume={folder}$",
        str(caught.value),
    )
    assert runs.status(folder) == "failed"
    assert run_toy(folder, resume=True).status == "finished"
    check_same_files(folder, whole_toy)


def test_a_config_of_another_version_is_said_to_be_one():
    old = {name: value for name, value in NUMBERS.items() if name != "trace"}
    with pytest.raises(runs.RunError, match="the config has no trace: another version"):
        trainer.make_settings(old)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "steps=0: give at least 1"),
        ({"accumulate": 3}, "accumulate=3 does not divide batch_size=4: give a batch_size that"),
        ({"checkpoint": {"every": 0, "keep_last": 1, "keep_best": 1}}, "checkpoint.every=0: give"),
        (
            {"checkpoint": {"every": 1, "keep_last": 0, "keep_best": 1}},
            "keep_last=0: give at l",
        ),
        ({"checkpoint": {"every": 1, "keep_last": 1, "keep_best": -1}}, "keep_best=-1: give at l"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(runs.RunError, match=message):
        trainer.make_settings({**NUMBERS, **changes})


# The command.


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    for i in range(20):
        (root / f"f{i}.py").write_text(f"def f_{i}(x):\n    return x + {i}\n" * 20)
    return root


def call(*arguments):
    """Runs the command in this process; returns its exit code, the message being on stderr."""
    before = sys.argv
    sys.argv = ["train.py", *map(str, arguments)]
    try:
        train.main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code
    finally:
        sys.argv = before
    return 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """A language model that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert call(f"hydra.run.dir={folder}", f"data.root={text}", *TINY) == 0
    return folder


def test_a_language_model_interrupted_and_resumed_equals_one_that_was_not(
    tmp_path, text, whole, stop_after, capsys
):
    folder = tmp_path / "run"
    stop_after(5)
    assert call(f"hydra.run.dir={folder}", f"data.root={text}", *TINY) == 130
    said = capsys.readouterr().out
    assert "interrupted after step 5 of 10" in said
    command = re.search(r"python -m experiments\.train (resume=\S+)$", said, re.M)
    stop_after(None)
    assert call(command[1]) == 0
    assert "goes on after step 5 of 10" in capsys.readouterr().out
    parts = build(runs.load_config(folder))
    key = jax.random.key(0)
    like = jax.eval_shape(lambda: init_state(parts.task.model, parts.optimizer, key))
    check_same_files(folder, whole)
    check_same_state(folder, whole, like)
    assert (folder / "sample.txt").read_bytes() == (whole / "sample.txt").read_bytes()
    known = json.loads((folder / "env.json").read_text())
    assert len(known["resumed"]) == 1 and known["command"] != known["resumed"][0]["command"]
    overrides = OmegaConf.load(folder / ".hydra" / "overrides.yaml")
    assert "steps=10" in overrides, "how the run was begun is still there"


def test_resume_true_begins_a_run_where_there_is_none_and_does_nothing_where_it_is_finished(
    tmp_path, text, whole, capsys
):
    arguments = [f"hydra.run.dir={whole}", f"data.root={text}", *TINY, "resume=true"]
    assert call(*arguments) == 0
    assert "the run is finished, nothing is left to do" in capsys.readouterr().out
    arguments[0] = f"hydra.run.dir={tmp_path / 'new'}"
    assert call(*arguments, "steps=0") == 1
    assert "steps=0: give at least 1" in capsys.readouterr().err, "it goes about a new run"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["steps=20"], r"error: steps=20 contradicts the run in .*, which has steps=10: leave it"),
        (["optim.learning_rate=1.0"], r"optim.learning_rate=1.0 contradicts .*=0.006"),
        (["cell=para_lstm"], r"cell=para_lstm contradicts the run in .*, which has cell=para_gru"),
        (["solver@parallel=newton"], r"solver@parallel=newton contradicts .*=shooting"),
        (["model.layers=1", "seed=3"], "seed=3 contradicts .* which has seed=0"),
        (["experiment=state_tracking"], "experiment=state_tracking contradicts .*experiment=lm"),
    ],
)
def test_a_command_line_that_contradicts_the_folder_is_an_error_that_names_the_key(
    whole, capsys, overrides, message
):
    before = (whole / "metrics.csv").read_bytes()
    assert call(f"resume={whole}", *overrides) == 1
    assert re.search(message, capsys.readouterr().err)
    assert (whole / "metrics.csv").read_bytes() == before


def test_a_command_line_that_agrees_with_the_folder_is_taken(whole, capsys):
    assert call(f"resume={whole}", "experiment=lm", "steps=10", "cell=para_gru") == 0
    assert "the run is finished" in capsys.readouterr().out


def test_resume_of_no_run_makes_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("resume=gone") == 1
    assert re.search("error: run='gone': no such folder", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_only_a_folder_is_turned_into_arguments(whole):
    plain = ["resume=true", "resume=false", "steps=3", "-m"]
    assert resume_arguments(plain) == plain
    changed = resume_arguments([f"resume={whole}"])
    assert changed == ["resume=true", f"hydra.run.dir='{whole}'", "hydra.output_subdir=null"]


def test_keys_that_hydra_alone_reads_contradict_nothing():
    cfg = OmegaConf.create({"steps": 3})
    check_overrides(["hydra.verbose=true", "resume=true"], cfg=cfg, stored=cfg, folder=Path("x"))


@pytest.mark.parametrize(
    "rows, last, kept",
    [
        ("0,a\n2,b\n4,c\n", 2, "0,a\n2,b\n"),
        ("0,a\n2,b\n4", 4, "0,a\n2,b\n"),
        ("0,a\n", -1, ""),
    ],
)
def test_rows_after_the_checkpoint_are_cut_and_half_rows_too(tmp_path, rows, last, kept):
    table = tmp_path / "t.csv"
    table.write_text("step,x\n" + rows)
    cut_table(table, last=last)
    assert table.read_text().replace("\r", "") == "step,x\n" + kept
    cut_table(tmp_path / "none.csv", last=3)
    assert not (tmp_path / "none.csv").exists()
