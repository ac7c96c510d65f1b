"""What a step costs: arithmetic counted by hand, compilation apart, memory, and shares of time."""

import csv
import functools
import json
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from omegaconf import OmegaConf

from experiments.run import folders, metrics, opening, profiling, step_cost, trainer
from experiments.run.profiling import Operation, Program, Trace, divide, read_program
from experiments.run.settings import make_settings
from experiments.run.task import Task
from jaxpara.nn import decoder, mixers
from jaxpara.recurrence import cells
from jaxpara.train import init_state, make_step, next_token_loss, optimizer
from jaxpara.types import Model


def flops(f, *arguments):
    return step_cost.matmul_flops(jax.make_jaxpr(f)(*arguments))


A, B = jnp.zeros((3, 4)), jnp.zeros((4, 5))
ONE = 2 * 3 * 4 * 5


def test_products_and_convolutions_count_two_for_each_multiplication():
    assert flops(jnp.dot, A, B) == ONE
    assert flops(jax.vmap(jnp.dot), jnp.zeros((7, 3, 4)), jnp.zeros((7, 4, 5))) == 7 * ONE
    signal, kernel = jnp.zeros((2, 6, 16)), jnp.zeros((8, 6, 3))  # NCH, OIH
    convolve = functools.partial(lax.conv_general_dilated, window_strides=(1,), padding="VALID")
    assert flops(convolve, signal, kernel) == 2 * (2 * 8 * 14) * (6 * 3)


def test_what_a_loop_holds_counts_once_for_each_round():
    def repeated(a, b):
        return lax.scan(lambda c, _: (c, jnp.dot(a, b)), 0.0, None, length=6)

    assert flops(repeated, A, B) == 6 * ONE
    assert flops(jax.jit(jax.checkpoint(repeated)), A, B) == 6 * ONE

    def branches(p, a, b):
        return lax.cond(p, lambda: jnp.dot(a, b), lambda: jnp.zeros((3, 5)))

    def rounds(a, b):
        return lax.while_loop(lambda c: c[0] < 9, lambda c: c + jnp.dot(a, b)[0], B[0])

    assert flops(branches, True, A, B) == flops(rounds, A, B) == ONE


def test_the_flops_of_a_model_are_three_times_those_of_its_forward_products():
    model = decoder(32, 8, 2, mixer=mixers.recurrent(cells.para_gru))
    key = jax.random.key(0)
    params = jax.eval_shape(model.init, key)
    batch = jnp.zeros((2, 17), jnp.int32)
    shapes = [
        leaf.shape
        for path, leaf in jax.tree.leaves_with_path(params)
        if path[-1] == jax.tree_util.DictKey("kernel")
    ]
    matrices = sum(math.prod(shape) for shape in shapes)
    counted = step_cost.model_flops(next_token_loss(model), params, batch, key)
    assert counted == 3 * 2 * matrices * 2 * 16


@pytest.fixture(scope="module")
def small():
    model = decoder(32, 8, 1, mixer=(mixers.recurrent(cells.para_gru),))
    optimiser = optimizer(steps=10)
    loss = next_token_loss(model)
    step = jax.jit(make_step(loss, optimiser))
    return step, loss, init_state(model, optimiser, jax.random.key(0))


@pytest.mark.slow
def test_a_measured_step_is_the_step_and_is_compiled_once(small):
    step, loss, state = small
    reports, batch = [], jnp.zeros((2, 9), jnp.int32)
    call = step_cost.measured(step, loss, reports.append)
    first, _ = call(state, batch)
    second, _ = call(first, batch)
    assert int(second.step) == 2 and step._cache_size() == 1
    [cost] = reports
    assert cost.compile_seconds > 0 and cost.model_flops > 0
    assert cost.text().startswith("HloModule jit_step")


def test_figures_relate_the_cost_to_speed_and_peak():
    cost = step_cost.StepCost(1.5, 600.0, str)
    found = step_cost.figures(cost, tokens_per_step=6, tokens_per_second=50.0, peak=1e4)
    assert found.pop("memory_bytes") == pytest.approx(step_cost.peak_memory(), rel=0.5)
    assert found == {
        "compile_seconds": 1.5,
        "model_flops_per_token": 100.0,
        "model_flops_per_second": 5000.0,
        "model_flops_utilization": 0.5,
    }
    early = step_cost.figures(None, tokens_per_step=6, tokens_per_second=0.0, peak=None)
    assert set(early) == {"memory_bytes"}


def test_peak_memory_is_in_bytes_and_never_falls(monkeypatch):
    before = step_cost.peak_memory()
    held = bytearray(64 << 20)
    assert before > 50e6 and step_cost.peak_memory() >= max(before, len(held))

    class Device:
        def __init__(self, peak):
            self.memory_stats = lambda: {"peak_bytes_in_use": peak}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(5), Device(7)])
    assert step_cost.peak_memory() == 7


class Batches(NamedTuple):
    """The same batch again and again."""

    batch: Any

    def __next__(self):
        return self.batch

    def get_state(self):
        return {"position": 1}

    def set_state(self, state):
        del state


HLO = """HloModule jit_step, is_scheduled=true

%product (p: f32[2]) -> f32[2] {
  ROOT %dot.1 = f32[2]{0} dot(%p, %p), metadata={op_name="jit(step)/jvp()/dot_general"}
}

%body (p: (f32[2], s32[])) -> (f32[2], s32[]) {
  %plain.1 = f32[2]{0} add(%p, %p)
  %dot.2 = f32[2]{0} dot(%p, %p), metadata={op_name="while/body/dot_general"}
  ROOT %t = (f32[2], s32[]) tuple(%plain.1, %dot.2)
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %fused = f32[2]{0} fusion(%a), kind=kLoop, calls=%product, metadata={op_name="jit(step)/exp"}
  %loop = (f32[2], u8[]) while(%t), body=%body, metadata={op_name="jvp(newton_scan)/while"}
  %score = f32[2]{0} dot(%a, %a), metadata={op_name="jit(step)/jvp(attention)/dot_general"}
  %named = f32[2]{0} bitcast(%a), metadata={op_name="jit(step)/jvp()/dot_general"}
  %gemm = f32[2]{0} custom-call(%a), metadata={op_name="jit(step)/jvp()/dot_general"}
  ROOT %update = f32[2]{0} multiply(%a, %a), metadata={op_name="jit(step)/optimizer/mul"}
}
"""


def test_an_operation_belongs_to_the_scope_it_came_from_or_stands_in():
    program = read_program(HLO)
    assert program.module == "jit_step" and program.containers == {"loop"}
    assert {name: program.parts[name] for name in program.parts if name != "t"} == {
        "dot.1": "matmul",
        "plain.1": "recurrence",
        "dot.2": "recurrence",
        "fused": "matmul",
        "loop": "recurrence",
        "score": "attention",
        "named": "other",
        "gemm": "matmul",
        "update": "optimizer",
    }


def test_time_is_divided_without_rest():
    parts = {"a": "matmul", "b": "optimizer", "loop": "recurrence", "inner": "attention"}
    program = Program("m", parts, frozenset({"loop"}))
    operations = [
        Operation("1", "a", "m", -5, 10),  # begins before the window
        Operation("2", "b", "m", 5, 10),  # shares 5 with a
        Operation("1", "loop", "m", 10, 40),  # alone but for its body:
        Operation("1", "inner", "m", 15, 20),  # in the same thread
        Operation("2", "inner", "m", 25, 30),  # in another one
        Operation("1", "a", "other program", 40, 44),
        Operation("1", "unheard of", "m", 44, 46),
    ]
    trace = Trace(operations, fetching=[(30, 50), (60, 70)], aside=[(80, 95)], window=(0, 100))
    found = divide(trace, program)
    assert found == {
        "recurrence": 20,
        "attention": 10,
        "matmul": 7.5,
        "optimizer": 2.5,
        "other": 6,
        "data": 14,
        "idle": 25,
    }
    assert sum(found.values()) == 100 - 15


def test_a_traced_run_leaves_a_trace_and_shares_that_add_up_to_one(small, tmp_path):
    step, loss, state = small
    reports, said = [], []
    batch = jnp.zeros((2, 9), jnp.int32)

    with profiling.profiled(
        step_cost.measured(step, loss, reports.append),
        Batches(batch),
        folder=tmp_path,
        start=1,
        steps=2,
        text=lambda: reports[0].text(),
        say=said.append,
    ) as (traced, batches):
        assert batches.get_state() == {"position": 1}
        for _ in range(4):
            state, _ = traced(state, next(batches))
    assert int(state.step) == 4
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    with (tmp_path / "profile.csv").open() as file:
        shares = {row["part"]: float(row["share"]) for row in csv.DictReader(file)}
    assert tuple(shares) == profiling.PARTS
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    for part in ("recurrence", "matmul", "optimizer", "data"):
        assert shares[part] > 0, part
    assert shares["attention"] == 0
    assert said[0].startswith("a traced step takes ") and "recurrence" in said[0]


def test_a_run_that_ends_too_early_has_no_profile_and_says_so(tmp_path):
    said = []

    def step(state, batch):
        return state + 1, {}

    with profiling.profiled(
        step, Batches(None), folder=tmp_path, start=1, steps=5, text=str, say=said.append
    ) as (traced, _):
        traced(0, None)
        traced(1, None)
    assert said == ["no profile: the run ended after 2 of trace.start + trace.steps steps"]
    with jax.profiler.trace(str(tmp_path / "again")):  # the profiler is free again
        pass
    assert not (tmp_path / "profile.csv").exists()


def test_a_backend_that_names_no_operations_gives_no_shares(tmp_path, monkeypatch):
    def silent(folder):
        del folder
        return Trace([], [], [], (0, 1))

    def step(state, batch):
        return state + 1, batch

    monkeypatch.setattr(profiling, "read_trace", silent)
    said = []
    with profiling.profiled(
        step, Batches({}), folder=tmp_path, start=1, steps=1, text=str, say=said.append
    ) as (traced, batches):
        traced(0, next(batches))
        traced(1, next(batches))
    assert said == [
        f"no profile: this backend's trace names no operations; look at {tmp_path}/trace"
    ]
    assert (tmp_path / "trace").is_dir() and not (tmp_path / "profile.csv").exists()


SETTINGS = {
    "name": "toy",
    "seed": 0,
    "steps": 6,
    "batch_size": 4,
    "accumulate": 1,
    "log_every": 2,
    "eval_every": 3,
    "checkpoint": {"every": 6, "keep_last": 1, "keep_best": 0},
    "profile": True,
    "trace": {"start": 2, "steps": 3},
    "peak_flops": 1e12,
}


def test_a_run_records_its_cost_and_its_profile(tmp_path, capsys):
    def loss(params, batch, key):
        del key
        mean = jnp.mean((batch @ params["w"]) ** 2)
        return mean, {"loss": mean}

    task = Task(
        model=Model(lambda key: {"w": jax.random.normal(key, (3, 2))}, lambda p, x: x @ p["w"]),
        loss=loss,
        batches=Batches(np.ones((4, 3), np.float32)),
        tokens_per_step=4,
        columns=("accuracy",),
        evaluate=lambda step, params: {"accuracy": 0.5},
        best=("accuracy", "max"),
        describe=str,
        finish=lambda folder, params, summary: None,
        about="a toy",
    )
    opening.open_run(tmp_path, OmegaConf.create(SETTINGS))
    trainer.train(
        task,
        optimizer=optax.sgd(0.1),
        projection=None,
        settings=make_settings(SETTINGS),
        folder=tmp_path,
        config=SETTINGS,
    )
    assert "a traced step takes" in capsys.readouterr().out
    assert (tmp_path / "loss.png").exists() and (tmp_path / "profile.csv").exists()
    assert (tmp_path / "trace").is_dir()
    table = metrics.read(tmp_path / "metrics.csv")
    trained = [i for i, loss in enumerate(table["train_loss_nats"]) if loss is not None]
    assert [table["step"][i] for i in trained] == [2, 4, 6]
    flops_per_token = 3 * 2 * 3 * 2  # one product, [4, 3] @ [3, 2], of four tokens
    for i in trained:
        expected = flops_per_token * table["tokens_per_second"][i]
        assert table["model_flops_per_second"][i] == pytest.approx(expected, abs=flops_per_token)
        assert table["memory_bytes"][i] > 50e6
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["model_flops_per_token"] == flops_per_token
    assert summary["compile_seconds"] > 0 and summary["memory_bytes"] > 50e6
    rate = summary["model_flops_utilization"] * 1e12
    assert rate == pytest.approx(summary["tokens_per_second"] * flops_per_token)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"start": 0, "steps": 1}, "trace.start=0: expected a whole number, at least 1"),
        ({"start": 4, "steps": 3}, "trace.start=4 and trace.steps=3 do not fit steps=6"),
    ],
)
def test_steps_that_cannot_be_traced_are_refused(changes, message):
    with pytest.raises(folders.RunError, match=message):
        make_settings({**SETTINGS, "trace": changes})
    if changes["start"]:  # what does not fit this run alone is idle without a profile
        assert make_settings({**SETTINGS, "trace": changes, "profile": False})
