"""A hard life in real processes: killed in a write, a full disk, SIGTERM, a scheduler, Ctrl-C.

One run lives through all of it: each process goes on where the one before left off. The
first test to ask starts the chain; what happened is kept for all.
"""

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from experiments.run import checkpoints, folders, metrics
from experiments.shell import commandline
from experiments.shell.build import build_model
from experiments.shell.explanations import explain

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = (
    "steps=1000000 eval_every=1000000 checkpoint.every=1 log_every=1 mixer=attention "
    "mixer.heads=2 model.width=8 model.layers=1 batch_size=2 window=16 evaluation.windows=2 "
    "evaluation.length=16 evaluation.batch_size=2 check.batch_size=2 check.length=16"
).split()
# A launcher that queues its job again and leaves when the scheduler warns it, as submitit does.
LAUNCHER = """
import signal, sys
def again(signum, frame):
    print("queued again", flush=True)
    sys.exit(75)
signal.signal(signal.SIGUSR2, again)
from experiments.train import main
main()
"""
PATIENCE = 300  # seconds for a process on a machine that does much else


class Event(NamedTuple):
    """What one process left behind.

    Attributes:
      code: its exit code.
      said: stdout and stderr.
      before: whole checkpoints when it began.
      after: whole checkpoints when it had ended.
      rows: steps in `metrics.csv` then.
    """

    code: int
    said: str
    before: list[int]
    after: list[int]
    rows: list[float]


def half_written(folder):
    return list((folder / checkpoints.FOLDER).glob("*tmp*"))


def until(condition, process):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)


def live(folder, *arguments, act, file_limit=None, program=("-m", "experiments.train")):
    """Starts a process, acts on it, and gathers what it leaves."""
    before = checkpoints.steps(folder)
    with contextlib.ExitStack() as stack:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if file_limit:  # what is half in a cache would harm those who come after
            environment |= {"JAX_ENABLE_COMPILATION_CACHE": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, *program, *arguments],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        stack.callback(process.kill)
        if file_limit:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (file_limit, file_limit))
        act(process)
        said, _ = process.communicate(timeout=PATIENCE)
    rows = metrics.read(folder / "metrics.csv")["step"]
    return Event(process.returncode, said, before, checkpoints.steps(folder), rows)


def kill_while_it_writes(folder):
    def act(process):
        # Stopped first, so that it is certainly in the middle of it when it is killed.
        while True:
            until(lambda: len(checkpoints.steps(folder)) > 1 and half_written(folder), process)
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.02)
            if half_written(folder):
                return process.kill()
            process.send_signal(signal.SIGCONT)

    return act


def send_after_a_checkpoint(folder, which):
    def act(process):
        before = checkpoints.steps(folder)[-1]
        until(lambda: checkpoints.steps(folder)[-1] > before + 2, process)
        process.send_signal(which)

    return act


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    """What happened, by name, and the run's folder."""
    text = tmp_path_factory.mktemp("text")
    for i in range(20):
        (text / f"f{i}.py").write_text(f"def f_{i}(x):\n    return x + {i}\n" * 20)
    folder = tmp_path_factory.mktemp("life") / "run"
    start = (f"hydra.run.dir={folder}", f"data.root={text}", *ENDLESS)
    happened = {"killed": live(folder, *start, act=kill_while_it_writes(folder))}
    happened["half"] = half_written(folder)
    continues = (f"resume={folder}", f"trust={text}")
    happened["full"] = live(folder, *continues, act=lambda process: None, file_limit=4096)
    for name in ("SIGTERM", "SIGUSR2", "SIGINT"):
        act = send_after_a_checkpoint(folder, signal.Signals[name])
        program = ("-c", LAUNCHER) if name == "SIGUSR2" else ("-m", "experiments.train")
        happened[name] = live(folder, *continues, act=act, program=program)
    return folder, happened


@pytest.mark.slow
def test_a_checkpoint_that_was_being_written_when_the_process_was_killed_is_ignored(life):
    _, happened = life
    killed, full = happened["killed"], happened["full"]
    assert killed.code == -signal.SIGKILL and happened["half"], "it was in the middle of a write"
    half = int(happened["half"][0].name.partition(".")[0])
    assert half not in killed.after and killed.after == full.before != []
    assert f"continues after step {killed.after[-1]} of" in full.said


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint_and_is_explained(life):
    folder, happened = life
    full = happened["full"]
    assert full.code == 1
    last = full.before[-1]
    assert re.search(
        rf"error: the checkpoint of step {last + 1} could not be written to .*checkpoints: "
        rf"File too large; that of step {last} is intact. Make room there, then continue with\n"
        rf"  python -m experiments.train resume=\S*{folder.name} trust=\S+\n",
        full.said,
    ), full.said
    assert "_SignalingThread" not in full.said, "Orbax's own accounts are not shown"
    assert full.after == full.before
    assert f"continues after step {last} of" in happened["SIGTERM"].said


@pytest.mark.slow
@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGUSR2", 75), ("SIGINT", 130)])
def test_a_signal_saves_and_says_how_to_go_on(life, name, code):
    folder, happened = life
    event = happened[name]
    assert event.code == code, event.said
    last = event.after[-1]
    assert last > event.before[-1]
    assert f"continues after step {event.before[-1]} of 1000000" in event.said
    assert re.search(
        rf"interrupted after step {last} of 1000000; everything is saved in \S+{folder.name}\. "
        rf"Continue with\n  python -m experiments\.train resume=\S+{folder.name} trust=\S+\n"
        + ("queued again\n$" if name == "SIGUSR2" else "$"),
        event.said,
    ), event.said
    assert half_written(folder) == []


@pytest.mark.slow
def test_no_row_is_lost_or_written_twice_through_all_of_it(life):
    folder, happened = life
    end = happened["SIGINT"]
    trained = [
        step
        for step, loss in zip(
            end.rows, metrics.read(folder / "metrics.csv")["train_loss_nats"], strict=True
        )
        if loss is not None
    ]
    assert trained == list(range(1, end.after[-1] + 1))
    like = jax.eval_shape(build_model(folders.load_config(folder)).init, jax.random.key(0))
    params = checkpoints.load_params(folder, like)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


UNREAD = """
from experiments.shell import commandline
def main():
    input()
    while True:
        print("x", flush=True)
commandline.launch(main)
"""


def test_a_reader_that_leaves_ends_a_command_without_a_word(capfd):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", UNREAD], cwd=ROOT, text=True, **pipes) as command:
        command.stdout.close()
        command.stdin.write("go on\n")
        command.stdin.close()
        assert command.stderr.read() == "" and command.wait(timeout=60) == 141

    def main():  # a pipe of its own, such as a logger's
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        commandline.launch(main)
    assert explain(BrokenPipeError(32, "Broken pipe")) is None


# Python imports a module of this name before anything else.
DROPPED = """
import gc, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sent = []

def collected(phase, info):
    if "jax" in sys.modules and not sent:
        sent.append(True)
        print("sent", flush=True)
        signal.raise_signal(signal.SIGINT)
        sum(range(10))  # the handler runs between two instructions

gc.callbacks.append(collected)
"""


def test_a_ctrl_c_that_python_drops_while_modules_are_imported_shows_no_traceback(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(DROPPED)
    process = subprocess.run(
        [sys.executable, "-m", "experiments.plot"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert (process.stdout, process.stderr, process.returncode) == ("sent\n", "interrupted\n", 130)
