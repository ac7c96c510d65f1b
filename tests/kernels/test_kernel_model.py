"""`tools/kernel_model.py`: expected times of the GPU kernels, by arithmetic alone."""

import pytest

from pallas_kernels.shapes import Shape, traffic
from tools import kernel_model as model

BIG = Shape(65536, 64, 2048)


def estimate_with(monkeypatch, roll, link=0, shape=BIG):
    counts = model.COUNTS["gru", "f32"]
    counts = counts._replace(guess=roll, full=roll, last=roll, link=link)
    monkeypatch.setitem(model.COUNTS, ("gru", "f32"), counts)
    return model.estimate(shape, "gru", "f32")


def test_a_kernel_that_computes_nothing_takes_the_time_of_its_memory(monkeypatch):
    found = estimate_with(monkeypatch, model.Roll(0, 0, 0))
    assert found.floor == traffic(BIG, model.COUNTS["gru", "f32"].leaves, 4, "forward") / 3e12
    assert found.floor <= found.expected < 1.04 * found.floor  # the last wave of blocks is not full


@pytest.mark.parametrize("roll", [model.Roll(800, 0, 0), model.Roll(0, 100, 0)])
def test_one_that_computes_much_takes_an_instruction_a_clock(monkeypatch, roll):
    found = estimate_with(monkeypatch, roll)
    steps = 65536 * 64 * 2048 / 32 / 4 / model.PROCESSORS * sum(model.PASSES["gru"])
    assert found.expected == pytest.approx(steps * 800 / model.CLOCK, rel=0.04)


def test_few_blocks_leave_nothing_to_hide_the_chain_behind(monkeypatch):
    few, many = Shape(8192, 8, 256), Shape(8192, 64, 2048)
    without = [estimate_with(monkeypatch, model.Roll(99, 0, 0), 0, s) for s in (few, many)]
    found = [estimate_with(monkeypatch, model.Roll(99, 0, 0), 20, s) for s in (few, many)]
    assert found[0].together == 1 and found[0].expected > 1.05 * without[0].expected
    assert found[1].together == 2 and found[1].expected == without[1].expected


def test_the_table_has_a_line_for_every_kernel_and_shape():
    lines = model.table().splitlines()
    assert len(lines) == 2 + len(model.COUNTS) * len(model.SHAPES)
    assert all(float(line.split("|")[-2]) >= 1.0 for line in lines[2:])
