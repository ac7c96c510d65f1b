"""The commands, end to end on tiny runs: every config builds, a run's folder is complete."""

import json
import re
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from experiments import evaluate, generate, train
from experiments.run import checkpoints, folders, metrics
from experiments.run.trainer import metric_columns
from experiments.shell.build import build, build_model, make
from experiments.shell.overrides import replaced
from experiments.text.language_model import SOLVER_COLUMNS
from tests.experiments.programs import call

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "experiments" / "conf"
GROUPS = ("cell", "mixer", "model", "optim", "projection", "solver", "solver@parallel")
TINY = (
    "steps=6 model.width=8 model.layers=1 batch_size=2 window=16 log_every=2 eval_every=3 "
    "evaluation.windows=6 evaluation.length=16 evaluation.batch_size=4 check.batch_size=2 "
    "check.length=16 sample.length=8"
).split()


def members(group):
    return sorted(path.stem for path in (CONF / group.partition("@")[0]).glob("*.yaml"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    """One finished tiny run: where it was started, and its folder."""
    place = tmp_path_factory.mktemp("place")
    assert call(train, place, "experiment=lm", f"data.root={text}", *TINY) == 0
    [folder] = (place / "runs" / "lm").iterdir()
    return place, folder


def composed(text, *overrides, program="train"):
    needed = ["from=null", "data.only=[]"] if program == "finetune" else []
    with initialize_config_module("experiments.conf", version_base="1.3"):
        return compose(program, [*overrides, *needed, f"data.root={text}"])


def program_of(group, name):
    """The command at the head of a config says whose it is."""
    head = (CONF / group / f"{name}.yaml").read_text()
    return re.search(r"# python -m experiments\.(train|finetune)\b", head)[1]


@pytest.mark.parametrize("choice", [f"{g}={m}" for g in GROUPS for m in members(g)])
def test_every_member_of_every_group_builds(choice, text):
    cfg = composed(text, choice)
    parts, models = build(cfg), make(cfg.task.models)
    for model in (parts.task.model, models.model, models.sequential, models.parallel):
        assert jax.eval_shape(model.init, jax.random.key(0))
    assert (models.observed is None) == choice.endswith("attention")
    assert set(parts.task.tables) == (set() if models.observed is None else {"solver"})
    if choice.startswith("solver@parallel"):
        assert choice.endswith(f"={models.parallel_name}")


@pytest.mark.parametrize("name", members("experiment"))
def test_every_experiment_builds(name, text):
    cfg = composed(text, f"experiment={name}", program=program_of("experiment", name))
    assert build(cfg).task.about and cfg.name == name


@pytest.mark.slow
@pytest.mark.parametrize("name", members("sweep"))
def test_every_value_of_every_sweep_composes(name, text):
    swept = yaml.safe_load((CONF / "sweep" / f"{name}.yaml").read_text())["hydra"]
    assert swept["mode"] == "MULTIRUN"
    for key, values in swept["sweeper"]["params"].items():
        override = OverridesParser.create().parse_override(f"{key}={values}")
        if override.is_discrete_sweep():
            chosen = list(override.sweep_string_iterator())
        else:
            interval = override.value()
            chosen = [interval.start, interval.end]
        for value in chosen:
            assert composed(text, f"{key}={value}", program=program_of("sweep", name))


def test_the_default_is_the_experiment_of_the_issue(text):
    parts = build(composed(text))
    params = jax.eval_shape(parts.task.model.init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert 0.65e6 < count < 0.75e6
    assert parts.projection is not None


def test_the_schedule_follows_the_steps(text):
    assert composed(text, "steps=4000").optim.steps == 4000
    assert composed(text).optim.steps == 1500


def test_a_run_leaves_a_complete_folder(finished, text):
    _, folder = finished
    assert {path.name for path in folder.iterdir()} == {
        ".hydra",
        ".lock",
        "checkpoints",
        "config.yaml",
        "env.json",
        "loss.png",
        "metrics.csv",
        "sample.txt",
        "solver.csv",
        "solver.png",
        "summary.json",
    }
    cfg = OmegaConf.load(folder / "config.yaml")
    assert cfg.steps == cfg.optim.steps == 6 and "${" not in (folder / "config.yaml").read_text()
    environment = json.loads((folder / "env.json").read_text())
    assert environment["packages"]["jax"] == jax.__version__
    assert environment["device"] and environment["seconds"] > 0 and "git_dirty" in environment
    assert (folder / "sample.txt").read_text().startswith("def ")


def test_a_run_measures_what_it_says(finished):
    _, folder = finished
    table = metrics.read(folder / "metrics.csv")
    known = metric_columns(build(folders.load_config(folder)).task)
    assert tuple(table) == (*known, "bits_per_token")  # the loss returns it
    trained = [s for s, loss in zip(table["step"], table["train_loss_nats"], strict=True) if loss]
    judged = {
        step: bits
        for step, bits in zip(table["step"], table["validation_bits_per_byte"], strict=True)
        if bits is not None
    }
    assert trained == [2, 4, 6] and list(judged) == [0, 3, 6]
    assert judged[6] < judged[0], "six steps must already help on so repetitive a text"
    assert max(table["tokens"]) == 6 * 2 * 16
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["validation_bits_per_byte"] == judged[6]
    assert set(summary["baselines"]) == {"unigram", "gzip -9", "xz -9e"}


def test_a_run_checks_the_parallel_solver_on_every_layer(finished):
    _, folder = finished
    table = metrics.read(folder / "solver.csv")
    assert tuple(table) == ("step", "tokens", *SOLVER_COLUMNS)
    assert table["step"] == [0, 3, 6] and table["layer"] == [0, 0, 0]
    assert table["converged"] == [1, 1, 1] and table["fallback_steps"] == [0, 0, 0]
    assert min(table["iterations"]) >= 1 and max(table["residual"]) < 1e-4
    sequential, parallel = json.loads((folder / "summary.json").read_text())["solvers"]
    assert sequential["solver"] == "sequential" and parallel["solver"] == "shooting"
    assert parallel["value_difference"] < 1e-4 and parallel["gradient_difference"] < 1e-3
    assert parallel["iterations"] == [table["iterations"][-1]]


@pytest.mark.parametrize("name", ["loss.png", "solver.png"])
def test_figures_are_pictures_of_something(finished, name):
    pixels = matplotlib.image.imread(finished[1] / name)
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20


def test_evaluate_finds_the_figure_of_the_run_again(finished, text, capsys):
    place, folder = finished
    assert call(evaluate, place, f"run={folder.relative_to(place)}", f"trust={text}") == 0
    bits = json.loads((folder / "summary.json").read_text())["validation_bits_per_byte"]
    shown = capsys.readouterr().out
    assert f"{bits:.3f}" in shown and "6 windows of 16 bytes" in shown and "xz -9e" in shown
    assert {path.name for path in place.iterdir()} == {"runs"}, "evaluate must leave nothing behind"


def test_generate_streams_a_continuation_of_the_prompt(finished, capsys):
    place, folder = finished
    arguments = (f"run={folder}", "prompt='def f(x): '", "length=5", "temperature=0")
    assert call(generate, place, *arguments) == 0
    first = capsys.readouterr().out
    assert first.startswith("def f(x): ") and len(first) > len("def f(x): \n")
    assert call(generate, place, *arguments) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    "program, arguments, message",
    [
        (
            evaluate,
            ["run=gone"],
            r"error: run='gone': no such folder .*the newest here is run=runs/lm/",
        ),
        (generate, [], "error: give run=FOLDER"),
        (
            evaluate,
            ["run={run}", "length=100000", "trust={text}"],
            "error: .*a window of 100000 . 1 tokens does not fit",
        ),
        (generate, ["run={run}", "prompt=''"], "error: the prompt is empty"),
        (generate, ["run={run}", "tempo=1"], "error: tempo: there is no such setting"),
        (train, ["data.root=gone"], r"error: data.root='gone' is not a folder"),
        (train, ["window=99999", "data.root={text}"], "error: a window of 99999 . 1 tokens"),
        (train, ["check.length=99999", "data.root={text}"], "error: held-out text: a window of"),
        (train, [*TINY, "data.root={text}", "accumulate=4"], "accumulate=4 does not divide batch_"),
        (
            train,
            [*replaced(TINY, ["log_every=0"]), "data.root={text}"],
            "error: log_every=0: expected a whole",
        ),
        (
            train,
            [*TINY, "data.root={text}", "sample.top_k=0"],
            "error: sample.top_k=0: expected a w",
        ),
        (train, ["solver=magic"], r"error: solver=magic: no such member; .*shooting"),
        (
            train,
            ["mixer=attention", "mixer.heads=3", "data.root={text}"],
            "error: model.width=128",
        ),
        (train, ["hydra.run.dir={run}", "data.root={text}"], "already holds a run"),
    ],
)
def test_user_errors_are_explained_and_end_with_an_error(
    finished, text, capsys, program, arguments, message
):
    place, folder = finished
    filled = [argument.format(run=folder, text=text) for argument in arguments]
    assert call(program, place, *filled) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_loss_that_is_not_a_number_ends_the_run_and_says_where(tmp_path, text, capsys):
    arguments = (
        f"data.root={text}",
        *replaced(TINY, ["steps=50", "checkpoint.every=1"]),
        "optim.learning_rate=1e30",
    )
    assert call(train, tmp_path, *arguments) == 1
    said = capsys.readouterr().err
    assert re.search(r"error: the \S+ .*is (nan|inf) at step \d+ of 50; the last finite loss", said)
    [folder] = (tmp_path / "runs" / "lm").iterdir()
    assert re.search(rf"The last checkpoint is .*{folder.name}/checkpoints/\d+$", said.strip())
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["diverged"] in said and summary["status"] == "diverged"
    assert metrics.read(folder / "metrics.csv")["step"][0] == 0


@pytest.mark.slow
def test_a_sweep_gives_every_job_a_folder_and_a_seed_repeats_a_run_bit_for_bit(tmp_path, text):
    # A run of its own: that of the other tests may have been compiled in another way.
    assert call(train, tmp_path, "experiment=lm", f"data.root={text}", *TINY) == 0
    [alone] = (tmp_path / "runs" / "lm").iterdir()
    assert call(train, tmp_path, "-m", "seed=0,1", f"data.root={text}", *TINY) == 0
    [sweep] = (tmp_path / "multirun" / "lm").iterdir()
    jobs = sorted(path for path in sweep.iterdir() if path.is_dir())
    assert [folders.load_config(folder).seed for folder in jobs] == [0, 1]
    like = jax.eval_shape(build_model(folders.load_config(jobs[0])).init, jax.random.key(0))
    first, again, other = (
        jax.tree.leaves(checkpoints.load_params(f, like)) for f in (alone, *jobs)
    )
    assert all(map(np.array_equal, first, again))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True) if a.ndim > 2)
