"""`resume=` on the command line: the folder's own config is what counts."""

import contextlib
import errno
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from experiments import evaluate, finetune, generate, train
from experiments.run import claim, folders, opening
from experiments.run.folder_arguments import quote_folders, quote_value
from experiments.run.resuming import check_overrides, cut_table, resume_arguments
from experiments.shell.build import build, build_data
from jaxpara.train import init_state
from tests.experiments.interrupted_runs import check_same_files, check_same_state, stopper
from tests.experiments.programs import call, ending

TINY = (
    "steps=10 mixer=attention mixer.heads=2 model.width=8 model.layers=1 batch_size=2 window=16 "
    "log_every=2 eval_every=4 "
    "evaluation.windows=6 evaluation.length=16 evaluation.batch_size=4 check.batch_size=2 "
    "check.length=16 sample.length=8"
).split()


@pytest.fixture
def stop_after(monkeypatch):
    return stopper(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """A language model that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert call(train, ".", f"hydra.run.dir={folder}", f"data.root={text}", *TINY) == 0
    return folder


@pytest.mark.slow
def test_a_language_model_interrupted_and_resumed_equals_one_that_was_not(
    tmp_path, text, whole, stop_after, capsys
):
    folder = tmp_path / "run"
    stop_after(5)
    assert call(train, ".", f"hydra.run.dir={folder}", f"data.root={text}", *TINY) == 130
    said = capsys.readouterr().out
    assert "interrupted after step 5 of 10" in said
    command = re.search(r"python -m experiments\.train (resume=\S+) (trust=\S+)$", said, re.M)
    stop_after(None)
    assert call(train, ".", command[1]) == 1, "its text is outside of its folder"
    assert f"asks to read data.root={text}" in capsys.readouterr().err
    assert call(train, ".", *command.groups()) == 0
    assert "continues after step 5 of 10" in capsys.readouterr().out
    parts = build(folders.load_config(folder))
    key = jax.random.key(0)
    like = jax.eval_shape(lambda: init_state(parts.task.model, parts.optimizer, key))
    check_same_files(folder, whole)
    check_same_state(folder, whole, like)
    assert (folder / "sample.txt").read_bytes() == (whole / "sample.txt").read_bytes()
    known = json.loads((folder / "env.json").read_text())
    assert len(known["resumed"]) == 1 and known["command"] != known["resumed"][0]["command"]
    overrides = OmegaConf.load(folder / ".hydra" / "overrides.yaml")
    assert "steps=10" in overrides, "how the run was begun is still there"


def test_resume_true_starts_a_run_or_leaves_a_finished_one(tmp_path, text, whole, capsys):
    arguments = [f"hydra.run.dir={whole}", f"data.root={text}", *TINY, "resume=true"]
    assert call(train, ".", *arguments) == 0
    assert "the run is finished, there is nothing left to do" in capsys.readouterr().out
    arguments[0] = f"hydra.run.dir={tmp_path / 'new'}"
    arguments.remove("steps=10")
    assert call(train, ".", *arguments, "steps=0") == 1
    assert "steps=0: expected a whole number" in capsys.readouterr().err, "it goes about a new run"


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
    assert call(train, ".", f"resume={whole}", *overrides) == 1
    assert re.search(message, capsys.readouterr().err)
    assert (whole / "metrics.csv").read_bytes() == before


def test_a_command_line_that_agrees_with_the_folder_is_taken(whole, capsys):
    assert call(train, ".", f"resume={whole}", "experiment=lm", "steps=10", "cell=para_gru") == 0
    assert "the run is finished" in capsys.readouterr().out


def test_data_that_moved_is_named_anew(tmp_path, text, whole, stop_after, capsys):
    folder, there, other = (tmp_path / name for name in ("run", "there", "other"))
    shutil.copytree(whole, folder)
    shutil.copytree(text, there)
    shutil.copytree(text, other)
    for file in other.iterdir():
        file.write_text(file.read_text().replace("x", "y"))
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "10")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(text), "/gone"))
    first = config.read_text()
    stop_after(1)
    assert call(train, ".", f"resume={folder}", "data.path=x") == 1
    assert "data.path=x contradicts" in capsys.readouterr().err
    assert call(train, ".", f"resume={folder}", f"data.root={other}") == 1
    assert "saved for other data" in capsys.readouterr().err and config.read_text() == first
    assert call(evaluate, ".", *evaluate.prepare([f"run={folder}", f"data.root={there}"])) == 0
    assert call(evaluate, ".", *evaluate.prepare([f"run={folder}", f"data.root={other}"])) == 1
    assert "was evaluated on other held-out text" in capsys.readouterr().err
    assert call(evaluate, ".", *evaluate.prepare([f"run={folder}", "data.path=x"])) == 1
    assert "data.path=x: the data of" in capsys.readouterr().err
    assert call(train, ".", f"resume={folder}", "data=stdlib", f"data.root={there}") == 130
    assert folders.load_config(folder).data.root == str(there)
    assert f"trust={there}" in capsys.readouterr().out, "the printed command finds it there"


def test_a_place_of_data_needs_no_source_only_where_a_run_has_one(whole):
    changed = resume_arguments([f"resume={whole}", "data.path=x"])
    assert changed[-1] == "++data.path=x"
    for given in (["data.path=x"], ["resume=true", "data.path=x"]):
        assert resume_arguments(given) == given
    assert resume_arguments([f"resume={whole}", "data=text", "data.path=x"])[-1] == "data.path=x"


def test_a_contradiction_inside_a_group_names_the_setting(tmp_path):
    stored = OmegaConf.create({"data": {"path": "a", "share": 0.3, "seed": 0}})
    cfg = OmegaConf.create({"data": {"path": "b", "share": 0.5, "seed": 0}})
    with pytest.raises(
        folders.RunError, match="data=text contradicts .* has data.share=0.3: leave"
    ):
        check_overrides(["data=text"], cfg=cfg, stored=stored, folder=tmp_path)
    cfg.data.share = 0.3
    check_overrides(["data=text", "data.path=b"], cfg=cfg, stored=stored, folder=tmp_path)


def test_a_base_may_be_named_in_another_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored = OmegaConf.create({"from": "runs/base"})
    for place, same in ((tmp_path / "runs/base", True), ("runs/../runs/base", True), ("b", False)):
        cfg = OmegaConf.create({"from": str(place)})
        refused = contextlib.nullcontext() if same else pytest.raises(folders.RunError)
        with refused:
            check_overrides([f"from={place}"], cfg=cfg, stored=stored, folder=tmp_path)


def test_resume_of_no_run_makes_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(train, ".", "resume=gone") == 1
    assert re.search("error: resume='gone': no such folder", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_only_a_folder_is_turned_into_arguments(whole):
    plain = ["resume=true", "resume=false", "steps=3", "-m"]
    assert resume_arguments(plain) == plain
    changed = resume_arguments([f"resume={whole}"])
    assert changed == ["resume=true", f"hydra.run.dir={whole}", "hydra.output_subdir=null"]


def test_a_folder_to_continue_and_another_one_for_a_run_are_refused(whole, tmp_path):
    other = tmp_path / "other"
    given = [f"resume={whole}", f"hydra.run.dir={other}"]
    for arguments in (given, given[::-1], [f"+{given[0]}", f"++{given[1]}"]):
        with pytest.raises(folders.RunError, match="another one:\ngive only .*resume=") as refused:
            resume_arguments(arguments)
        assert str(refused.value).count("\n") < 3
        assert "another one" in ending(train, tmp_path, *arguments) and not other.exists()
    assert resume_arguments([f"hydra.run.dir={whole}/", given[0]]) == resume_arguments(given[:1])


def test_a_run_writes_what_a_new_run_refuses_to_find(whole):
    """The list of names is complete, as far as this run goes."""
    found = {path.name for path in whole.iterdir()}
    assert found - set(opening.WRITTEN) <= {"config.yaml", ".hydra", ".lock", ".lock.json"}


def test_a_run_that_has_lost_its_config_is_not_begun_anew(tmp_path, whole, text, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "config.yaml").unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    given = [f"hydra.run.dir={folder}", f"data.root={text}", *TINY]
    for resume in ("true", "false"):
        assert call(train, ".", *given, f"resume={resume}") == 1
        assert f"{folder} holds metrics.csv but no config.yaml" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_keys_that_hydra_alone_reads_contradict_nothing():
    cfg = OmegaConf.create({"steps": 3})
    check_overrides(["hydra.verbose=true", "resume=true"], cfg=cfg, stored=cfg, folder=Path("x"))


@pytest.mark.parametrize(
    "rows, last, kept",
    [
        ("0,1\n2,\n4,3\n", 2, "0,1\n2,\n"),
        ("0,1\n2,nan\n4", 4, "0,1\n2,nan\n"),
        ("0,1\n", -1, ""),
    ],
)
def test_rows_after_the_checkpoint_are_cut_and_half_rows_too(tmp_path, rows, last, kept):
    table = tmp_path / "t.csv"
    table.write_text("step,x\n" + rows)
    cut_table(table, last=last)
    assert table.read_text().replace("\r", "") == "step,x\n" + kept
    cut_table(tmp_path / "none.csv", last=3)
    assert not (tmp_path / "none.csv").exists()


HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_killed(whole, capsys):
    lock = whole / claim.LOCK
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        (whole / claim.HOLDER).write_text('{"pid": 7, "host": "there", "since": "noon"}')
        assert call(train, ".", f"resume={whole}") == 1
        said = capsys.readouterr().err
        assert f"error: {whole} is in use by process 7 on there since noon, and only" in said
        (whole / claim.HOLDER).write_text("{")
        with pytest.raises(folders.RunError, match="is in use, and only one process at a time"):
            with claim.claimed(whole):
                pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert lock.exists(), "it is not the file that locks"
    assert call(train, ".", f"resume={whole}") == 0
    assert "the run is finished" in capsys.readouterr().out
    assert not (whole / claim.HOLDER).exists()


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(
            folders.RunError, match=f"{folder} cannot be written to: (Not a|File ex)"
        ):
            with claim.claimed(folder):
                pass


@pytest.mark.slow
def test_a_run_in_a_folder_with_brackets_is_continued_and_read(tmp_path, text, stop_after, capsys):
    folder = tmp_path / "a[1],b=50%"
    given = [f"data.root={text}", f"hydra.run.dir={quote_value(str(folder))}", *TINY]
    stop_after(5)
    assert call(train, ".", *given) == 130
    stop_after(None)
    assert call(train, ".", f"resume={folder}", f"trust={text}") == 0
    assert folders.status(folder) == "finished"
    capsys.readouterr()
    [run] = quote_folders([f"run={folder}"], keys=["run"])
    assert call(evaluate, ".", run, f"trust={text}") == 0
    assert "a[1],b=50%" in capsys.readouterr().out
    assert call(generate, ".", run, "length=4") == 0


@pytest.mark.slow
def test_a_run_is_neither_continued_nor_judged_where_its_text_has_changed(
    tmp_path, whole, text, capsys
):
    folder, other = tmp_path / "run", tmp_path / "text"
    shutil.copytree(text, other)
    shutil.copytree(whole, folder)
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace(str(text), str(other)))
    (folder / "summary.json").unlink()
    given = f"trust={other}"
    trained_on = set(build_data(folders.load_config(folder)).documents())
    sides = {file.read_bytes() in trained_on: file for file in sorted(other.iterdir())}
    for is_trained_on, name in ((True, "training"), (False, "held-out")):
        kept = sides[is_trained_on].read_text()
        sides[is_trained_on].write_text(kept.replace("x", "y"))
        assert call(train, ".", f"resume={folder}", given) == 1
        said = capsys.readouterr().err
        assert re.search(
            rf"saved for other data: {name} text was '\w+' and is '\w+'\. Restore", said
        )
        sides[is_trained_on].write_text(kept)
    sides[False].write_text("y = 3\n" * 40)
    assert call(evaluate, ".", f"run={folder}", given) == 1
    said = capsys.readouterr().err
    assert "was evaluated on other held-out text than" in said and "data=SOURCE" in said
    assert call(evaluate, ".", f"run={folder}", "data=stdlib", f"data.root={other}") == 0
    sides[False].write_text(kept)
    assert call(evaluate, ".", f"run={folder}", given) == 0
    assert call(train, ".", f"resume={folder}", given) == 0


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    def acquire(self, timeout):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(claim.FileLock, "acquire", acquire)
    with claim.claimed(tmp_path / "run"):
        assert (tmp_path / "run" / claim.HOLDER).is_file()
    assert "has no locks" in capsys.readouterr().out


def test_a_claim_that_fails_after_its_lock_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "HOLDER", "no/folder")
    with pytest.raises(folders.RunError, match="cannot be written to"), claim.claimed(tmp_path):
        pass
    assert tmp_path not in claim._HELD
    (tmp_path / claim.LOCK).unlink(missing_ok=True)
    claim.check_ours(tmp_path)  # as a folder that this process has not locked


@pytest.mark.parametrize("keys", [train.FOLDERS, finetune.FOLDERS])
def test_every_place_of_data_is_read_as_typed(tmp_path, keys):
    place = tmp_path / "a,b [1].jsonl"
    place.touch()
    typed = [f"{key}={place}" for key in keys]
    parsed = OverridesParser.create().parse_overrides(quote_folders(typed, keys=keys))
    assert {"data.path", "data.root", "data.data_files", "data.tokenizer"} < set(keys)
    assert [one.value() for one in parsed] == [str(place)] * len(keys)
