"""Damaged files of a run that continues: tolerated, or refused in at most three lines."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import pytest
from omegaconf import OmegaConf

from experiments.data import files, huggingface
from experiments.data.batches import only_for
from experiments.inject import injection
from experiments.run import (
    checkpoints,
    checks,
    claim,
    disk,
    folders,
    seals,
    trainer,
    trust,
)
from experiments.run.seals import Damaged

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
    with pytest.raises(folders.RunError, match="neither a file nor a folder"), claim.claimed(run):
        pass


@pytest.mark.parametrize("name", ["x", "config.yaml", "metrics.csv", "deep/x"])
def test_a_pipe_anywhere_in_a_run_is_refused_before_anything_is_built(run, name):
    (run / "config.yaml").write_text("a: 1\n")
    path = run / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    with pytest.raises(folders.RunError, match="is neither a file nor a folder"):
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


def rewrite(folder, step, **fields):
    """A record of a checkpoint as another program might have sealed it; `...` leaves one out."""
    path = checkpoints.path_of(folder, step)
    [file] = [p for p in (path / "run").rglob("*") if p.is_file() and b"digests" in p.read_bytes()]
    known = {k: v for k, v in json.loads(file.read_text()).items() if k != "digest"} | fields
    record = {name: value for name, value in known.items() if value is not ...}
    file.write_text(json.dumps({**record, "digest": seals.of_text(record)}))
    seals.seal(path)


MEMORY = {"losses": [0.5], "seconds": 1.0, "timed": [2, 0.5], "enough": False, "others": {"a": [1]}}
FIELDS = {
    "key_impl": [..., "nope", 3, "rbg", None, ["threefry2x32"]],
    "best": [..., None, "loss", ["loss"], [["a"], "min"], ["loss", "least"], ["loss", ["min"]]],
    "figures": [..., 3, [], {"loss": "x"}, {"loss": None}, {"loss": 10**400}, {"loss": True}],
    "digests": [..., 3, {}, {"params": {}}, {"params": 3, "rest": {}}, {"params": {}, "rest": [1]}],
    "data": [None, 3, [1]],
    "memory": [
        None,
        3,
        {**MEMORY, "x": 1},
        *({**MEMORY, name: "ab"} for name in MEMORY),
        {**MEMORY, "losses": ["a"]},
        {**MEMORY, "losses": [10**400]},
        {**MEMORY, "timed": [1]},
        {**MEMORY, "timed": [-1, 2.0]},
        {**MEMORY, "others": {"a": 3}},
        {**MEMORY, "others": {"gradient_norm": []}},
    ],
}


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in FIELDS.items() for value in values], ids=str
)
def test_a_field_of_a_checkpoint_that_cannot_be_used_is_named(run, capsys, name, value):
    rewrite(run, 2, **{name: value})
    with pytest.raises(Damaged, match=rf"is damaged: .*{name}") as refused:
        checkpoints.restore(run, 2, LIKE)
    assert len(str(refused.value)) < 400
    assert int(checkpoints.restore_newest(run, LIKE)[0].step) == 1
    assert checkpoints.best_step(run) is None and checkpoints.data_of(run) == {}
    assert "the checkpoint of step 1 is read instead" in capsys.readouterr().err


def test_a_record_as_training_writes_it_is_read(run):
    rewrite(run, 2, memory=MEMORY, figures={"loss": float("nan"), "n": 3}, data={"in": {}})
    assert checkpoints.restore(run, 2, LIKE)[1]["memory"] == MEMORY
    rewrite(run, 2, memory={"losses": []})
    assert checkpoints.restore(run, 2, LIKE)[1]["memory"] == {"losses": []}


@pytest.mark.parametrize(
    "key", ["tree_metadata", "use_ocdbt", "use_zarr3", "store_array_data_equal_to_fill_value"]
)
@pytest.mark.parametrize("value", [None, [], "x", 3, {"a": {}}], ids=str)
def test_a_sealed_checkpoint_with_odd_metadata_is_read_whole_or_refused(run, key, value):
    kept = {step: checkpoints.restore(run, step, LIKE)[0] for step in (1, 2)}
    path = run / "checkpoints/2/params/_METADATA"
    known = json.loads(path.read_text())
    path.write_text(json.dumps({**known, key: value}))
    seals.seal(run / "checkpoints/2")
    try:
        read = checkpoints.restore_newest(run, LIKE)[0]
        chex.assert_trees_all_equal(read.params, kept[int(read.step)].params)
        assert int(read.step) == (1 if key == "tree_metadata" else 2) or value == []
    except folders.RunError as error:
        assert key == "use_zarr3"
        assert "does not fit what config.yaml beside it describes, or is damaged" in str(error)


@pytest.mark.parametrize(
    "error, raised",
    [
        (TypeError("a\nb"), Damaged),
        (KeyError("a"), Damaged),
        (AttributeError("a"), Damaged),
        (Exception("a"), Damaged),
        (FileNotFoundError(2, "gone"), Damaged),
        (ValueError("a"), disk.Unlike),
        (OSError(5, "disk"), OSError),
        (MemoryError(), MemoryError),
        (RuntimeError("RESOURCE_EXHAUSTED: no room"), RuntimeError),
    ],
    ids=repr,
)
def test_only_what_the_machine_refuses_is_not_damage(run, monkeypatch, capsys, error, raised):
    restore = disk.ocp.Checkpointer.restore

    def fail(self, path, *rest, **options):
        if path.name == "2":
            raise error
        return restore(self, path, *rest, **options)

    monkeypatch.setattr(disk.ocp.Checkpointer, "restore", fail)
    with pytest.raises(raised):
        disk.read_items(run / "checkpoints/2")
    if raised is Damaged:
        assert int(checkpoints.restore_newest(run, LIKE)[0].step) == 1
        assert f"cannot be read ({type(error).__name__}: " in capsys.readouterr().err
    if raised in (Damaged, disk.Unlike):
        with pytest.raises(Damaged):
            disk.read_record(run / "checkpoints/2", "run")


@pytest.mark.parametrize("name", ["\u00b2", "\u0662", "007", "x7", "9" * 200, "-1", "1_0"])
@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_an_odd_name_among_the_checkpoints_hinders_nothing(run, name, make):
    make(run / "checkpoints" / name)
    assert checkpoints.steps(run)[:2] == [1, 2]
    state, _ = checkpoints.restore_newest(run, LIKE)
    rule = {"keep_last": 3, "keep_best": 0, "best": ("loss", "min"), "begin": 2}
    with checkpoints.saver(run, **rule) as save:
        save(state._replace(step=jax.numpy.int32(3)), {"data": {}}, None)
    assert checkpoints.steps(run) == [1, 2, 3]


LITTER = (".DS_Store", "._3", "._manifest.ocdbt", "Thumbs.db", "Desktop.ini", ".directory")


@pytest.mark.parametrize("name", LITTER)
def test_what_file_managers_leave_is_no_damage(run, capsys, name):
    for folder in [run, *(path for path in run.rglob("*") if path.is_dir())]:
        (folder / name).write_bytes(b"\0\5\x16\7")
    for step in (1, 2):
        seals.check(run / "checkpoints" / str(step))
    checkpoints.set_aside(run)
    assert checkpoints.steps(run) == [1, 2] and capsys.readouterr().err == ""
    state, _ = checkpoints.restore_newest(run, LIKE)
    assert int(state.step) == 2
    rule = {"keep_last": 3, "keep_best": 0, "best": ("loss", "min"), "begin": 2}
    with checkpoints.saver(run, **rule) as save:
        save(state._replace(step=jax.numpy.int32(3)), {"data": {}}, None)
    assert checkpoints.steps(run) == [1, 2, 3]
    # Nor is it sealed: it may be gone tomorrow.
    (run / "checkpoints/3" / name).write_text("x")
    seals.seal(run / "checkpoints/3")
    (run / "checkpoints/3" / name).unlink()
    seals.check(run / "checkpoints/3")
    # What an older version has sealed may be gone too.
    reseal(run / "checkpoints/3", **{f"params/{name}": "0" * 32})
    seals.check(run / "checkpoints/3")


@pytest.mark.parametrize("name", LITTER)
def test_what_file_managers_leave_is_no_text(tmp_path, name):
    (tmp_path / "a.txt").write_text("x")
    before = huggingface.digest_of_files(huggingface.local_files(str(tmp_path), None))
    (tmp_path / name).write_bytes(b"\0")
    assert huggingface.digest_of_files(huggingface.local_files(str(tmp_path), None)) == before
    assert files.find_files(f"{tmp_path}/*", endings=()) == [tmp_path / "a.txt"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_damaged_checkpoint_replaces_an_earlier_one_of_its_step(run, kind):
    (run / "damaged").mkdir()
    (run / "damaged/7").mkdir() if kind == "folder" else (run / "damaged/7").write_text("x")
    (run / "checkpoints/7").mkdir()
    checkpoints.set_aside(run)
    assert (run / "damaged/7").is_dir() and checkpoints.steps(run) == [1, 2]


@pytest.mark.parametrize("value", [3, None, "x", {"a": 1}])
def test_a_damaged_record_of_machines_is_kept_and_begun_anew(run, capsys, value):
    (run / "env.json").write_text(json.dumps({"resumed": value}))
    folders.reopen_run(run)
    assert "env.damaged.json" in capsys.readouterr().out
    assert len(json.loads((run / "env.json").read_text())["resumed"]) == 1
    assert json.loads((run / "env.damaged.json").read_text()) == {"resumed": value}


@pytest.mark.parametrize("data", [{}, {"in": 3}, {"in": {"a": 1}}, {"in": {"a": 1}, "position": 3}])
def test_a_position_that_is_not_one_of_the_tasks_is_refused(data):
    class Source:
        def set_state(self, state):
            self.at = state["next_index"]

    task = SimpleNamespace(batches=only_for(Source(), {"a": 1}))
    with pytest.raises(Damaged, match="checkpoints/2 is damaged: its `data` is no position in"):
        trainer._go_to(task, {"data": data, "memory": {}}, "checkpoints/2")
    with pytest.raises(Damaged, match="checkpoints/2 is damaged: it has no memory"):
        trainer._go_to(task, {"data": data}, "checkpoints/2")


def test_a_checkpoint_under_the_name_of_another_step_is_damage(run, capsys):
    (run / "checkpoints/2").rename(run / "checkpoints/7")
    with pytest.raises(Damaged, match="checkpoints/7 is damaged: its state is of step 2"):
        checkpoints.restore(run, 7, LIKE)
    assert int(checkpoints.restore_newest(run, LIKE)[0].step) == 1
    assert "the checkpoint of step 1 is read instead" in capsys.readouterr().err


@pytest.mark.parametrize("digits", [25, 401, 4000])
def test_a_number_that_no_float_holds_is_refused(digits):
    for name in ("learning_rate", "vocab_size"):
        model = {"_target_": "jaxpara.nn.decoder", name: 10**digits}
        with pytest.raises(folders.RunError, match=f"{name}=10000.*: expected") as refused:
            checks.check_settings(OmegaConf.create({"model": model}), "train")
        assert len(str(refused.value)) < 400


def frozen_run(folder, *, step):
    """A run whose kernel is not trained; its values depend on the step."""
    rule = {"keep_last": 3, "keep_best": 0, "best": ("loss", "min")}
    with checkpoints.saver(
        folder, **rule, trainable=lambda _: {"kernel": False, "bias": True}
    ) as save:
        save(injection.state_after(step), {"data": {}}, None)
    return folder


@pytest.mark.parametrize("found", ["of another run", "missing"])
def test_frozen_parameters_are_those_of_their_checkpoints(tmp_path, found):
    run, other = (frozen_run(tmp_path / name, step=i) for i, name in enumerate("ab", start=1))
    checkpoints.restore(run, 1, LIKE)
    shutil.rmtree(run / "frozen")
    if found != "missing":
        shutil.copytree(other / "frozen", run / "frozen")
    for read in (
        lambda: checkpoints.load_params(run, LIKE.params),
        lambda: checkpoints.restore_newest(run, LIKE),
    ):
        with pytest.raises(Damaged, match="frozen is not what .*checkpoints/1 was trained with"):
            read()
    # A checkpoint of an older version does not say what belongs to it.
    if found != "missing":
        rewrite(run, 1, frozen=...)
        checkpoints.load_params(run, LIKE.params)


def test_a_run_that_freezes_nothing_says_so(run):
    assert "frozen" not in checkpoints.restore(run, 2, LIKE)[1]
    shutil.copytree(frozen_run(run.parent / "a", step=1) / "frozen", run / "frozen")
    with pytest.raises(Damaged, match="frozen is not what .*checkpoints/2 was trained with"):
        checkpoints.restore(run, 2, LIKE)
