"""docs/contributing/task.md, followed as it stands: its files, its command, its claims."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import tasks, train
from experiments.run import checkpoints, metrics
from experiments.shell.overrides import replaced

PAGE = (Path(__file__).resolve().parents[2] / "docs/contributing/task.md").read_text()


@pytest.fixture
def followed(tmp_path, monkeypatch):
    """The page's files, in places of their own that Python and Hydra also look in."""
    blocks = re.findall(r"^```(?:python|yaml)\n# (experiments/\S+)\n(.*?)^```", PAGE, re.M | re.S)
    names = ["experiments/tasks/marked.py", "experiments/conf/task/marked.yaml"]
    assert [name for name, _ in blocks] == names
    for name, text in blocks:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    path = [*tasks.__path__, str(tmp_path / "experiments" / "tasks")]
    monkeypatch.setattr(tasks, "__path__", path)
    yield tmp_path
    sys.modules.pop("experiments.tasks.marked", None)


def test_the_batches_are_what_the_page_says(followed):
    marked = importlib.import_module("experiments.tasks.marked")
    batch = marked.draw(0, 5, batch_size=64, length=7)
    for x, answer in zip(batch["x"], batch["answer"], strict=True):
        first, second = (number for number, mark in x if mark)
        assert answer == (first > second)
    again = marked.draw(0, 5, batch_size=64, length=7)
    assert np.array_equal(batch["x"], again["x"])
    with pytest.raises(ValueError, match="task.length=1, task.test_length=9: give at least 2"):
        marked.marked(
            cell=None, units=1, seed=0, batch_size=1, length=1, test_length=9, test_batch=1
        )


def test_the_command_trains_and_continues(followed, monkeypatch, capsys):
    (command,) = re.findall(r"^python -m experiments\.train (.*)$", PAGE, re.M)
    assert "task=marked" in command
    folder = followed / "run"
    few = ["steps=4", "eval_every=2", "batch_size=4", "task.length=4", "task.test_length=5"]
    conf = f"hydra.searchpath=[file://{followed}/experiments/conf]"
    monkeypatch.setattr(
        sys,
        "argv",
        ["train", *replaced(shlex.split(command), few), f"hydra.run.dir={folder}", conf],
    )
    train.main()
    assert "right at length 5" in capsys.readouterr().out
    figures = metrics.read(folder / "metrics.csv")
    assert [right for right in figures["right"] if right is not None]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished" and 0 <= summary["right"] <= 1
    assert checkpoints.steps(folder)[-1] == summary["steps"]
    monkeypatch.setattr(sys, "argv", ["train", f"resume={folder}", conf])
    train.main()
    assert "the run is finished" in capsys.readouterr().out
