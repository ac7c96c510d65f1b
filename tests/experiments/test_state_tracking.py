"""State tracking: how answers are scored, the task and its configs, what is solved and what not."""

import csv
import itertools
import json
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from jax import lax

import jaxpara as jp
from experiments import train
from experiments.run import metrics
from experiments.run.folders import RunError
from experiments.shell.build import build
from experiments.studies import solver_study, state_tracking_figure, study_figure
from experiments.studies.solver_study import Setting, Way
from experiments.studies.unfinished import unfinished_newton, unfinished_shooting
from experiments.sweep.run_sets import read_all
from experiments.tasks.answers import answer_loss, first_answers, judge, last_answers, share
from experiments.tasks.problem import Examples
from experiments.tasks.recall import recall
from experiments.tasks.state_tracking import state_tracking
from experiments.tasks.words import parity
from jaxpara.types import Model
from tests.experiments.programs import ending
from tests.experiments.run_folders import make_run

CONF = Path(__file__).resolve().parents[2] / "experiments" / "conf"
OF_TEXT = ("language_model", "finetune")
TASKS = sorted(path.stem for path in (CONF / "task").glob("*.yaml") if path.stem not in OF_TEXT)
MIXERS = sorted(path.stem for path in (CONF / "mixer" / "tracking").glob("*.yaml"))
MASK = np.array([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)


def composed(*overrides):
    with initialize_config_module("experiments.conf", version_base="1.3"):
        return compose("train", ["experiment=state_tracking", *overrides])


@pytest.fixture(scope="module")
def logits_are_parameters():
    """A "model" whose logits are its parameters: what is scored is then known."""
    return Model(None, lambda params, tokens: params)


def test_last_answers_are_the_last_of_each_sequence():
    assert last_answers(MASK).tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    hit = np.array([[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]], bool)
    assert share(hit, MASK) == 2 / 6 and share(hit, last_answers(MASK)) == 1
    assert np.isnan(share(hit, np.zeros_like(MASK)))


def test_loss_is_the_mean_over_answers_alone(logits_are_parameters):
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(3, 4, 5)), rng.integers(5, size=(3, 4))
    batch = Examples(np.zeros((3, 4), np.int32), targets, MASK)
    loss = answer_loss(logits_are_parameters)
    value, shown = loss(jnp.asarray(logits, jnp.float32), batch, None)
    nats, right = [], []
    for i, t in np.argwhere(MASK):
        p = np.exp(logits[i, t]) / np.exp(logits[i, t]).sum()
        nats.append(-np.log(p[targets[i, t]]))
        right.append(p.argmax() == targets[i, t])
    assert value == pytest.approx(np.mean(nats), rel=1e-5)
    assert shown["accuracy"] == pytest.approx(np.mean(right))
    gradient = jax.grad(lambda p: loss(p, batch, None)[0])(jnp.asarray(logits, jnp.float32))
    assert np.array_equal(np.abs(gradient).sum(-1) > 0, MASK)


def test_a_batch_without_answers_has_loss_zero(logits_are_parameters):
    batch = Examples(*np.zeros((2, 2, 3), np.int32), np.zeros((2, 3), bool))
    assert answer_loss(logits_are_parameters)(jnp.ones((2, 3, 4)), batch, None)[0] == 0


def test_judging_counts_every_position_of_every_held_out_sequence():
    problem = recall(pairs=2, keys=4, values=3)
    # Knows the answer to every second query: half of it is right, and so is the last one.
    seen = {}

    def apply(params, tokens):
        del params
        _, targets, _ = seen[tokens.shape[1]]
        known = jnp.where(jnp.arange(tokens.shape[1]) % 2, targets[: len(tokens)], 0)
        return jax.nn.one_hot(known, 7)

    from experiments.tasks.answers import _JUDGE
    from experiments.tasks.problem import sample

    for length in (8, 12):
        seen[length] = sample(
            problem, seed=_JUDGE, step=0, batch_size=6, length=length, held_out=True
        )
    [short, long] = judge(Model(None, apply), problem, lengths=[8, 12], sequences=6)(None)
    assert short.figures() == {"accuracy_8": 0.5, "last_8": 1}
    assert long.figures() == {"accuracy_12": 0.5, "last_12": 1}
    assert np.array_equal(short.by_position(), [np.nan] * 4 + [0, 1, 0, 1], equal_nan=True)


def test_a_curriculum_hides_the_later_answers_and_nothing_else():
    examples = Examples(*np.arange(24).reshape(2, 3, 4), MASK)
    shorter = first_answers(examples, 2)
    assert shorter.mask.tolist() == (MASK & [1, 1, 0, 0]).tolist()
    assert np.array_equal(shorter.tokens, examples.tokens)


def make_task(**changes):
    settings = dict(
        model=Model(None, lambda params, tokens: jax.nn.one_hot(tokens, 2)),
        problem=parity(),
        vocab_size=2,
        seed=0,
        batch_size=4,
        length=10,
        test_lengths=[10, 20],
        test_sequences=5,
    )
    return state_tracking(**settings | changes)


def test_the_task_grows_from_short_answers_to_all_of_them():
    task = make_task(grow_steps=4, grow_from=2)
    counted = [int(next(task.batches).mask.sum()) // 4 for _ in range(6)]
    assert counted == [2, 4, 6, 8, 10, 10]


def test_the_task_continues_from_its_position():
    task, other = make_task(), make_task()
    for _ in range(3):
        next(task.batches)
    other.batches.set_state(json.loads(json.dumps(task.batches.get_state())))
    assert np.array_equal(next(task.batches).tokens, next(other.batches).tokens)


def test_the_task_is_solved_when_nothing_is_wrong_at_any_length():
    task = make_task()
    figures = task.evaluate(0, None)
    assert set(figures) == set(task.columns) == {
        "accuracy_10", "last_10", "accuracy_20", "last_20",
    }  # fmt: skip
    assert 0.3 < figures["accuracy_20"] < 0.7 and not task.solved(figures)
    assert task.solved(dict.fromkeys(figures, 1.0))
    assert not task.solved({**dict.fromkeys(figures, 1.0), "accuracy_20": 0.999})
    assert task.best == ("accuracy_20", "max") and "at T=20" in task.describe(figures)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(vocab_size=1), "task.vocab_size=1: parity has 2 tokens; give task.vocab_size=2"),
        (dict(test_lengths=[]), r"task.test_lengths=\[\].*at least one length"),
        (dict(length=0), "length=0 is too short for parity"),
        (dict(problem=recall(), vocab_size=64, length=16), "length=16 is too short for recall"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_task(**changes)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_builds_with_a_vocabulary_that_fits(name):
    cfg = composed(f"task={name}", "task.test_lengths=[20]", "task.test_sequences=2")
    task = build(cfg).task
    tokens = next(task.batches).tokens
    params = jax.eval_shape(task.model.init, jax.random.key(0))
    logits = jax.eval_shape(task.model.apply, params, tokens)
    assert logits.shape == (64, 32, cfg.task.vocab_size) and tokens.max() < cfg.task.vocab_size


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_builds(name):
    model = build(composed(f"mixer=tracking/{name}", "task.test_lengths=[8]")).task.model
    assert jax.eval_shape(model.init, jax.random.key(0))


def test_the_sweep_names_what_is_there():
    swept = yaml.safe_load((CONF / "sweep" / "state_tracking.yaml").read_text())["hydra"]
    values = {k: str(v).split(",") for k, v in swept["sweeper"]["params"].items()}
    assert {f"tracking/{name}" for name in MIXERS} >= set(values["mixer"])
    assert set(TASKS) >= set(values["task"]) and swept["mode"] == "MULTIRUN"


def test_a_run_solves_parity_stops_and_leaves_its_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = "task.test_lengths=[16,24] task.length=16 model.width=16 batch_size=32 steps=300"
    easy = f"eval_every=25 +mixer.scale=1.5 hydra.run.dir={tmp_path}/run"
    monkeypatch.setattr(
        sys, "argv", ["train", "experiment=state_tracking", *tiny.split(), *easy.split()]
    )
    train.main()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["problem"] == "parity"
    assert summary["accuracy_16"] == summary["last_24"] == 1 and summary["steps"] < 300
    table = metrics.read(tmp_path / "run" / "metrics.csv")
    assert table["accuracy_24"][-1] == 1 and table["accuracy_24"][0] < 0.9
    positions = metrics.read(tmp_path / "run" / "positions.csv")
    assert positions["length"].count(24) == 24 and set(positions["accuracy"]) == {1}
    assert os.path.getsize(tmp_path / "run" / "accuracy.png") > 5000


def accuracies(*overrides):
    """(seed, length) -> accuracy after the experiment's 500 steps, the seeds side by side."""
    cfg = composed(*overrides)
    assert cfg.steps == 500 and cfg.task.length == 32
    setting = Setting(parity(), instantiate(cfg.optim), 500, 64, 32, (32, 128), 128, (0, 1, 2))
    model = instantiate(cfg.model)
    params, _ = solver_study.train(model, setting)
    return {(seed, n): a for seed, n, a, _ in solver_study.judge(model, setting)(params)}


@pytest.mark.slow
def test_a_diagonal_gru_solves_parity_at_every_length_for_three_seeds():
    assert set(accuracies().values()) == {1.0}


@pytest.mark.slow
@pytest.mark.parametrize("control", ["linear", "para_gru_clipped"])
def test_controls_do_not_solve_parity(control):
    found = accuracies(f"mixer=tracking/{control}")
    assert max(found.values()) < 0.9
    assert max(a for (_, length), a in found.items() if length == 128) < 0.65


@pytest.mark.parametrize("make", [unfinished_newton, unfinished_shooting])
def test_an_unfinished_solver_leaves_open_what_the_librarys_would_finish(make):
    xs = jax.random.normal(jax.random.key(0), (64, 4))

    def f(h, x):
        h = jnp.tanh(1.3 * h + x)
        return h, 2 * h

    init = jnp.zeros(4)
    exact = lax.scan(f, init, xs)[1]
    errors = []
    for budget in (2, 64):
        (_, ys), info = jp.solve_scan(f, init, xs, solver=make(max_iters=budget))
        assert info.fallback_steps == 0 and info.iterations <= budget
        assert bool(info.converged) == (budget == 64)
        errors.append(float(jnp.max(jnp.abs(ys - exact))))
    assert errors[0] > 0.01 and errors[1] < 1e-5
    finished = jp.newton_scan(f, init, xs, solver=jp.newton(max_iters=2))[1]
    assert jnp.max(jnp.abs(finished - exact)) < 1e-5
    with pytest.raises(ValueError, match="max_iters=0: give at least 1"):
        make(max_iters=0)


@pytest.mark.slow
def test_the_study_trains_each_way_and_judges_both_ways(tmp_path):
    def model(solver):
        mixer = jp.nn.mixers.recurrent(jp.cells.para_gru, solver=solver)
        return jp.nn.decoder(2, 8, 1, mixer=mixer, conv_taps=1)

    models = {
        Way(): model(jp.sequential()),
        Way("newton", max_iters=1): model(unfinished_newton(max_iters=1)),
    }
    setting = Setting(parity(), optax.adam(1e-2), 5, 8, 16, (16,), 16, (0, 1))
    rows = list(solver_study.study(models, setting, lambda text: None))
    kinds = [("exact", "exact"), ("stopped", "stopped"), ("stopped", "exact"), ("exact", "stopped")]
    assert [(r.trained, r.tested, r.seed) for r in rows] == [(*k, s) for k in kinds for s in (0, 1)]
    exact, stopped = rows[:2], rows[4:6]
    for one, other in zip(exact, stopped, strict=True):
        assert one.train_loss != pytest.approx(other.train_loss, rel=1e-4)
        assert other.max_iters == 1 and one.max_iters is None and one.length == 16


def test_the_study_figure_needs_the_table_of_a_study(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.csv").write_text("")
    for given, said in (
        ([], "error: give the table of one study: python -m experiments.studies.study_figure FOL"),
        (["gone.csv"], r"error: gone.csv cannot be drawn \(No such file or directory\): python"),
        (["."], r"error: \. cannot be drawn \(Is a directory\)"),
        (["other.csv"], r"error: other.csv cannot be drawn \(it is no table of a study\)"),
        (["empty.csv"], r"error: empty.csv cannot be drawn \(it is no table of a study\)"),
    ):
        assert re.match(said, ending(study_figure, tmp_path, *given))
    assert len([*tmp_path.iterdir()]) == 2


def test_the_study_figure_shows_what_the_table_says(tmp_path):
    table = tmp_path / "study.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(solver_study.Row._fields)
        for seed, accuracy in ((0, 0.5), (1, 0.7)):
            writer.writerow(["exact", "exact", "exact", "", "", seed, 32, 1.0, 1.0, 0.1])
            for budget in (1, 4):
                row = ["stopped", "exact", "newton", budget, "", seed, 32, accuracy, 0, 0.1]
                writer.writerow(row)
            writer.writerow(["stopped", "exact", "newton", "", 0.1, seed, 32, 0.9, 0, 0.1])
    left, right = study_figure.draw(table).axes
    [line] = [one for one in left.get_lines() if one.get_label().startswith("newton: trained stop")
              and len(one.get_xdata())]  # fmt: skip
    assert line.get_xydata().tolist() == [[1, 0.6], [4, 0.6]]
    assert left.get_xlabel().startswith("budget") and right.get_xlabel().startswith("tolerance")
    assert left.get_ylabel() == "accuracy (share of answers)"


@pytest.fixture
def tracked(tmp_path):
    """Run folders of two mixers, two problems and two seeds, with invented numbers."""
    for number, (mixer, problem, seed) in enumerate(
        itertools.product(("gru", "linear"), ("parity", "S3"), (0, 1))
    ):
        accuracy = {"gru": 1.0, "linear": 0.5 + 0.1 * seed}[mixer]
        rows = [
            {"step": 0, "tokens": 0, "accuracy_8": 0.1, "accuracy_16": 0.1},
            {"step": 9, "tokens": 9, "accuracy_8": accuracy, "accuracy_16": accuracy / 2},
        ]
        for row in rows:
            row |= {"last_8": 0.3, "last_16": 0.2}
        config = {
            "name": "state_tracking",
            "seed": seed,
            "mixer": {"_target_": mixer},
            "task": {"problem": {"_target_": problem}, "vocab_size": len(problem)},
        }
        summary = {"problem": problem, "steps": 9, "parameters": 5}
        make_run(tmp_path / f"r{number}", config, rows, summary=summary)
    return tmp_path


def test_the_figure_has_a_panel_for_each_problem_and_a_line_for_each_mixer(tracked):
    runs, _ = read_all(str(tracked))
    by_method = state_tracking_figure.methods(runs)
    assert sorted(map(len, by_method.values())) == [4, 4]
    panels = state_tracking_figure.draw(by_method).axes
    assert sorted(axes.get_title() for axes in panels) == ["S3", "parity"]
    for axes in panels:
        drawn = sorted(line.get_ydata().tolist() for line in axes.get_lines())
        assert drawn == [pytest.approx([0.55, 0.275]), [1.0, 0.5]]
        assert axes.get_xlabel() == "length of the test (tokens)"


def test_the_figures_numbers_are_written_beside_it(tracked, monkeypatch, capsys):
    monkeypatch.chdir(tracked)
    monkeypatch.setattr(sys, "argv", ["figure", f"runs={tracked}"])
    state_tracking_figure.main()
    assert "from 8 runs" in capsys.readouterr().out
    with (tracked / "plots" / "state_tracking.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16 and {row["length"] for row in rows} == {"8", "16"}
    assert {float(row["accuracy"]) for row in rows if "gru" in row["method"]} == {1.0, 0.5}
    assert os.path.getsize(tracked / "plots" / "state_tracking.png") > 5000


def test_runs_of_other_tasks_have_no_such_figure(tmp_path):
    make_run(tmp_path / "r", {"seed": 0}, [{"step": 1, "tokens": 1, "train_loss_nats": 1.0}])
    runs, _ = read_all(str(tmp_path))
    with pytest.raises(RunError, match="none of the 1 runs has a column accuracy_N"):
        state_tracking_figure.methods(runs)


def test_the_task_of_the_documentation_works_as_written():
    text = (CONF.parent.parent / "docs/measured/state_tracking.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, re.S)
    [config] = re.findall(r"```yaml\n(.*?)```", text, re.S)
    namespace = {}
    exec(code, namespace)
    chosen = yaml.safe_load(config)
    assert chosen["problem"]["_target_"].startswith("experiments.tasks.")
    task = make_task(problem=namespace["maximum"](values=8), vocab_size=chosen["vocab_size"])
    examples = next(task.batches)
    assert np.array_equal(examples.targets, np.maximum.accumulate(examples.tokens, axis=1))
