"""Settings that do not exist: what is like them, what has them, what to type."""

import functools

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from experiments import train
from experiments.data import files
from experiments.run import folders, trust
from experiments.run.folder_arguments import quote_folders
from experiments.run.folders import RunError
from experiments.shell import near_misses
from experiments.sweep import run_sets
from tests.experiments.programs import ending


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["widht=3"], "widht: there is no such setting; did you mean model.width?"),
        (["model.widht=3"], "did you mean model.width?"),
        (["model={widht: 3}"], "model.widht: there is no such setting; did you mean model.width?"),
        (["stpes=3"], "did you mean steps or trace.steps?"),
        (["mixr=attention"], "did you mean mixer?"),
        (["optim=adamww"], "optim=adamww: no such member; did you mean optim=adamw? choose"),
        (["+widht=3"], "did you mean model.width?\ntype model.width=3"),
        (["+bits=3"], "+bits=3: nothing reads bits here; experiments.finetune does"),
        (["+lr=3"], "nothing reads lr; did you mean optim.learning_rate?\ntype optim"),
        (["lr=3"], "lr: there is no such setting; did you mean optim.learning_rate?"),
        (["+grid.mine=3"], "+grid.mine=3: nothing reads grid.mine"),
        (["+mine=3"], "+mine=3: nothing reads mine\n--cfg job shows all"),
        (["++mine=3"], "++mine=3: nothing reads mine"),
        (["+checkpoint.mine=3"], "nothing reads checkpoint.mine"),
        (["+transform=[lora]"], "nothing reads transform here; experiments.finetune does"),
        (["+solver@mine=shooting"], "nothing reads mine"),
        (["transform=[lora]"], "no such group; experiments.finetune has it"),
        (["experiment=adapt"], "adapt: transform: this command has no such group; experiments.f"),
        (["solver=shooting", "solver.chunks=4"], "one; type +solver.chunks=VALUE"),
        (["data.path=x"], "give its source with it, huggingface or jsonl or parquet or text;"),
        (["steps", "3"], "'steps': settings are KEY=VALUE; type for example steps=VALUE"),
        (["+stpes=3"], "nothing reads stpes; did you mean steps?"),
        (["+checkpoint.kep_last=2"], "did you mean checkpoint.keep_last?"),
        (["+model.widht=3"], "did you mean model.width?"),
        (["mixer=attention", "+mixer.hads=2"], "mixer.hads: jaxpara.nn.mixers.attention has no"),
        (["mixer=attention", "mixer.heads=7"], "change it with model.width=VALUE"),
        (["cell.path=jaxpara.cells.para_gruu"], "did you mean jaxpara.cells.para_gru"),
        (["steps=1,2"], "several values need -m"),
        (["a=["], "cannot be read"),
        (["model.layers=4", "mixer=hybrid"], "layers=4 is not a multiple of the 3 mixers"),
        (["data=text"], "data.path must be given"),
        (["mixer=3"], "mixer=3: expected a member of group mixer: choose from adapted_"),
        (["-m", "cell=null,para_gru"], "cell=null,para_gru: expected a member of group cell"),
        (["-m", "hydra=null"], "null is no member of a group: leave the group out"),
        (["logger=[]", "bogus=1"], "bogus: there is no such setting"),
        (["model=null"], "model=null: expected a member of group model: choose from"),
        (["task="], "task=: expected a member of group task: choose from a5, "),
        (["solver@parallel=null"], "solver@parallel=null: expected a member of group"),
        (["=5"], "=5: the name before = is missing; type KEY=5"),
        (["~steps"], "~steps: this command needs steps; leave ~steps out"),
        (["~optim"], "optim: this command reads it, but it is missing"),
        (["name=${nope}"], "name=${nope}: nope: hydra.run.dir reads it"),
        (["steps={a: 1}"], "steps={'a': 1}: expected a whole number, at least 1"),
        (["model._target_=os.system"], "model._target_=os.system: Hydra calls no function that"),
        (["model._target_="], "model._target_=: there is no such name"),
        (["optim._target_=jaxpara.train.optimiser"], "did you mean jaxpara.train.optimizer"),
        (["data=text", "data.path=nowhere"], "error: data.path='nowhere' is neither"),
    ],
)
def test_near_misses_and_what_objects_refuse_name_the_override(tmp_path, overrides, said):
    ended = ending(train, tmp_path, *overrides)
    assert said in ended and ended.count("\n") <= 2 and "Traceback" not in ended
    assert list(tmp_path.iterdir()) == []


def test_a_new_key_that_something_reads_is_let_through(tmp_path):
    read = [
        ["+mine=3", "name=run-${mine}"],
        ["++steps=3"],
        ["+peak_flops=1e12"],  # null by default
        ["+mine=3", "name=run-${oc.select:mine,4}"],
        ["solver=shooting", "+solver.chunks=4"],
        ["+logger.own={_target_: experiments.run.loggers.csv}"],
        ["++data.path=x", "data=text"],
    ]
    for given in read:  # refused only by what comes after
        said = ending(train, tmp_path, *given, "optim._target_=optax.gone")
        assert "optim._target_=optax.gone" in said or "'x' is neither" in said, said


def test_likeness_is_of_whole_or_last_names():
    assert near_misses.near_misses("widht", ["model.width", "height"]) == ["model.width"]
    assert near_misses.near_misses("zzz", ["model.width"]) == []


def test_a_home_that_is_not_there_is_no_such_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = "~nobody-of-this-name/x"
    find_files = functools.partial(files.find_files, endings=(".txt",))
    for read in (folders.find_run, run_sets.read_all, find_files):
        with pytest.raises((RunError, FileNotFoundError), match=r"~nobody-of-this-name/x'.* n"):
            read(place)
    assert not trust._is_inside(place, tmp_path / "run")
    for typed in (place, "~/x y"):
        [quoted] = quote_folders([f"run={typed}"], keys=["run"])
        assert OverridesParser.create().parse_override(quoted).value() == typed


@pytest.mark.parametrize(
    "name, there", [("Modle", "Model"), ("LSTMCel", "LSTMCell"), ("LM", "lm"), ("modle", "Model")]
)
def test_capitals_are_no_difference(name, there):
    assert near_misses.near_misses(name, ["other", there]) == [there]
