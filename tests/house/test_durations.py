"""The report on what tests cost: sums by wing, what is over its budget, the last table."""

import pathlib

from tests import durations
from tests.durations import Cost

ROOT = pathlib.Path(__file__).resolve().parents[2]
COSTS = {
    "tests/weights/test_lora.py::test_a": 1.0,
    "tests/weights/test_lora.py::test_b[x]": 5.0,
    "tests/nn/test_nn.py::test_c": 800.0,
}


def test_costs_are_summed_by_wing_and_what_is_dear_is_named(tmp_path):
    last = {"weights": Cost(2, 7.4), "nn": Cost(3, 1.0)}
    head, nn, weights, share, *dear = durations.lines(COSTS, last)
    assert weights.split() == ["weights", "2", "6", "7", "720"]
    # Another number of tests ran then: no comparison.
    assert nn.split() == ["nn", "1", "800", "720", "over", "its", "budget"]
    assert share.startswith("2 of 3 tests take over 4 CPU s, 100% of all")
    assert [line.split("::")[1] for line in dear] == ["test_c", "test_b[x]"]


def test_the_table_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "durations.csv"
    assert durations.read(path) == {}
    durations.write(durations.by_wing(COSTS), path)
    assert durations.read(path) == {"nn": Cost(1, 800.0), "weights": Cost(2, 6.0)}


def test_functions_are_dear_by_the_mean_of_their_tests():
    costs = {"a.py::f[x]": 0.7, "a.py::f[y]": 0.3, "a.py::g[z]": 0.7, "a.py::g[w]": 0.0}
    assert durations.dear(costs) == ["a.py::f"]


def test_most_of_the_list_is_still_there():
    listed = durations.LIST.read_text().split()
    gone = []
    for name in listed:
        path, _, function = name.partition("::")
        file = ROOT / path
        if not file.exists() or f"def {function}(" not in file.read_text():
            gone.append(name)
    assert 100 < len(listed) < 1000
    assert len(gone) < 0.1 * len(listed), "`make test ARGS=--write-durations` writes it anew"


def test_the_clock_counts_work_and_not_waiting():
    began = durations.now()
    sum(i * i for i in range(2_000_000))
    assert 0.01 < durations.now() - began < 10
