"""The kernels' benchmark: resumed, honest about what it left out, and right about targets."""

import csv
import json

import numpy as np
import pytest

import jaxpara as jp
from benchmarks import chains, contenders, fit_choice, kernels, points, recurrences, report, rows
from benchmarks.points import KERNEL, SCAN, Point
from jaxpara.recurrence import rule
from jaxpara.recurrence.solve import linear_kernel
from pallas_kernels import shapes
from pallas_kernels.shapes import GRID, Leaves, Shape, footprint, traffic

SMOKE = ["--grid", "smoke", "--dtypes", "float32", "--parts", "grid", "--minutes", "9"]


def measured_row(point, took, **changes):
    size = points.ITEMSIZE[point.dtype]
    moved = traffic(point.shape, recurrences.leaves(point.op), size, point.which)
    floor = moved / 3000 / 1e6
    return (
        rows.key(point)
        | dict.fromkeys(rows.FIELDS[len(rows.KEY) :])
        | {
            "backend": "mosaic_gpu" if point.implementation == KERNEL else None,
            "verdict": "ok",
            "ms": took,
            "ms_low": 0.9 * took,
            "ms_high": 1.1 * took,
            "gb_s": moved / took / 1e6,
            "floor_ms": floor,
            "times_floor": took / floor,
            "value_error": 1e-6,
            "gradient_error": 1e-6 if point.which != "forward" else None,
            "compile_s": 1.0,
            "copy_gb_s": 3000.0,
            "device": "Some GPU",
            "jax": "0.12.0",
            "commit": "abc",
            "date": "2026-11-22",
        }
        | changes
    )


def by_point(*made):
    return {rows.point_of(row): row for row in made}


def test_the_floor_counts_every_array_once_and_the_grid_is_the_issues():
    gru, shape = Leaves(states=1, inputs=3), Shape(2048, 8, 256)
    entries = 2048 * 8 * 256
    assert traffic(shape, gru, 4, "forward") == 4 * entries * (3 + 1)
    assert traffic(shape, gru, 4, "backward") == 4 * entries * (3 + 1 + 1 + 3)
    # s_t = a s_{t-1} + b needs a and s to go back, not b.
    assert traffic(shape, Leaves(1, 2, 1), 2, "backward") == 2 * entries * (1 + 1 + 1 + 2)
    assert traffic(shape, gru, 4, "forward_backward") == footprint(
        shape, gru, 4, "forward_backward"
    ) + footprint(shape, gru, 4, "forward")
    with pytest.raises(ValueError, match="which='sideways' is not a pass"):
        traffic(shape, gru, 4, "sideways")
    assert len(GRID) == len(set(GRID)) == 5 * 3 * 3


def test_points_over_the_share_of_memory_are_named():
    every = points.grid(GRID, ["gru", "linear"], ["float32", "bfloat16"])
    fit, large = points.fitting(every, 80 * 10**9)
    assert len(fit) + len(large) == len(every) and large
    assert {p.shape for p in large} >= {Shape(131072, 64, 2048), Shape(131072, 64, 1024)}
    assert (
        max(map(points.needs, fit)) <= shapes.SHARE_OF_MEMORY * 80e9 < min(map(points.needs, large))
    )


def test_an_interrupted_run_has_the_targets_and_a_coarse_map():
    timed = points.grid(GRID, ["gru", "linear"], ["float32", "bfloat16"])
    paths = points.crossover(list(rule.PATHS))
    order = points.in_order(timed, paths)
    assert len(order) == len(set(order)) == len({*timed, *paths})
    assert order[0] == Point("gru", "float32", "forward", Shape(2048, 8, 256), KERNEL)
    assert order[1].implementation == SCAN
    early = order[: len(order) // 3]
    large = [s for s in GRID if s.batch * s.width >= 2048 and s.steps in (2048, 8192)]
    targets = [p for p in timed if p.implementation == KERNEL and p.shape in large]
    assert set(targets) <= set(early)
    fitted = {p.shape for p in early if p.implementation.startswith(points.SOLVER)}
    assert fitted == set(points.COARSE) < set(points.CROSSOVER)
    assert Shape(131072, 64, 256) not in {p.shape for p in early}


def test_inputs_are_rotated_while_they_fit_a_cache():
    assert chains.sets_needed(1 << 20) == chains.MOST_SETS
    assert chains.sets_needed(100 << 20) == 3
    assert chains.sets_needed(1 << 30) == 1


def test_rows_that_a_cache_may_hold_are_marked():
    point = Point("linear", "float32", "forward", Shape(16, 1, 8), KERNEL)
    assert bench(sets=16).row(point)["cached"] == 1
    small, large = measured_row(point, 1.0, cached=1), measured_row(point, 1.0, cached=0)
    lines = lambda row: "\n".join(report.report(by_point(row), [], "x"))  # noqa: E731
    assert "| 16, 1, 8 * |" in lines(small) and "| 16, 1, 8 |" in lines(large)


def test_a_row_whose_kernel_was_refused_is_not_called_fused():
    shape = Shape(16, 1, 8)
    point = Point("gru", "float32", "forward_backward", shape, points.SOLVER + "fused")
    for _ in range(2):  # the reason is logged once, and asked for twice
        row = bench().row(point)
        assert row["verdict"].startswith(f"failed: NotImplementedError: {linear_kernel.OFF}")
        assert "ms" not in row
    other = bench().row(point._replace(implementation=points.SOLVER + "shooting"))
    assert other["verdict"] == "ok"


def test_what_is_timed_is_what_users_get(monkeypatch):
    asked = {}

    def forward(*args, **kwargs):
        asked.update(kwargs)
        raise NotImplementedError

    monkeypatch.setattr(contenders.nonlinear_recurrence, "forward", forward)
    bench().row(Point("gru", "float32", "forward", Shape(16, 1, 8), KERNEL))
    assert asked == {"certain": True, "implementation": "xla"}


@pytest.mark.parametrize("name", ["gru", "lstm", "slstm"])
def test_a_kernel_is_told_of_a_cell_what_newton_scan_tells_it(name):
    recurrence = recurrences.make(name, 4)
    (operands,) = recurrences.data(recurrence, Shape(3, 1, 4), "float32")

    def step(states, inputs):
        return recurrence.step(recurrence.consts, states, inputs), None

    choice = jp.explain_choice(step, operands.init, operands.xs, solver=jp.fused())
    assert recurrence.certain == (choice.certain and not choice.kinks)


def test_rotated_sets_each_give_their_own_result():
    sets = [(np.float32(i), np.float32(10 * i)) for i in range(4)]
    run = chains.chained(lambda shared, a, b: shared + a + b, 3)
    assert [float(x) for x in run(np.float32(100), sets)] == [100, 111, 122]
    trimmed = chains.chained(lambda _, a, b: (a, b), 3, lambda result: result[:1])
    assert [len(result) for result in trimmed(None, sets)] == [1, 1, 2]


def test_the_oracle_is_a_plain_loop_in_float64_and_its_corner_is_that_of_the_operands():
    recurrence = recurrences.make("gru", 5)
    (operands,) = recurrences.data(recurrence, Shape(7, 3, 5), "bfloat16")
    true = recurrences.truth(recurrence, operands)
    picked = np.ix_(range(7), [0, 2], [0, 1, 3, 4])
    x_z, x_r, x_n = (np.asarray(x, np.float64)[picked] for x in operands.xs)
    candidate, reset, update = (np.asarray(c, np.float64)[[0, 1, 3, 4]] for c in recurrence.consts)
    h = np.zeros((2, 4))
    for t in range(7):
        z, r = (1 / (1 + np.exp(-(g[t] + w * h))) for g, w in ((x_z, update), (x_r, reset)))
        h = h + z * (np.tanh(x_n[t] + candidate * r * h) - h)
        np.testing.assert_allclose(true.states[0][t], h, rtol=1e-12)


@pytest.mark.slow
def test_a_benchmark_that_was_stopped_goes_on_and_measures_nothing_twice(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(kernels, "SMOKE", shapes.SMOKE[1:])
    path = tmp_path / "rows.csv"
    call = [*SMOKE, "--csv", str(path), "--ops"]
    kernels.main([*call, "linear"])
    first = rows.read(path)
    assert len(first) == 2 * 2  # passes, kernel and lax.scan
    assert all(row["verdict"] == "ok" and row["ms"] > 0 for row in first)
    assert all(row["gradient_error"] < 1e-5 for row in first if row["pass"] != "forward")
    with path.open("a") as file:
        file.write("gru,float32,forwa")  # killed in the middle of a line
    kernels.main([*call, "linear", "gru"])
    again = rows.read(path)
    assert again[: len(first)] == first
    assert len(again) == 2 * len(first) and {row["op"] for row in again} == {"linear", "gru"}
    said = capsys.readouterr().out
    assert f"{len(first)} of {2 * len(first)} points to do" in said
    assert "665 times lax.scan at the best point: NOT met" in said  # the targets, at the end
    assert "## gru, float32, forward + backward" in path.with_suffix(".md").read_text()


@pytest.mark.slow
def test_without_time_the_table_is_written_and_the_rest_is_counted(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    kernels.main([*SMOKE[:-1], "0", "--csv", str(path), "--ops", "linear"])
    assert "8 points left" in capsys.readouterr().out
    assert path.with_suffix(".md").read_text() == "Nothing was measured.\n"


@pytest.mark.slow
def test_a_point_that_killed_the_run_is_skipped_until_retried(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    point = Point("linear", "float32", "forward", shapes.SMOKE[0], KERNEL)
    with pytest.raises(SystemExit), rows.running(path, bench().head(point)):
        raise SystemExit
    call = [*SMOKE[:-1], "0", "--csv", str(path), "--ops", "linear"]
    kernels.main(call)
    assert "7 of 8 points to do" in capsys.readouterr().out
    assert [row["verdict"] for row in rows.read(path)] == [
        "failed: the process ended while this was measured"
    ]
    kernels.main([*call, "--retry"])
    assert "8 of 8 points to do" in capsys.readouterr().out


@pytest.mark.slow
def test_a_device_that_is_lost_ends_the_run_after_the_row_that_lost_it(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(kernels, "_alive", lambda: False)
    path = tmp_path / "rows.csv"
    kernels.main([*SMOKE, "--csv", str(path), "--ops", "linear", "--implementation", "mosaic_gpu"])
    (row,) = rows.read(path)
    assert row["verdict"].startswith("failed: NoImplementation")
    assert "the device no longer answers" in capsys.readouterr().out
    assert not path.with_suffix(".running").exists()


def bench(**options):
    here = kernels.Machine("cpu", 10**9, 10.0, "0", "abc")
    return kernels.Bench(here, **({"scan_s": 1.0, "sets": 1, "implementation": "xla"} | options))


def test_a_point_that_cannot_run_says_why_and_a_long_lax_scan_is_skipped():
    point = Point("linear", "float32", "forward", Shape(4, 1, 2), KERNEL)
    row = bench(implementation="nonsense").row(point)
    assert row["verdict"].startswith("failed: ValueError: implementation='nonsense'")
    row = bench(implementation="mosaic_gpu").row(point)  # not replaced by what does run here
    assert row["verdict"].startswith("failed: NoImplementation") and "ms" not in row
    long = Point("gru", "float32", "forward", Shape(10**8, 1, 1), SCAN)
    assert bench().row(long)["verdict"] == "skipped: a run would take about 100 s"


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [
        ((1e-5, 1e-4), "ok"),
        ((1e-5, None), "ok"),
        ((1e-2, None), "wrong values (1e-02)"),
        ((float("inf"), None), "wrong values (inf)"),
        ((float("nan"), 0.0), "wrong values (nan)"),
        ((1e-5, float("nan")), "wrong gradients (nan)"),
    ],
)
def test_a_wrong_result_is_named(errors, verdict):
    assert kernels._verdict(errors, "float32") == verdict


def test_a_file_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "old.csv"
    path.write_text("op,ms\ngru,1\n")
    with pytest.raises(ValueError, match="has the columns .*expected those of benchmarks.rows"):
        rows.read(path)


def lines_of(*made):
    return {line.split(":")[0]: line for line in report.targets(by_point(*made))}


def test_targets_are_met_or_not_and_say_where_the_worst_is():
    large, small = Shape(8192, 8, 2048), Shape(8192, 1, 2048)
    linear = [Point("linear", "float32", "forward", shape, KERNEL) for shape in (large, small)]
    floors = [measured_row(p, 1.0)["floor_ms"] for p in linear]
    good = report.targets(
        by_point(measured_row(linear[0], floors[0] / 0.9), measured_row(linear[1], floors[1] / 0.7))
    )
    assert "B D >= 16384: met, 1 of 1 points; worst 0.90" in good[0]
    assert "T >= 8192: met, 1 of 1 points; worst 0.70" in good[1]
    bad = report.targets(by_point(measured_row(linear[0], floors[0] / 0.8)))
    assert "NOT met, 0 of 1 points; worst 0.80 at linear forward 8192, 8, 2048" in bad[0]
    assert "not measured" in bad[1]
    wrong = report.targets(by_point(measured_row(linear[0], floors[0], verdict="wrong values")))
    assert "NOT met, 0 of 1 points; wrong values at" in wrong[0]


def test_the_backward_target_is_what_gradients_add_over_their_own_floor():
    forward = Point("gru", "float32", "forward", Shape(2048, 8, 256), KERNEL)
    both = forward._replace(which="forward_backward")
    one = measured_row(forward, 1.0)["floor_ms"]  # four arrays; the backward pass moves eight
    made = by_point(measured_row(forward, 2 * one), measured_row(both, 2 * one + 2.5 * 2 * one))
    assert report.backward_floors(made, both) == pytest.approx(2.5)
    lines = report.targets(made)
    assert "forward within 2.5 floors at B D, T >= 2048: met" in lines[2]
    assert "backward within 3 floors at B D, T >= 2048: met, 1 of 1 points; worst 2.50" in lines[3]
    assert report.backward_floors(by_point(measured_row(both, 1.0)), both) is None


def test_the_ratio_to_lax_scan_counts_only_where_both_are_right():
    point = Point("gru", "float32", "forward", Shape(65536, 1, 256), KERNEL)
    scan = point._replace(implementation=SCAN)
    made = by_point(measured_row(point, 1.0), measured_row(scan, 700.0))
    assert report.targets(made)[-1] == (
        "665 times lax.scan at the best point: met, 700 at gru forward 65536, 1, 256"
    )
    assert "| 700 |" in "\n".join(report.report(made, [point], "rows.csv"))
    assert "- gru float32 forward: 65536, 1, 256" in report.report(made, [point], "rows.csv")
    wrong = by_point(measured_row(point, 1.0, verdict="wrong values"), measured_row(scan, 700.0))
    assert report.speed_up(wrong, point) is None
    assert report.targets(wrong)[-1].endswith("not measured")


def write(path, *made):
    for row in made:
        rows.append(path, row)
    return path


def test_the_map_of_auto_is_fitted_from_rows_and_the_rule_reads_it(tmp_path, monkeypatch):
    short, long = Shape(128, 1, 8), Shape(8192, 8, 256)
    made = []
    for shape, fast in ((short, 2.0), (long, 0.01)):
        for name, ms in (
            (SCAN, 1.0),
            ("newton_scan:implicit", 0.8),
            ("newton_scan:shooting", fast),
        ):
            point = Point("lstm", "float32", "forward_backward", shape, name)
            made.append(measured_row(point, ms))
    skipped = Point("gru", "float32", "forward_backward", long, SCAN)
    nothing = {"ms": None, "verdict": "skipped: a run would take about 9 s"}
    made.append(measured_row(skipped, 1.0, **nothing))
    made.append(measured_row(skipped._replace(implementation="newton_scan:shooting"), 1.0))
    output = tmp_path / "choice_gpu.json"
    source = write(tmp_path / "rows.csv", *made)
    fit_choice.main([str(source), "--output", str(output)])
    fitted = json.loads(output.read_text())
    assert fitted["device"] == "Some GPU" and fitted["platform"] == "gpu"
    assert [p["steps"] for p in fitted["points"]] == [128, 8192]  # gru has no lax.scan beside it
    assert fitted["points"][0]["block"] == 2 and fitted["points"][0]["elements"] == 16
    assert fitted["points"][1]["speedup"] == {"implicit": 1.25, "shooting": 100.0}
    monkeypatch.setattr(rule, "_map", lambda platform: fitted)
    solver, why = rule.pick("gpu", steps=8000, elements=4096, block=2)
    assert solver == rule.PATHS["shooting"] and "100 times as fast as lax.scan" in why
    assert rule.pick("gpu", steps=128, elements=16, block=2)[0] == rule.PATHS["implicit"]


def test_a_map_needs_paths_beside_lax_scan_on_one_device(tmp_path, capsys):
    kernel = Point("gru", "float32", "forward_backward", Shape(128, 1, 8), KERNEL)
    with pytest.raises(SystemExit):
        fit_choice.main([str(write(tmp_path / "a.csv", measured_row(kernel, 1.0)))])
    assert "no newton_scan row beside a lax.scan row" in capsys.readouterr().err
    made = [
        measured_row(kernel._replace(implementation=SCAN), 1.0),
        measured_row(kernel._replace(implementation="newton_scan:shooting"), 1.0, device="Other"),
    ]
    with pytest.raises(SystemExit):
        fit_choice.main([str(write(tmp_path / "b.csv", *made))])
    assert "mixes devices ['Other', 'Some GPU']" in capsys.readouterr().err


def test_rows_survive_a_round_trip(tmp_path):
    point = Point("gru", "bfloat16", "forward", Shape(128, 1, 8), KERNEL)
    path = write(tmp_path / "a.csv", measured_row(point, 0.12345678))
    (row,) = rows.read(path)
    assert rows.point_of(row) == point and row["ms"] == 0.12346 and row["iterations"] is None
    with path.open(newline="") as file:
        assert tuple(next(csv.reader(file))) == rows.FIELDS
