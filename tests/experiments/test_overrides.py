"""Keys that are given twice on a command line."""

import pytest

from experiments import bench, evaluate, finetune, train
from experiments.shell.overrides import check_arguments, check_repeated
from tests.experiments.programs import ending


@pytest.mark.parametrize("program", [train, evaluate])
@pytest.mark.parametrize(
    "given, said",
    [
        (["steps=1", "steps=2"], "steps is given twice, as steps=1 and as steps=2:\nleave one"),
        (["resume=y", "seed=3", "resume=x"], "resume is given twice, as resume=y and as resume=x"),
        (["from=a", "++from='b c'"], "from is given twice, as from=a and as ++from='b c'"),
        (["-m", "seed=0,1", "seed=0,2"], "seed is given twice, as seed=0,1 and as seed=0,2"),
        (["+a={b: {c: 1}}", "+a.b.c=2"], "a.b.c is given twice, as +a={b: {c: 1}} and as +a.b.c=2"),
        (["+a={b: 1}", "a={b: 2, c: 3}"], "a.b is given twice, as +a={b: 1} and as a={b: 2, c: 3}"),
    ],
)
def test_a_key_with_two_values_is_refused(tmp_path, program, given, said):
    assert said in ending(program, tmp_path, *given) and list(tmp_path.iterdir()) == []


def test_what_may_be_repeated():
    for given in (
        ["steps=1", "+steps=1", "name=a", "name='a'", "a=1,2", "a=1,2"],
        ["optim=adamw", "optim={learning_rate: 1}", "transform=lora", "transform=[lora]"],
        ["seed=0,1", "seed=0, 1", "from=base", "from=./base/", "runs=[base]", "runs=base"],
        ["+a={b: 1}", "+a={c: 2}", "~data", "data=text", "+a.b=1", "+a.c=2", "--cfg", "job"],
    ):
        check_repeated(given)


GROUPS = ("task", "data", "cell", "mixer", "solver", "solver@parallel", "model", "optim")
GROUPS += ("projection", "logger", "experiment", "contender", "sweep", "hydra/launcher")


@pytest.mark.parametrize("value", ["[1]", "[null]", "[[text]]", "[text,1]", "['']"])
@pytest.mark.parametrize("group", GROUPS)
def test_a_member_of_a_group_is_named_by_text(tmp_path, group, value):
    name = group.partition("@")[0]
    said = ending(train, tmp_path, f"{group}={value}")
    assert said.startswith(f"error: {group}={value}: expected names of members of group {name}")
    assert said.count("\n") <= 2 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "program, given",
    [
        (evaluate, ["data=[1]"]),
        (finetune, ["transform=[null]"]),
        (bench, ["suite=[1]"]),
        (train, ["-m", "solver=[1],shooting"]),
    ],
)
def test_every_program_refuses_members_without_a_name(tmp_path, program, given):
    assert f"error: {given[-1]}: expected names of members of" in ending(program, tmp_path, *given)
    assert list(tmp_path.iterdir()) == []


def test_lists_of_names_and_other_lists_are_let_through():
    for given in ("transform=[lora]", "transform=[]", "logger=['tensorboard',csv]", "seeds=[1]"):
        check_arguments([given, "-m", "solver=[shooting],auto", "--cfg", "job", "--e2e=x"])


@pytest.mark.parametrize(
    "given, said",
    [
        (["--shell-completion"], "--shell-completion: give install=SHELL or uninstall="),
        (["-sc", "query=bash"], "--shell-completion query=SHELL: only a shell asks this; give"),
        (["--run", "--multirun"], "Only one of --"),
        (
            ["-m", 'hydra.sweeper.params={seed: "0,1"}'],
            "hydra.sweeper.params={seed: ",
        ),
        (["-m", "+hydra.sweeper.params.seed='0,1'"], "hydra.sweeper.params: give wh"),
        (["hydra.job.env_copy=[NOPE]"], "hydra.job.env_copy=[NOPE]: NOPE is not set in the env"),
        (["hydra.job={env_copy: [PATH, 1]}"], "hydra.job={env_copy: [PATH, 1]}: 1 is not set"),
    ],
)
def test_what_hydra_fails_on_is_said_in_a_line(tmp_path, monkeypatch, given, said):
    monkeypatch.delenv("COMP_LINE", raising=False)
    ended = ending(train, tmp_path, *given)
    assert ended.startswith(f"error: {said}") and "\n" not in ended
    assert list(tmp_path.iterdir()) == []
