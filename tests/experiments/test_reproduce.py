"""`make reproduce`: what an experiment's file promises is read, run and compared."""

import math
import re
import subprocess
import sys

import pytest

from experiments import reproduce
from experiments.reproduce import Trial, read_figures, read_head
from experiments.run.folders import RunError

HEAD = """# @package _global_
# python -m experiments.train experiment=toy
# 4 minutes on two CPU cores: loss 1.5 +- 0.25, accuracy >= 0.9
# small, 0.5 minutes: steps=4 +x.y=[1,2]:
#   loss <= 2e1
# What else there is to say: nothing.
name: toy
# 9 minutes on another machine: loss 9 +- 9
"""


@pytest.fixture
def write(tmp_path):
    def write_(name="toy", head=HEAD):
        (tmp_path / f"{name}.yaml").write_text(head)
        return tmp_path / f"{name}.yaml"

    return write_


def test_a_head_is_read_into_its_two_trials(write):
    trials = read_head(write())
    full, small = trials["full"], trials["small"]
    assert full.module == small.module == "experiments.train"
    assert full.overrides == ["experiment=toy"] and full.minutes == 4
    assert small.overrides == ["experiment=toy", "steps=4", "+x.y=[1,2]"] and small.minutes == 0.5
    bounds = [(e.figure, e.low, e.high) for e in (*full.expected, *small.expected)]
    assert bounds == [
        ("loss", 1.25, 1.75),
        ("accuracy", 0.9, math.inf),
        ("loss", -math.inf, 20),
    ]


LATER = """# python -m experiments.finetune experiment=toy
# first: python -m experiments.train experiment=lm
#   model.width=8 hydra.run.dir=runs/base
# 4 minutes on two CPU cores: loss 1.5 +- 0.25
# small, 0.5 minutes: first.steps=4 steps=2: loss <= 2
"""


def test_what_an_experiment_starts_from_is_a_trial_of_its_own(write):
    full, small = (read_head(write(head=LATER))[size] for size in ("full", "small"))
    assert full.module == "experiments.finetune" and full.first.module == "experiments.train"
    assert full.first.overrides == ["experiment=lm", "model.width=8"]
    assert small.overrides == ["experiment=toy", "steps=2"]
    assert small.first.overrides == ["experiment=lm", "model.width=8", "steps=4"]
    with pytest.raises(RunError, match="first.steps=4 is for a first run"):
        read_head(write(head=LATER.replace("# first", "# First")))


def test_it_is_run_before_and_given_as_from(write, tmp_path, monkeypatch):
    ran, codes = [], [0, 0, 3]

    def run(command, **options):
        ran.append(command[2:])
        return subprocess.CompletedProcess(command, codes[len(ran) - 1])

    monkeypatch.setattr(reproduce.subprocess, "run", run)
    trial, base = read_head(write(head=LATER))["full"], tmp_path / "toy-base"
    assert reproduce.run_trial(trial, tmp_path / "toy") == ({}, None)
    assert ran[0] == [
        "experiments.train",
        "experiment=lm",
        "model.width=8",
        f"hydra.run.dir={base}",
    ]
    assert ran[1] == [
        "experiments.finetune",
        "experiment=toy",
        f"from={base}",
        f"hydra.run.dir={tmp_path / 'toy'}",
    ]
    _, wrong = reproduce.run_trial(trial, tmp_path / "toy")
    assert wrong == f"the run that it starts from: exit code 3, see {base}.log" and len(ran) == 3


@pytest.mark.parametrize("line", ["# python", "# 4 min", "# small"])
def test_a_head_that_lacks_a_line_is_an_error_that_shows_one(write, line):
    path = write(head="\n".join(x for x in HEAD.splitlines() if not x.startswith(line)))
    with pytest.raises(
        RunError, match=rf"toy.yaml: its first comments need a line such as\n  {line}"
    ):
        read_head(path)


@pytest.mark.parametrize("text", ["loss", "loss 1.5", "loss 1 +- x", "loss = 3", "", "a >= 1,"])
def test_a_figure_that_cannot_be_read_is_an_error(text):
    with pytest.raises(ValueError, match="NAME VALUE|could not convert"):
        read_figures(text)


@pytest.mark.parametrize("path", sorted(reproduce.EXPERIMENTS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_experiment_says_its_command_its_minutes_and_its_figures(path):
    for size, trial in read_head(path).items():
        assert f"experiment={path.stem}" in trial.overrides
        assert trial.expected and trial.minutes > 0
        assert size == "full" or trial.minutes <= 2


@pytest.mark.parametrize(
    "found, verdict",
    [
        ({"loss": 1.6, "accuracy": 1.0}, "as expected"),
        ({"loss": 1.8, "accuracy": 1.0}, "loss is 1.8"),
        ({"loss": math.nan, "accuracy": 0.1}, "loss is nan; accuracy is 0.1"),
        ({"accuracy": 0.9}, "summary.json has no number loss"),
    ],
)
def test_figures_are_compared_and_shown(write, tmp_path, capsys, found, verdict):
    def run(trial, folder):
        assert folder == tmp_path / "toy"
        return found, None

    good = reproduce.reproduce([write()], size="full", folder=tmp_path, run=run)
    shown = capsys.readouterr().out
    assert verdict in shown and "loss 1.5 +- 0.25, accuracy >= 0.9" in shown
    assert good == (verdict == "as expected")


def test_an_experiment_that_breaks_does_not_keep_the_others_from_running(write, tmp_path, capsys):
    ran = []

    def run(trial, folder):
        ran.append(folder.name)
        return ({}, "exit code 1") if folder.name == "bad" else ({"loss": 2}, None)

    files = [write("bad"), write("good")]
    assert not reproduce.reproduce(files, size="small", folder=tmp_path, run=run)
    shown = capsys.readouterr().out
    assert ran == ["bad", "good"] and "exit code 1" in shown and "as expected" in shown


def test_a_trial_is_a_process_whose_output_is_kept(tmp_path):
    trial = Trial("this", [], 1, [])  # a module of the standard library that prints
    summary, wrong = reproduce.run_trial(trial, tmp_path / "run")
    assert summary == {} and wrong is None
    assert "Beautiful is better than ugly." in (tmp_path / "run.log").read_text()
    _, wrong = reproduce.run_trial(trial._replace(module="no_such_module"), tmp_path / "run")
    assert wrong == f"exit code 1, see {tmp_path / 'run.log'}"


def test_an_unknown_experiment_is_named_with_those_there_are(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reproduce", "full", "lmm"])
    with pytest.raises(SystemExit):
        reproduce.main()
    assert re.search("no experiment is named lmm; choose from .*lm, ", capsys.readouterr().err)
