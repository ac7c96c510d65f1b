"""Keys that are given twice on a command line."""

import pytest

from experiments import evaluate, train
from experiments.shell.overrides import check_repeated
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
