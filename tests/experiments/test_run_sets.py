"""Comparing runs from their folders alone: figures and tables of what no test trained."""

import csv
import re
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from hydra import compose, initialize_config_module
from matplotlib.colors import to_hex
from omegaconf import OmegaConf

from experiments import compare, plot
from experiments.run.folders import REPOSITORY
from experiments.studies import curves
from experiments.sweep import run_sets
from tests.experiments.programs import call
from tests.experiments.run_folders import ATTENTION, LSTM, config, make_run

Y = "validation_bits_per_byte"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Three methods by three seeds, as a sweep leaves them, and one job that failed at once."""
    place = tmp_path_factory.mktemp("place")
    root = place / "multirun" / "lm"
    for seed in range(3):
        make_run(root / f"{seed}", config(seed=seed))
        make_run(root / f"{3 + seed}", config(seed=seed, cell=LSTM))
        attention = config(seed=seed, mixer=ATTENTION, optim__learning_rate=0.3)
        make_run(root / f"{6 + seed}", attention)
    failed = make_run(root / "9", config(seed=3))
    (failed / "metrics.csv").unlink()
    return place


def read(sweep):
    return run_sets.read_all(str(sweep / "multirun"))[0]


def test_a_config_is_flattened_to_what_objects_are_called():
    flat = run_sets.flatten(config())
    assert (
        flat["cell"] == "para_gru"
        and flat["mixer"] == "recurrent"
        and flat["mixer.cell"] == "para_gru"
    )
    assert flat["optim.learning_rate"] == 0.1 and flat["mixer.hidden"] is None
    assert not [key for key in flat if "_target_" in key or key.endswith(".path")]
    pattern = {"_target_": "builtins.tuple", "_args_": [[config()["mixer"], ATTENTION]]}
    assert run_sets.flatten({"mixer": pattern}) == {"mixer": "recurrent+attention"}
    assert run_sets.flatten({"data": {"_target_": "a.b", "path": "x"}})["data.path"] == "x"


def test_a_folder_a_glob_and_a_folder_of_folders_expand_to_the_same_runs(sweep):
    root = sweep / "multirun"
    every = run_sets.expand(str(root))
    assert [path.name for path in every] == [str(i) for i in range(10)]
    assert run_sets.expand(str(root / "lm" / "*")) == every
    assert run_sets.expand([str(root / "lm" / "0"), str(root / "lm" / "0")]) == every[:1]


def test_runs_differ_in_what_was_chosen_and_not_in_what_follows_from_it(sweep):
    keys = run_sets.differing_keys(read(sweep))
    assert keys == ["mixer", "mixer.cell", "optim.learning_rate"]


def test_one_difference_that_shows_in_two_places_counts_once(tmp_path):
    make_run(tmp_path / "a", config())
    make_run(tmp_path / "b", config(steps=8, optim__steps=8, seed=1, name="other"))
    assert run_sets.differing_keys(run_sets.read_all(str(tmp_path))[0]) == ["steps"]


@pytest.mark.parametrize(
    "choices, keys",
    [
        (["", "seed=1"], []),
        (["mixer=attention", "cell=para_lstm", ""], ["mixer", "mixer.cell"]),
        (["steps=10", "steps=20 seed=3"], ["steps"]),
        (["solver=newton", "solver=shooting"], ["solver"]),
    ],
)
def test_the_real_configs_differ_in_what_was_typed(tmp_path, choices, keys):
    with initialize_config_module("experiments.conf", version_base="1.3"):
        for i, typed in enumerate(choices):
            cfg = compose("train", typed.split())
            make_run(tmp_path / str(i), OmegaConf.to_container(cfg, resolve=True))
    assert run_sets.differing_keys(run_sets.read_all(str(tmp_path))[0]) == keys


def test_data_splits_differ_but_copies_of_the_seed_do_not(tmp_path):
    for seed in range(2):
        make_run(tmp_path / f"{seed}", config(seed=seed, data={"seed": 7}, task={"seed": seed}))
    assert run_sets.differing_keys(run_sets.read_all(str(tmp_path))[0]) == []
    make_run(tmp_path / "2", config(data={"seed": 8}, task={"seed": 0}))
    assert run_sets.differing_keys(run_sets.read_all(str(tmp_path))[0]) == ["data.seed"]


def test_a_value_tuned_for_each_method_is_a_difference_of_its_own(tmp_path):
    make_run(tmp_path / "a", config(optim__learning_rate=0.2))
    make_run(tmp_path / "b", config(cell=LSTM, optim__learning_rate=0.4))
    runs, _ = run_sets.read_all(str(tmp_path))
    assert run_sets.differing_keys(runs) == ["cell", "optim.learning_rate"]


def test_runs_that_differ_in_seeds_alone_belong_together(sweep):
    runs = read(sweep)
    groups = run_sets.group(runs, run_sets.differing_keys(runs))
    assert {label: len(members) for label, members in groups.items()} == {
        "mixer=attention, optim.learning_rate=0.3": 3,
        "mixer=recurrent, mixer.cell=para_gru, optim.learning_rate=0.1": 3,
        "mixer=recurrent, mixer.cell=para_lstm, optim.learning_rate=0.1": 3,
    }


def test_groups_are_in_the_order_of_numbers(tmp_path):
    for width in (16, 8, 128):
        make_run(tmp_path / f"{width}", config(model__width=width))
    groups = run_sets.group(run_sets.read_all(str(tmp_path))[0], ["model.width"])
    assert list(groups) == ["model.width=8", "model.width=16", "model.width=128"]


def test_a_curve_is_the_mean_and_its_band_the_lowest_and_highest_run(sweep):
    runs = [run for run in read(sweep) if run.config["mixer"] == "attention"]
    curve = curves.make_curve(runs, "tokens", Y)
    np.testing.assert_array_equal(curve.x, [0, 10, 20, 30, 40])
    base = 8 / (1 + np.arange(5))
    np.testing.assert_allclose(curve.mean, base + 0.1)
    np.testing.assert_allclose(curve.low, base)
    np.testing.assert_allclose(curve.high, base + 0.2)
    assert curve.runs == 3


def test_a_figure_names_its_axes_with_units_its_groups_and_its_band(sweep):
    runs = read(sweep)
    groups = run_sets.group(runs, ["mixer"])
    lines = {label: curves.make_curve(g, "tokens", Y) for label, g in groups.items()}
    figure = curves.draw(lines, x="tokens", y=Y, title="t", log_y=True)
    [axes] = figure.axes
    assert axes.get_xlabel() == "training tokens" and axes.get_title() == "t"
    assert axes.get_ylabel() == "validation (bits per byte)" and axes.get_yscale() == "log"
    legend = axes.get_legend()
    assert legend.get_title().get_text() == "mean; band: lowest to highest run"
    assert [t.get_text() for t in legend.get_texts()] == [
        "mixer=attention (n=3)",
        "mixer=recurrent (n=6)",
    ]
    assert len({to_hex(line.get_color()) for line in axes.lines}) == 2
    assert len(axes.collections) == 2


def test_plot_writes_a_picture_and_its_numbers_and_says_what_it_left_out(sweep, capsys):
    assert call(plot, sweep, "runs=multirun/lm", "x=step", "group_by=mixer") == 0
    said = capsys.readouterr().out
    assert re.search(r"left out: multirun/lm/9 has no metrics.csv", said)
    assert f"plots/{Y}-by-step.png" in said and "9 runs" in said
    pixels = matplotlib.image.imread(sweep / "plots" / f"{Y}-by-step.png")
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20
    with (sweep / "plots" / f"{Y}-by-step.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["group"] for row in rows} == {"mixer=attention", "mixer=recurrent"}
    assert [float(row["step"]) for row in rows] == [0, 1, 2, 3, 4] * 2
    assert float(rows[-1][f"{Y}_highest"]) == pytest.approx(1.8)
    assert {path.name for path in sweep.iterdir()} == {"multirun", "plots"}


@pytest.mark.parametrize("suffix, head", [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_suffix_picks_the_format(sweep, tmp_path, suffix, head):
    target = tmp_path / f"figure.{suffix}"
    runs = f"runs=[{sweep}/multirun/lm/0,{sweep}/multirun/lm/1]"
    assert call(plot, tmp_path, runs, f"output={target}") == 0
    assert target.read_bytes().startswith(head) and target.with_suffix(".csv").exists()


def test_compare_tells_what_differs_and_what_came_of_it(tmp_path):
    rows = [
        {"step": step, "seconds": 60.0 * step, Y: value, "memory_bytes": 1e6}
        for step, value in enumerate([3.0, 1.0, 2.0])
    ]
    done = {"seconds": 90, "tokens_per_second": 5e4, "parameters": 700, "status": "finished"}
    known = {"git_commit": "0123456789", "git_dirty": True}
    make_run(tmp_path / "a", config(), rows, summary=done, environment=known)
    make_run(tmp_path / "b", config(cell=LSTM, seed=1), rows[:2])
    make_run(tmp_path / "c", config(), rows, summary={**done, "status": "diverged"})
    table = compare.tabulate(run_sets.read_all(str(tmp_path))[0])
    assert table.header == ["run", "cell", "seed", *compare.RESULTS]
    first, second, third = table.rows
    assert first == ["a", "para_gru", 0, 2, 2, 1, 5e4, 700, 1e6, 1.5, "finished", "01234567*"]
    assert second == ["b", "para_lstm", 1, 1, 1, 1, None, None, 1e6, 1.0, "unfinished", None]
    assert third[-2] == "diverged"


def test_best_is_the_highest_accuracy_and_the_lowest_loss(tmp_path):
    rows = [{"step": s, "accuracy": v, "loss": v} for s, v in enumerate([0.2, 0.9, 0.5])]
    runs, _ = run_sets.read_all(str(make_run(tmp_path / "a", config(), rows)))

    def best(**settings):
        return compare.tabulate(runs, columns=["best"], **settings).rows[0][1]

    assert best() == 0.9 and best(metric="loss") == 0.2
    assert best(metric="loss", better="max") == 0.9


def test_a_table_is_sorted_by_any_column_with_missing_values_last(sweep):
    runs = read(sweep)

    def order(sort):
        return [row[1] for row in compare.tabulate(runs, columns=["mixer.heads"], sort=sort).rows]

    assert order("mixer.heads") == order("-mixer.heads") == [4] * 3 + [None] * 6
    names = [row[0] for row in compare.tabulate(runs, columns=["seed"], sort="-seed").rows]
    assert names[:3] == ["2", "5", "8"]
    last = compare.tabulate(runs, columns=["seed"], sort="final").rows
    assert [row[1] for row in last] == [0] * 3 + [1] * 3 + [2] * 3


def test_compare_prints_and_writes_the_table(sweep, tmp_path, capsys):
    arguments = [f"runs={sweep}/multirun/lm", "columns=[mixer,final]", "sort=-run"]
    assert call(compare, tmp_path, *arguments, "output=t.md") == 0
    said = capsys.readouterr().out
    assert f"9 runs; final and best (lowest) {Y}" in said and "attention" in said
    text = (tmp_path / "t.md").read_text()
    assert "| run | mixer | final |\n| --- | --- | --- |\n| 8 | attention | 1.8 |\n" in text
    assert call(compare, tmp_path, *arguments, "output=t.csv") == 0
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and float(rows[0][f"final_{Y}"]) == pytest.approx(1.8)


@pytest.mark.parametrize(
    "program, arguments, message",
    [
        (plot, [], "error: give runs=FOLDER"),
        (plot, ["runs=gone/*"], r"error: runs: 'gone/\*': no such folder \(looked in "),
        (plot, ["runs={empty}"], r"error: runs: '.*': no config.yaml in or below it"),
        (plot, ["runs={sweep}/multirun/lm/9"], "no run with numbers:\n .*/9 has no metrics.csv"),
        (plot, ["runs={blank}"], "metrics.csv is empty: the run measured nothing"),
        (plot, ["runs={sweep}", "y=los"], f"no column y='los'; choose from step, tokens, {Y}"),
        (plot, ["runs={sweep}", "x=name"], "x='name' is neither a column nor a number in"),
        (plot, ["runs={sweep}", "group_by=mixr"], "no run's config has the key 'mixr'; .* mixer"),
        (plot, ["runs={sweep}", "output=a.gif"], "output='a.gif': give a file that ends in .png"),
        (compare, [], "error: give runs=FOLDER"),
        (compare, ["runs={sweep}", "metric=los"], "metric='los': no run has that column; choose"),
        (compare, ["runs={sweep}", "sort=speed"], "no run has 'speed'; results are steps_done, "),
        (compare, ["runs={sweep}", "better=big"], "better='big': expected one of min, max"),
        (compare, ["runs={sweep}", "output=a.txt"], "give a file that ends in .csv or .md"),
    ],
)
def test_what_does_not_fit_is_said(sweep, tmp_path, capsys, program, arguments, message):
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "blank", config(), [])
    names = {"sweep": sweep, "empty": tmp_path / "empty", "blank": tmp_path / "blank"}
    assert call(program, tmp_path, *(a.format(**names) for a in arguments)) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("program", ["compare", "plot"])
def test_a_folder_with_spaces_and_brackets_is_given_as_it_is_called(tmp_path, program):
    folder = make_run(tmp_path / "a b [x]", config())
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{program}", f"runs={folder}", "output=x.nothing"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert "output='x.nothing': give a file that ends in" in done.stderr


def test_many_differing_keys_cost_in_proportion(tmp_path):
    def calls(count):
        def counted(*_):
            nonlocal total
            total += 1

        for seed in (1, 2):
            extra = {f"k{i}": i * 7 + seed * (i + 1) for i in range(count)}
            extra |= {f"copy{i}": f"{seed}" for i in range(count)}  # follows from the first
            make_run(tmp_path / f"{count}/{seed}", config(**extra))
        runs, _ = run_sets.read_all(str(tmp_path / str(count)))
        total = 0
        sys.setprofile(counted)
        try:
            compare.tabulate(runs)
        finally:
            sys.setprofile(None)
        return total

    assert calls(200) < 2.5 * calls(100)
