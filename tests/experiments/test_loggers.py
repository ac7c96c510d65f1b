"""Sinks of a run's numbers: what was written can be read back by somebody else's reader."""

import sys
import types
from pathlib import Path

import jax
import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf

from experiments.run import loggers, metrics, records
from experiments.run.folders import RunError
from experiments.run.loggers import Place
from experiments.run.opening import opened
from experiments.shell import build

ROWS = {1: {"loss": 2.0, "rate": None}, 2: {"loss": 1.5, "rate": 3.0}}


def write(place, *opens, rows=ROWS):
    opened = loggers.open_all(opens, place)
    for step, values in rows.items():
        loggers.write_all(opened, step, values)
    for logger in opened:
        logger.close()
    return opened


def place(folder, step=0):
    return Place(folder, "name", {"a": {"b": 1}}, step)


def test_csv_has_its_columns_in_order_and_empty_cells_where_nothing_was_measured(tmp_path):
    write(place(tmp_path), loggers.csv(["loss", "rate", "step"]))
    table = metrics.read(tmp_path / "metrics.csv")
    assert table == {"step": [1, 2], "loss": [2.0, 1.5], "rate": [None, 3.0]}


def test_csv_of_a_resumed_run_is_continued_under_one_header(tmp_path):
    write(place(tmp_path), loggers.csv(["loss", "rate"]))
    write(place(tmp_path, step=2), loggers.csv(["loss", "rate"]), rows={3: {"loss": 1.0}})
    assert metrics.read(tmp_path / "metrics.csv")["loss"] == [2.0, 1.5, 1.0]


def test_a_metric_of_any_name_gets_a_column(tmp_path):
    write(place(tmp_path), loggers.csv(["loss"]), rows={1: {"loss": 1.0}, 2: {"balance": 0.5}})
    found = metrics.read(tmp_path / "metrics.csv")
    assert found == {"step": [1, 2], "loss": [1.0, None], "balance": [None, 0.5]}


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert write(place(tmp_path), loggers.csv(["loss"])) == []
    assert list(tmp_path.iterdir()) == []


def events(folder):
    """(name, step, value) of every scalar, in order, read from the protocol buffers."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # length, its checksum, the message, its checksum
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.HasField("session_log"):
                found.append(("start", event.step, event.session_log.status))
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    return found


def test_tensorboard_holds_every_number_that_was_measured(tmp_path):
    pytest.importorskip("tensorboardX")
    write(place(tmp_path), loggers.tensorboard())
    assert events(tmp_path) == [("loss", 1, 2.0), ("loss", 2, 1.5), ("rate", 2, 3.0)]


def test_tensorboard_of_a_resumed_run_drops_the_steps_after_the_checkpoint(tmp_path):
    pytest.importorskip("tensorboardX")
    write(place(tmp_path, step=4), loggers.tensorboard(), rows={5: {"loss": 1.0}})
    assert events(tmp_path) == [("start", 5, 1), ("loss", 5, 1.0)]


@pytest.fixture
def fake_wandb(monkeypatch):
    """A stand-in that remembers: the real one is tried offline below, where it is installed."""
    calls = types.SimpleNamespace(inits=[], logs=[], finished=0)

    class Error(Exception):
        pass

    def init(**given):
        calls.inits.append(given)
        if given["project"] == "locked":
            raise Error("nobody is logged in")

        def finish():
            calls.finished += 1

        def log(values, step):
            calls.logs.append((step, values))

        return types.SimpleNamespace(id="abc", log=log, finish=finish)

    module = types.ModuleType("wandb")
    module.init, module.errors = init, types.SimpleNamespace(Error=Error)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_gets_config_and_numbers_and_a_resumed_run_its_own_id(tmp_path, fake_wandb):
    write(place(tmp_path), loggers.wandb(project="p", mode="offline", tags=["t"]))
    write(place(tmp_path, step=2), loggers.wandb(project="p", mode="offline"), rows={})
    first, second = fake_wandb.inits
    assert first["config"] == {"a": {"b": 1}} and first["tags"] == ["t"]
    assert (first["project"], first["mode"], first["dir"]) == ("p", "offline", str(tmp_path))
    assert first["id"] is None and second["id"] == "abc" and second["resume"] == "allow"
    assert fake_wandb.logs == [(1, {"loss": 2.0}), (2, {"loss": 1.5, "rate": 3.0})]
    assert fake_wandb.finished == 2


def test_wandb_without_an_account_says_how_to_go_on(tmp_path, fake_wandb):
    with pytest.raises(RunError, match="nobody is logged in; logger.wandb.mode=offline"):
        write(place(tmp_path), loggers.wandb(project="locked"))


def test_wandb_offline_writes_into_the_folder_of_the_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    write(place(folder), loggers.wandb(mode="offline"))
    [run] = (folder / "wandb").glob("offline-run-*")
    identity = (folder / "wandb.txt").read_text().strip()
    [file] = run.glob("*.wandb")
    assert identity in file.name and file.stat().st_size > 0


def test_wandb_knows_two_modes():
    with pytest.raises(ValueError, match="mode='off': give 'online' or 'offline'"):
        loggers.wandb(mode="off")


@pytest.mark.parametrize("name", ["tensorboardX", "wandb"])
def test_a_missing_package_is_an_error_that_names_the_extra(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    make = {"tensorboardX": loggers.tensorboard, "wandb": loggers.wandb}[name]
    with pytest.raises(ValueError, match=rf"needs the package {name}: pip install '\.\["):
        make()


@pytest.mark.parametrize(
    "choice, names",
    [
        ("logger=tensorboard", ["tensorboard"]),
        ("logger=wandb", ["wandb"]),
        ("logger=[tensorboard,wandb]", ["tensorboard", "wandb"]),
    ],
)
def test_the_group_logger_picks_one_or_several(choice, names, fake_wandb):
    pytest.importorskip("tensorboardX")
    with initialize_config_module("experiments.conf", version_base="1.3"):
        chosen = compose("train", [choice]).logger
    assert list(chosen) == names
    assert all(callable(instantiate(one)) for one in chosen.values())


def opening(folder, error, *, begin=lambda: None):
    """A run whose folder is opened and that then ends in an error."""
    cfg = OmegaConf.create({"name": "x", "steps": 3})
    with pytest.raises(type(error)), opened(folder, cfg):
        begin()
        raise error


def test_a_run_that_a_logger_refuses_leaves_no_folder(tmp_path, fake_wandb, monkeypatch):
    (tmp_path / "mine").write_text("")
    folder = tmp_path / "runs" / "new"

    def begin():
        (folder / "wandb").mkdir()
        write(place(folder), loggers.csv(["loss"]), rows={})

    opening(folder, RunError("nobody is logged in"), begin=begin)
    assert list(folder.iterdir()) == []
    monkeypatch.chdir(tmp_path)
    records.discard(folder, made=[])
    assert folder.is_dir(), "an empty folder that was there may be somebody's"
    records.discard(folder, made=[Path("runs/new")])
    assert [path.name for path in (tmp_path / "runs").iterdir()] == []
    folder.mkdir()
    records.discard(folder, made=[folder, folder.parent])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_was_in_a_folder_or_measured_there_stays(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    opening(tmp_path, RunError("no"), begin=lambda: (tmp_path / "other.txt").write_text("mine"))
    assert {"notes.txt", "other.txt"} <= {path.name for path in tmp_path.iterdir()}
    begun = tmp_path / "begun"
    opening(begun, OSError("full"), begin=lambda: write(place(begun), loggers.csv(["loss"])))
    assert (begun / "config.yaml").is_file() and len(metrics.read(begun / "metrics.csv")) == 3
    failed = tmp_path / "failed"
    opening(failed, ZeroDivisionError("a bug"))
    assert (failed / "config.yaml").is_file()


@pytest.mark.parametrize("given", ["hello", [1], 3])
def test_loggers_are_settings_by_name(given):
    with pytest.raises(RunError, match=r"logger=.*: expected loggers by name;\n"):
        build.build(OmegaConf.create({"logger": given}))


class Failing:
    """Cannot be closed."""

    def __init__(self, error):
        self.error, self.closed = error, 0

    def write(self, step, values):
        del step, values

    def close(self):
        self.closed += 1
        raise self.error


def test_a_logger_that_cannot_be_closed_hides_nothing(tmp_path, capsys):
    first, second = Failing(OSError(28, "No space left on device")), Failing(ValueError("gone"))
    loggers.close_all([first, object(), second])
    assert (first.closed, second.closed) == (1, 1)
    said = capsys.readouterr().out
    assert "could not be closed" in said and "No space left" in said and "gone" in said

    def refused(place):
        del place
        raise RunError("nobody is logged in")

    with pytest.raises(RunError, match="nobody is logged in"):
        loggers.open_all([lambda place: first, refused], place(tmp_path))
    assert first.closed == 2
