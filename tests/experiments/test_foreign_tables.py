"""Runs of anybody in tables and figures: a bad one is left out, and the terminal obeys none."""

import json
import os
import re

import pytest
import yaml

from experiments import compare, plot
from experiments.run import folders, metrics, plain_files, seals, tables
from experiments.run.folders import RunError
from experiments.shell.explanations import explain
from experiments.studies import mixers
from experiments.sweep import run_sets
from tests.experiments.run_folders import config, make_run
from tests.experiments.saved_run import call

ESCAPE = "\x1b]0;owned\x07\x1b[31m"
JUDGED = "validation_bits_per_byte"


@pytest.fixture
def pair(tmp_path):
    """A good run, and one to be made bad."""
    summary = {"status": "finished", "judged_by": [JUDGED, "min"], "seconds": 1}
    for seed, name in enumerate(("good", "bad")):
        cfg = config(seed=seed, contender="gru")
        make_run(tmp_path / "runs" / name, cfg, summary=summary, environment={"git_dirty": True})
    return tmp_path / "runs"


def change(path, **values):
    """A file of JSON, or of YAML, with top-level keys replaced."""
    known = yaml.safe_load(path.read_text())
    path.write_text(json.dumps({**known, **values}))


def shown(capsys, place, *arguments):
    """What `compare` prints."""
    assert call(compare, place, *arguments) is None
    return capsys.readouterr().out


BAD = [
    *(("summary.json", {"seconds": value}) for value in ("abc", [1], {}, 10**400, True)),
    *(("summary.json", {"parameters": value}) for value in ("abc", [1], 10**400)),
    *(("summary.json", {name: {}}) for name in ("tokens_per_second", "status", "judged_by")),
    ("summary.json", {"judged_by": [["x"], "min"]}),
    ("summary.json", {"judged_by": ["x", "least"]}),
    ("summary.json", {JUDGED: "x"}),
    ("summary.json", {"anything": 10**400}),
    *(("env.json", {"git_commit": value}) for value in (5, [1], {"a": 1})),
    ("env.json", {"git_dirty": "x"}),
    ("config.yaml", {"mixer": {"_target_": "builtins.tuple"}}),
    ("config.yaml", {"mixer": {"_target_": "builtins.tuple", "_args_": 5}}),
    ("config.yaml", {"cell": {"_target_": "hydra.utils.get_method"}}),
    ("config.yaml", {"optim": {"learning_rate": "x"}}),
    ("config.yaml", {"contender": 10**400}),
]


@pytest.mark.parametrize("name, values", BAD, ids=lambda x: str(x)[:50])
def test_a_bad_run_is_left_out_by_one_line_and_the_others_are_shown(pair, capsys, name, values):
    change(pair / "bad" / name, **values)
    table = shown(capsys, pair, "runs=.")
    assert "good" in table and "1 runs; " in table
    [line] = [line for line in table.splitlines() if line.startswith("left out: ")]
    assert "bad" in line and len(line) < 300


def test_what_every_run_writes_is_left_in(pair, capsys):
    values = {"baselines": {"gzip -9": None, "unigram": 2.0}, "best_step": None, "x": float("inf")}
    change(pair / "bad/summary.json", memory_bytes=None, **values, solvers=[{"a": [1]}], ok=True)
    change(pair / "bad/env.json", git_commit=None, git_dirty=None)
    assert "2 runs; " in shown(capsys, pair, "runs=.")


@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv", "summary.json", "env.json"])
def test_a_file_far_larger_than_a_run_writes_is_not_read(pair, capsys, name):
    with (pair / "bad" / name).open("ab") as file:
        file.truncate(20 << 30)
    with pytest.raises(ValueError, match="it has 21474836480 bytes, and at most 10 are read"):
        plain_files.read_bytes(pair / "bad" / name, most=10)
    table = shown(capsys, pair, "runs=.")
    assert re.search(rf"left out: .*bad/{name}.*21474836480 bytes, and at most \d+ are", table)
    folders.reopen_run(pair / "bad")
    assert folders.read_summary(pair / "bad") == {} or name != "summary.json"
    if name == "metrics.csv":
        assert metrics.readable(pair / "bad" / name, key="step")[0] == []


def test_a_seal_far_larger_than_any_is_damaged(tmp_path):
    (tmp_path / "x").write_text("x")
    seals.seal(tmp_path)
    with (tmp_path / seals.SEAL).open("ab") as file:
        file.truncate(20 << 30)
    with pytest.raises(seals.Damaged, match="digests.json is damaged"):
        seals.check(tmp_path)
    assert not seals.is_sealed(tmp_path)


def test_a_file_that_does_not_tell_its_size_is_read_no_further():
    path = "/proc/self/smaps"
    assert os.stat(path).st_size == 0
    with pytest.raises(ValueError, match="it has 101 bytes, and at most 100 are read"):
        plain_files.read_bytes(plain_files.Path(path), most=100)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv", "summary.json", "env.json", "x"])
@pytest.mark.parametrize("program", [compare, plot, mixers])
def test_a_link_out_of_a_run_is_not_read(pair, capsys, program, name):
    secret = pair.parent / "secret"
    secret.write_text("hunter2: hunter2\n")
    (pair / "bad" / name).unlink(missing_ok=True)
    (pair / "bad" / name).symlink_to(secret)
    said = f"{call(program, pair.parent, 'runs=runs')}\n{capsys.readouterr().out}"
    assert "hunter2" not in said
    assert f"left out: runs/bad/{name} is a link to {secret}, which is not in the run's" in said


def test_control_characters_of_a_folder_are_shown_by_their_codes(pair, capsys):
    for name in ("good", "bad"):
        change(pair / name / "summary.json", status=f"a{ESCAPE}\nb")
        change(pair / name / "config.yaml", **{f"key{ESCAPE}": f"{name}{ESCAPE}"})
    table = shown(capsys, pair, "runs=.", "output=t.md")
    assert "\x1b" not in table and "\x07" not in table
    assert "a\\x1b]0;owned\\x07\\x1b[31m\\nb" in table and "key\\x1b]0;" in table
    assert "\x1b" not in (pair / "t.md").read_text()
    (pair / "bad" / "metrics.csv").write_text(f"step,a\n1,{ESCAPE}\n")
    assert "\x1b" not in shown(capsys, pair, "runs=.")
    tables.show(f"\nTitle{ESCAPE}", (f"a{ESCAPE}",), [(f"b{ESCAPE}",)])
    seals.say(f"x{ESCAPE}\ny")
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and said.err.endswith("\ny\n")
    assert explain(RunError(f"x{ESCAPE}\ny")) == "x\\x1b]0;owned\\x07\\x1b[31m\ny"


def test_a_run_of_anybodys_is_read_once_its_link_is_trusted(pair, tmp_path, capsys):
    (pair / "bad/x").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("x")
    assert "1 runs; " in shown(capsys, pair, "runs=.")
    assert len(run_sets.read_all(str(pair))[0]) == 1
    assert "2 runs; " in shown(capsys, pair, "runs=.", f"trust={tmp_path / 'secret'}")
    assert call(plot, pair, "runs=.", f"trust=[{tmp_path / 'secret'}]") is None
    assert "from 2 runs" in capsys.readouterr().out
