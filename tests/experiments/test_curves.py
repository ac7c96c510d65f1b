"""Curves over groups of runs, from their folders alone."""

import math

import numpy as np
import pytest

from experiments import compare
from experiments.run.folders import RunError
from experiments.studies import curves
from experiments.sweep import run_sets
from tests.experiments.run_folders import config, make_run

Y = "validation_bits_per_byte"


def test_runs_measured_at_other_points_are_interpolated_where_all_of_them_are(tmp_path):
    def rows(steps):
        return [{"step": s, "tokens": s, "loss": float(s)} for s in steps]

    make_run(tmp_path / "a", config(seed=0), rows([0, 4, 10]))
    make_run(tmp_path / "b", config(seed=1), rows([2, 4, 6, 8]))
    runs, _ = run_sets.read_all(str(tmp_path))
    curve = curves.make_curve(runs, "step", "loss")
    np.testing.assert_array_equal(curve.x, [2, 4, 6, 8])
    np.testing.assert_allclose(curve.mean, curve.x)
    np.testing.assert_allclose(curve.high - curve.low, 0)
    assert curves.shortest(runs, "step", "loss").folder.name == "b"
    assert curves.shortest(runs[:1], "step", "loss") is None


def test_what_is_not_finite_is_not_drawn(tmp_path):
    rows = [{"step": s, "loss": v} for s, v in enumerate([1.0, math.nan, 3.0, math.inf])]
    [run] = run_sets.read_all(str(make_run(tmp_path / "a", config(), rows)))[0]
    xs, ys = curves.points(run, "step", "loss")
    assert xs.tolist() == [0, 2] and ys.tolist() == [1, 3]


def test_runs_without_a_point_are_left_out_by_name(tmp_path):
    for name, last in (("good", 2.0), ("bad", math.nan)):
        rows = [{"step": 0, "loss": 1.0}, {"step": 1, "loss": last}]
        make_run(tmp_path / name, config(), rows)
    runs, _ = run_sets.read_all(str(tmp_path))
    found, left_out = curves.drawable(runs, "seed", "loss")
    assert [run.folder.name for run in found] == ["good"]
    assert left_out == [f"{tmp_path / 'bad'}: its last loss is not finite"]
    assert curves.drawable(runs, "step", "loss") == (runs, [])
    make_run(tmp_path / "other", config(), [{"step": 0, "accuracy": 1.0}])
    runs, _ = run_sets.read_all(str(tmp_path))
    found, left_out = curves.drawable(runs, "step", "loss")
    assert len(found) == 2 and left_out == [f"{tmp_path / 'other'}: it has no column loss"]
    with pytest.raises(RunError, match="no column y='nope'; choose from"):
        curves.drawable(runs, "step", "nope")
    [bad] = [run for run in runs if run.folder.name == "bad"]
    with pytest.raises(RunError, match="(?s)nothing to draw:.*bad: its last loss"):
        curves.drawable([bad], "seed", "loss")


def test_a_number_of_the_config_is_an_axis_with_the_last_figure_of_each_run(tmp_path):
    for width in (8, 16):
        for seed in range(2):
            make_run(tmp_path / f"{width}-{seed}", config(model__width=width, seed=seed))
    runs, _ = run_sets.read_all(str(tmp_path))
    curve = curves.make_curve(runs, "model.width", Y)
    assert curve.x.tolist() == [8, 16] and curve.runs == 2
    np.testing.assert_allclose(curve.mean, [1.65, 1.65])
    np.testing.assert_allclose(curve.high - curve.low, 0.1)


def test_the_usual_methods_keep_their_colour_and_others_differ():
    both = dict(zip("ab", curves.styles(["cell=para_gru", "cell=para_lstm"]), strict=True))
    assert curves.styles(["mixer=attention", "mixer=recurrent, cell=para_lstm"])[1] == both["b"]
    assert curves.styles(["cell=para_lstm"]) == [both["b"]]
    many = curves.styles([f"width={i}" for i in range(28)])
    assert len(set(many)) == 28


@pytest.mark.parametrize(
    "name, text",
    [
        ("seconds", "time (s)"),
        ("train_loss_nats", "train loss (nats per token)"),
        ("tokens_per_second", "speed (tokens/s)"),
        ("memory_bytes", "memory (bytes)"),
        ("accuracy_128", "accuracy 128 (share correct)"),
        ("gradient_norm", "gradient norm"),
    ],
)
def test_axes_carry_units(name, text):
    assert curves.axis_label(name) == text


def test_the_default_column_is_what_runs_are_judged_by(tmp_path):
    rows = [{"step": s, "validation_a": v, "score": v} for s, v in enumerate([0.2, 0.9, 0.5])]
    make_run(tmp_path / "a", config(), rows, summary={"judged_by": ["score", "max"]})
    make_run(tmp_path / "b", config(seed=1), rows)
    runs, _ = run_sets.read_all(str(tmp_path))
    table = compare.tabulate(runs, columns=["best"])
    assert (table.metric, table.better) == ("score", "max") and table.rows[0][1] == 0.9
    assert curves.pick_y(runs) == "score" and curves.pick_y(runs[1:]) == "validation_a"


def test_a_logarithmic_axis_needs_positive_numbers(tmp_path):
    rows = [{"step": s, "loss": -1.0} for s in range(3)]
    make_run(tmp_path / "a", config(), rows)
    runs, _ = run_sets.read_all(str(tmp_path))
    line = {"a": curves.make_curve(runs, "step", "loss")}
    with pytest.raises(RunError, match="log_y=true, but loss is never positive"):
        curves.draw(line, x="step", y="loss", title="", log_y=True)


def test_runs_of_a_group_without_a_shared_range_are_refused(tmp_path):
    for seed in range(2):
        rows = [{"step": 10 * seed + s, "loss": 1.0} for s in range(3)]
        make_run(tmp_path / f"{seed}", config(seed=seed), rows)
    runs, _ = run_sets.read_all(str(tmp_path))
    with pytest.raises(RunError, match="share no range of x='step'"):
        curves.make_curve(runs, "step", "loss")


def test_a_label_of_thousands_of_keys_is_shortened():
    label = ", ".join(f"k{i}={i}" for i in range(8000))
    two = np.array([1.0, 2.0])
    curve = curves.Curve(two, two, two, two, 1)
    figure = curves.draw({label: curve}, x="tokens", y=Y, title="t")
    [shown] = figure.axes[0].get_legend().get_texts()
    assert len(shown.get_text()) < 1000 and shown.get_text().endswith("…")
