"""Damaged files of a run that continues: tolerated, or refused in at most three lines."""

import json
import os
import shutil
import signal
from pathlib import Path

import jax
import pytest

from experiments.data import huggingface
from experiments.inject import injection
from experiments.run import checkpoints, claim, folders, seals, trust
from experiments.run.resuming import cut_table
from experiments.run.seals import Damaged

ROWS = b"step,x\r\n1,0.5\r\n2,0.25\r\n3,0.125\r\n"
TABLES = {
    "not UTF-8": (ROWS.replace(b"\n2", b"\n\xb1"), 3, "1,0.5|3,0.125"),
    "a letter as step": (ROWS.replace(b"\n2", b"\nx"), 3, "1,0.5|3,0.125"),
    "no step": (ROWS.replace(b"\n2", b"\n"), 3, "1,0.5|3,0.125"),
    "a step without end": (ROWS.replace(b"\n2", b"\ninf"), 3, "1,0.5|3,0.125"),
    "NUL": (ROWS.replace(b"0.25", b"\0.25"), 3, "1,0.5|3,0.125"),
    "a letter as value": (ROWS.replace(b"0.25", b"0,25"), 3, "1,0.5|3,0.125"),
    "a long cell": (ROWS.replace(b"0.25", b"9" * 200_000), 3, "1,0.5|3,0.125"),
    "a stray quote": (ROWS.replace(b"0.5", b'"0.5'), 2, "2,0.25"),
    "a short row": (ROWS.replace(b",0.25", b""), 3, "1,0.5|3,0.125"),
    "header": (b"r" + ROWS[1:], 3, None),
    "header with NUL": (b"\0" + ROWS[1:], 3, None),
    "header twice": (ROWS.replace(b"x", b"step"), 3, None),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_damaged_table_is_kept_beside_its_readable_rows(tmp_path, capsys, name):
    content, last, kept = TABLES[name]
    table = tmp_path / "metrics.csv"
    table.write_bytes(content)
    cut_table(table, last=last)
    said = capsys.readouterr().err
    assert f"{table} is damaged (line " in said and said.count("\n") == 1
    assert (tmp_path / "metrics.csv.damaged").read_bytes() == content
    if kept is None:
        assert not table.exists(), "its next row begins a new one"
    else:
        assert table.read_text().split() == ["step,x", *kept.split("|")]


@pytest.mark.parametrize("before", [b"", b"\n\n", b"\xef\xbb\xbf", b"\r\r\n"])
@pytest.mark.parametrize("end", [b"", b"4", b'4,"'])
def test_a_table_with_odd_ends_is_not_damaged(tmp_path, capsys, before, end):
    table = tmp_path / "metrics.csv"
    table.write_bytes(before + ROWS + end)
    cut_table(table, last=2)
    assert table.read_text().split() == ["step,x", "1,0.5", "2,0.25"]
    assert capsys.readouterr().err == "" and len(list(tmp_path.iterdir())) == 1


def test_an_empty_table_begins_anew(tmp_path):
    (tmp_path / "metrics.csv").write_bytes(b"")
    cut_table(tmp_path / "metrics.csv", last=2)
    assert list(tmp_path.iterdir()) == []


LIKE = jax.eval_shape(lambda: injection.state_after(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "run"
    injection.save_steps(folder, 2)
    return folder


@pytest.fixture
def run(tmp_path, saved):
    """A run with the checkpoints 1 and 2; a test that waits for ever fails."""

    def ended(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, ended)
    signal.alarm(60)
    shutil.copytree(saved, tmp_path / "run")
    yield tmp_path / "run"
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def reseal(folder, **named):
    digests = json.loads((folder / seals.SEAL).read_text())["files"]
    (folder / seals.SEAL).write_text(seals._text({**digests, **named}))


@pytest.mark.parametrize(
    "name", ["{secret}", "../../../secret", "run/../../../../secret", "/dev/zero", "", ".", "a\0b"]
)
def test_a_seal_names_only_files_of_its_folder(tmp_path, run, capsys, name):
    (tmp_path / "secret").write_text("x")
    name = name.format(secret=tmp_path / "secret")
    reseal(run / "checkpoints/2", **{name: seals.of_file(tmp_path / "secret")})
    with pytest.raises(Damaged):
        seals.check(run / "checkpoints/2")
    assert int(checkpoints.restore_newest(run, LIKE)[0].step) == 1
    assert "the checkpoint of step 1 is read instead" in capsys.readouterr().err


def test_a_seal_does_not_follow_a_link_out_of_its_folder(tmp_path, run):
    (tmp_path / "secret").write_text("x")
    (run / "checkpoints/2/link").symlink_to(tmp_path / "secret")
    reseal(run / "checkpoints/2", link=seals.of_file(tmp_path / "secret"))
    with pytest.raises(Damaged, match="names 'link', outside of its folder"):
        seals.check(run / "checkpoints/2")


@pytest.mark.parametrize("name", [seals.SEAL, "_CHECKPOINT_METADATA", "params/d/pipe", "run/new"])
def test_a_pipe_in_a_checkpoint_is_damage(run, name):
    path = run / "checkpoints/2" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert int(checkpoints.restore_newest(run, LIKE)[0].step) == 1
    assert not seals.is_sealed(path.parent) or name != seals.SEAL


@pytest.mark.parametrize("name", [claim.LOCK, claim.HOLDER])
def test_a_pipe_in_place_of_a_lock_is_refused(run, name):
    os.mkfifo(run / name)
    with pytest.raises(folders.RunError, match="a pipe, a socket or a device"), claim.claimed(run):
        pass


@pytest.mark.parametrize("name", ["x", "config.yaml", "metrics.csv", "deep/x"])
def test_a_pipe_anywhere_in_a_run_is_refused_before_anything_is_built(run, name):
    (run / "config.yaml").write_text("a: 1\n")
    path = run / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    with pytest.raises(folders.RunError, match="is a pipe, a socket or a device"):
        trust.open_config(run)


@pytest.mark.parametrize("name", ["env.json", "summary.json"])
def test_a_pipe_in_place_of_a_record_is_not_read(run, name):
    os.mkfifo(run / name)
    assert folders.read_summary(run) == {} and folders.commit_of(run) is None
    folders.reopen_run(run)
    assert Path(run / "env.json").is_file()


CARD = "---\nconfigs:\n- config_name: default\n  data_files: {}\n---\n"


@pytest.mark.parametrize("names", ["{out}/x.txt", "../out/*.txt", "[a.txt, {out}/x.txt]"])
def test_the_card_of_a_folder_of_data_names_only_files_in_it(tmp_path, monkeypatch, names):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("data", "out"):
        (tmp_path / name).mkdir()
    text = "".join(f"secret {i}\n" for i in range(99))
    (tmp_path / "out/x.txt").write_text(text)
    (tmp_path / "data/a.txt").write_text(text.replace("secret", "own"))
    given = {"path": str(tmp_path / "data"), "validation_fraction": 0.5}
    (tmp_path / "data/README.md").write_text(CARD.format("a.txt"))
    assert b"own" in huggingface.load(**given).validation.tobytes()
    (tmp_path / "data/README.md").write_text(CARD.format(names.format(out=tmp_path / "out")))
    with pytest.raises(ValueError, match="which is not in that folder"):
        huggingface.load(**given)
    outside = str(tmp_path / "out/x.txt")
    assert b"secret" in huggingface.load(**given, data_files=outside).validation.tobytes()


def test_a_folder_of_data_holds_no_files_that_name_others(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "a.xml").write_text("<a>x</a>")
    with pytest.raises(ValueError, match="of the kind xml, which may refer to other files"):
        huggingface.load(path=str(tmp_path))
