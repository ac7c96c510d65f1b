"""What a command cannot do without, and what it never does: by name, before anything is made."""

import pickle
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments import train
from experiments.run import checks
from experiments.run.folders import RunError
from experiments.run.settings import make_settings
from experiments.shell.deletions import check_deletions
from tests.experiments.programs import ending
from tests.experiments.test_settings import COMMANDS, CONF, composed, shipped


class Harm:
    """Unpickling it makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("harm"),)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_no_flag_makes_a_command_unpickle_a_file(tmp_path, command):
    (tmp_path / "job.pickle").write_bytes(pickle.dumps(Harm()))
    for flag in (["--experimental-rerun=job.pickle"], ["--exp", "job.pickle"]):
        said = ending(COMMANDS[command], tmp_path, *flag)
        assert said.startswith(f"error: {flag[0]}: no command runs a pickled job; type its KEY=")
    assert [path.name for path in tmp_path.iterdir()] == ["job.pickle"]


NEEDED = {
    "train": "seed accumulate log_every profile resume checkpoint trace checkpoint.every "
    "checkpoint.keep_last checkpoint.keep_best trace.start trace.steps evaluation.windows "
    "evaluation.length evaluation.batch_size check.batch_size check.length sample.prompt",
    "finetune": "where evaluation.windows checkpoint.every",
    "plot": "x group_by log_x",
    "generate": "seed block top_k",
    "bench": "rounds",
}
ALL_NEEDED = [(command, key) for command, keys in NEEDED.items() for key in keys.split()]


@pytest.mark.parametrize("command, key", ALL_NEEDED)
def test_a_setting_that_is_needed_and_deleted_is_refused_by_name(tmp_path, command, key):
    said = ending(COMMANDS[command], tmp_path, f"~{key}")
    assert said == f"error: ~{key}: this command needs {key}; leave ~{key} out"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["projection", "optim", "model", "cell", "solver", "data"])
def test_what_names_a_constructor_is_not_deleted(tmp_path, key):
    said = ending(train, tmp_path, f"~{key}._target_")
    assert f"~{key}._target_: {key} cannot be built without it; leave" in said
    assert list(tmp_path.iterdir()) == []


def test_what_may_be_deleted():
    for command, key, *more in (
        ("train", "sample.top_k"),
        ("train", "optim.b1"),
        ("train", "model.tied"),
        ("train", "logger"),
        ("train", "sample", "experiment=state_tracking"),
        ("finetune", "rounding.8"),
        ("finetune", "bits"),
    ):
        overrides = [f"~{key}", *more]
        check_deletions(overrides, composed(command, *overrides), command)


LEFT_OUT = {
    "train": "accumulate log_every peak_flops profile trust parallel checkpoint trace "
    "checkpoint.every checkpoint.keep_best trace.start evaluation.windows sample.top_k "
    "model.width mixer.cell cell.path solver._target_ parallel._target_ data.seed optim.b1",
    "finetune": "rank seed",
    "plot": "x title log_x",
    "generate": "seed length",
    "evaluate": "run windows trust",
}
ALL_LEFT_OUT = [(command, key) for command, keys in LEFT_OUT.items() for key in keys.split()]


@pytest.mark.parametrize("command, key", ALL_LEFT_OUT)
def test_a_setting_without_a_value_is_refused_by_name(tmp_path, command, key):
    said = ending(COMMANDS[command], tmp_path, f"{key}=???")
    assert said == (
        f"error: {key} has no value (???);\ngive {key}=VALUE, or leave out what sets it to ???"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_is_missing_is_found_in_lists_and_files():
    cfg = OmegaConf.create({"hydra": {"a": "???"}, "from": "???", "a": [{"b": ["???"]}]})
    with pytest.raises(RunError, match=r"^a.0.b.0 has no value \("):
        checks.check_settings(cfg)
    values = {**OmegaConf.to_container(shipped("train"), resolve=True), "accumulate": "???"}
    with pytest.raises(RunError, match=r"^x/config.yaml: accumulate has no value \(\?"):
        make_settings(values, place=Path("x/config.yaml"))
    del values["accumulate"], values["trace"]["start"]
    with pytest.raises(RunError, match="the config has no accumulate, trace.start: another"):
        make_settings(values, place=Path("x/config.yaml"))
    with pytest.raises(RunError, match="^this command needs accumulate, trace.start: leave ~accum"):
        make_settings(values)


def test_only_what_the_user_must_give_is_shipped_without_a_value():
    missing = {
        f"data.{line.partition(':')[0]}" if path.parent.name == "data" else line.partition(":")[0]
        for path in CONF.rglob("*.yaml")
        for line in path.read_text().splitlines()
        if "???" in line
    }
    assert missing == {"from", "data.path"} and missing <= {*checks.MEANT}


@pytest.mark.parametrize("key", ["checkpoint", "trace", "evaluation", "check", "sample"])
@pytest.mark.parametrize("value", ["builtins.dict", "null"])
def test_a_group_of_settings_is_no_object(tmp_path, key, value):
    said = ending(train, tmp_path, f"++{key}._target_={value}")
    assert f"{key}._target_=" in said and said.endswith(f";\nleave {key}._target_ out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "given, said",
    [
        ("++optim._partial_=true", "error: optim makes _DeferredTarget: expected an optimiser of"),
        ("optim._target_=builtins.dict", "error: optim makes dict: expected an optimiser of optax"),
        ("task._target_=builtins.dict", "error: task makes dict: expected a Task, as experiments."),
        ("++data._partial_=true", "cannot use what it is given: '_DeferredTarget' object has no"),
        ("model._target_=builtins.dict", "leave out what you have changed of it; --cfg job"),
        ("projection._target_=builtins.dict", "projection makes dict: expected a function of the"),
    ],
)
def test_a_part_of_another_kind_is_named_before_a_folder_is_made(tmp_path, given, said):
    assert said in ending(train, tmp_path, given) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["null", "1", "abc"])
@pytest.mark.parametrize("key", ["parallel", "data.sampler", "mixer.cell"])
def test_an_object_is_expected_where_one_is_needed(tmp_path, key, value):
    said = ending(train, tmp_path, f"{key}={value}")
    assert said.startswith(f"error: {key}=") and ": expected an object, with its _target_;" in said
    assert said.endswith(f"\nleave {key} out for the default")
    assert list(tmp_path.iterdir()) == []
