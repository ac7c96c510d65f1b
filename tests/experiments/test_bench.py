"""The benchmark: what it times is checked first, its spread and floor are real."""

import csv
import json
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import check
from experiments.contest import rivals
from experiments.contest.contest import REFERENCE, contest, judge
from experiments.contest.recurrence_problem import (
    both_passes,
    floor_bytes,
    grid,
    make_problem,
    through,
)
from experiments.contest.timing import (
    Prepared,
    largest_error,
    measure,
    prepare,
    prepare_copy,
)
from experiments.run.folders import RunError

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def problem():
    return make_problem("para_gru", 12, 2, 4)


def run(problem, which, others):
    return {
        row.name: row
        for row in contest(
            problem,
            which,
            solvers={},
            others=others,
            rounds=3,
            budget_s=1.0,
            values_tol=1e-5,
            gradients_tol=1e-5,
        )
    }


def test_the_problem_is_the_cell_over_its_gates(problem):
    h = np.zeros((2, 4))
    w = {k: np.asarray(v, np.float64) for k, v in problem.params["recurrent"].items()}
    gates = [np.asarray(g, np.float64) for g in problem.gates]
    expected = []
    for x_z, x_r, x_n in zip(*gates, strict=True):
        z = 1 / (1 + np.exp(-(x_z + w["update"] * h)))
        r = 1 / (1 + np.exp(-(x_r + w["reset"] * h)))
        h = h + z * (np.tanh(x_n + w["candidate"] * r * h) - h)
        expected.append(h)
    forward = both_passes(through(jax.lax.scan, problem.step))["forward"]
    np.testing.assert_allclose(forward(*problem[1:]), expected, atol=1e-6)


def test_the_floor_counts_every_input_once_and_every_result_once(problem):
    array = 12 * 2 * 4 * 4  # one [time, batch, state] in float32
    assert floor_bytes(problem, "forward") == (3 + 1) * array
    # backward: gates, states and cotangent in, the gates' gradients out
    assert floor_bytes(problem, "forward_backward") == (3 + 1 + 3 + 1 + 1 + 3) * array


@pytest.mark.parametrize("name", list(rivals.RIVALS))
def test_every_rival_that_is_here_computes_the_same_values_and_gradients(problem, name):
    rows = run(problem, "forward_backward", [name])
    if rows[name].median_ms is None:
        assert "not installed" in rows[name].verdict
        pytest.skip(f"{name}: {rows[name].verdict}")
    assert rows[name].verdict == "ok"
    assert rows[name].value_error < 1e-5 and rows[name].gradient_error < 1e-4


def test_a_wrong_value_or_gradient_shows_no_speed_up(problem, monkeypatch):
    def off_by(values, gradients):
        def rival(problem, which):
            function = both_passes(through(jax.lax.scan, problem.step))[which]

            def spoiled(*arguments):
                ys, grads = function(*arguments)
                return ys + values, jax.tree.map(lambda g: g * (1 + gradients), grads)

            return rivals.Rival(prepare(spoiled, *problem[1:]), lambda out: out)

        return rival

    for name, spoil in {"liar": (1e-3, 0.0), "twister": (0.0, 1e-2), "honest": (0, 0)}.items():
        monkeypatch.setitem(rivals.RIVALS, name, off_by(*spoil))
    rows = run(problem, "forward_backward", ["liar", "twister", "honest"])
    assert rows["liar"].verdict == "wrong values (1e-03)" and rows["liar"].speed_up is None
    assert rows["twister"].verdict.startswith("wrong gradients (1e-02")
    assert rows["twister"].speed_up is None and rows["twister"].median_ms > 0
    assert rows["honest"].verdict == "ok" and rows["honest"].speed_up > 0
    assert rows[REFERENCE].speed_up == 1.0


def test_one_that_fails_or_is_absent_leaves_a_row_and_the_others(problem, monkeypatch):
    def absent(problem, which):
        raise rivals.CannotRun("not installed")

    def broken(problem, which):
        raise RuntimeError("out of memory\nand a long trace")

    monkeypatch.setitem(rivals.RIVALS, "absent", absent)
    monkeypatch.setitem(rivals.RIVALS, "broken", broken)
    rows = run(problem, "forward", ["absent", "broken"])
    assert rows["absent"].verdict == "not installed" and rows["absent"].median_ms is None
    assert rows["broken"].verdict == "failed: RuntimeError: out of memory"
    assert rows[REFERENCE].times_floor > 0


def test_the_gate_fails_on_nan():
    tolerances = {"values_tol": 1e-5, "gradients_tol": 1e-4}
    assert judge(float("nan"), None, **tolerances).startswith("wrong values")
    assert judge(0.0, float("inf"), **tolerances).startswith("wrong gradients")
    assert judge(1e-6, 1e-5, **tolerances) == "ok"


def test_the_largest_error_sees_nans_and_takes_equal_infinities_for_equal():
    one, nan, inf = jnp.ones(3), jnp.array([1, jnp.nan, 1]), jnp.array([1, jnp.inf, 1])
    assert largest_error({"a": one, "b": one * 2}, {"a": one, "b": one}) == 1.0
    assert largest_error([nan], [one]) == largest_error([one], [nan]) == float("inf")
    assert largest_error([nan], [nan]) == largest_error([inf], [inf]) == 0.0
    assert largest_error([inf], [-inf]) == float("inf")
    assert largest_error([one * 101], [one * 100], relative=True) == pytest.approx(0.01)
    assert largest_error([jnp.zeros((0, 3))], [jnp.zeros((0, 3))]) == 0.0


def test_timings_are_of_the_call_and_interleaved():
    order = []

    def sleeper(name, seconds):
        def call():
            order.append(name)
            time.sleep(seconds)

        return Prepared(call, 7.0)

    found = measure(
        {"slow": sleeper("slow", 4e-3), "fast": sleeper("fast", 2e-3)}, rounds=6, sample_s=1e-3
    )
    assert 4e-3 <= found["slow"].median < 40e-3 and 2e-3 <= found["fast"].median
    assert found["fast"].median < found["slow"].median
    for timing in found.values():
        assert timing.low <= timing.median <= timing.high
        assert timing.rounds == 6 and timing.compile_s == 7.0
    rounds = order[-12:]  # the last six rounds: each has both, in an order that changes
    pairs = {tuple(rounds[i : i + 2]) for i in range(0, 12, 2)}
    assert pairs == {("slow", "fast"), ("fast", "slow")}


def test_the_budget_ends_the_rounds_and_too_few_rounds_are_refused():
    call = Prepared(lambda: time.sleep(5e-3), 0.0)
    assert measure({"a": call}, rounds=50, budget_s=0.0)["a"].rounds == 5
    with pytest.raises(ValueError, match="rounds=2 gives no spread; expected 3"):
        measure({"a": call}, rounds=2)


def test_compiling_is_not_timed_and_a_copy_moves_the_bytes_it_says():
    slow_to_trace = prepare(lambda x: (time.sleep(0.05), x + 1)[1], jnp.zeros(3))
    assert slow_to_trace.compile_s >= 0.05
    assert measure({"a": slow_to_trace}, rounds=3)["a"].median < 0.02
    assert prepare_copy(8000).call().nbytes == 4000  # half is read, half is written


def test_a_suite_that_cannot_run_says_what_was_expected():
    suite = {"passes": ["forward"], "rivals": [], "shapes": grid([128], [1, 8], [32])}
    assert suite["shapes"] == [(128, 1, 32), (128, 8, 32)]
    check(suite)
    with pytest.raises(RunError, match=r"'backward'; expected some of \['forward'"):
        check({**suite, "passes": ["backward"]})
    with pytest.raises(RunError, match=r"'keras'; expected some of \['flax nn.RNN'"):
        check({**suite, "rivals": ["keras"]})
    with pytest.raises(RunError, match=r"\[0, 1, 2\]; expected \[T, B, D\]"):
        check({**suite, "shapes": [[0, 1, 2]]})
    with pytest.raises(ValueError, match="'grue' is not a cell; expected one of .*'para_gru'"):
        make_problem("grue", 1, 1, 1)


@pytest.mark.slow
def test_a_benchmark_writes_table_numbers_and_machine(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "experiments.bench", f"hydra.run.dir={folder}"]
    command += ["suite.shapes=[[32,2,4]]", "suite.rivals=[]", "rounds=3", "budget_s=0.1"]
    command += [f"~suite.solvers.{name}" for name in ("newton", "quasi_newton", "jacobi")]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [REFERENCE, "sequential", "sequential_reverse", "shooting", "auto"]
    assert [(r["which"], r["name"]) for r in rows] == [
        (which, name) for which in ("forward", "forward_backward") for name in names
    ]
    for row in rows:
        assert row["verdict"] == "ok", row
        assert float(row["median_ms"]) > 0 and float(row["floor_ms"]) > 0
    assert int(next(r for r in rows if r["name"] == "shooting")["iterations"]) > 0
    table = (folder / "results.md").read_text()
    assert f"JAX {jax.__version__}" in table and "shooting" in table and "shooting" in out.stdout
    known = json.loads((folder / "env.json").read_text())
    assert known["seconds"] > 0 and (folder / "config.yaml").exists()
    assert json.loads((folder / "summary.json").read_text())["ours_not_ok"] == 0
