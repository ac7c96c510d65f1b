"""Settings are refused before anything is built, by one table; a refused command leaves nothing."""

import copy
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from experiments import (
    bench,
    compare,
    evaluate,
    export_adapters,
    finetune,
    fit_choice,
    generate,
    plot,
    step_time,
    train,
    train_tokenizer,
)
from experiments.run import checks, limits, memory
from experiments.run.folders import RunError
from experiments.run.task import Task
from experiments.shell.explanations import explain, typed_key
from experiments.studies import finetune_figure, mixers, solver_study, state_tracking_figure
from jaxpara.train import init_state, make_step
from jaxpara.types import Model
from tests.experiments.programs import call, ending

CONF = Path(limits.__file__).parents[1] / "conf"
RUNS = (evaluate, export_adapters, finetune, generate, train, train_tokenizer)
TIMED = (bench, compare, fit_choice, plot, step_time)
STUDIES = (finetune_figure, mixers, solver_study, state_tracking_figure)
COMMANDS = {program.__name__.split(".")[-1]: program for program in RUNS + TIMED + STUDIES}
WRONG = [
    ("train", "steps=1.5", "steps=2"),
    ("train", "steps=0", "steps=1"),
    ("train", "steps=many", "steps=1"),
    ("train", "steps=true", "steps=1"),
    ("train", "steps=null", "steps=1"),
    ("train", "batch_size=-8", "batch_size=1"),
    ("train", "batch_size=99999999999", "batch_size=2147483647"),
    ("train", "seed=-1", "seed=0"),
    ("train", "seed=4294967296", "seed=4294967295"),
    ("train", "profile=1", "profile=true"),
    ("train", "profile=yes_please", "profile=false"),
    ("train", "optim.learning_rate=-0.01", "optim.learning_rate=0.001"),
    ("train", "optim.learning_rate=nan", "optim.learning_rate=0.001"),
    ("train", "optim.learning_rate=inf", "optim.learning_rate=0.001"),
    ("train", "optim.learning_rate=fast", "optim.learning_rate=0.001"),
    ("train", "optim.warmup=2", "optim.warmup=1"),
    ("train", "optim.b1=-0.1", "optim.b1=0.1"),
    ("train", "optim.b1=1", "optim.b1=0.5"),
    ("train", "optim.b2=1.0", "optim.b2=0.5"),
    ("train", "data.root=''", "data.root=TEXT"),
    ("train", "+data.path=''", "data.path=TEXT"),
    ("plot", "runs=''", "runs=TEXT"),
    ("mixers", "runs=[runs,'']", "runs=TEXT"),
    ("train", "model.width=0", "model.width=1"),
    ("train", "model.layers=[1,2]", "model.layers=1"),
    ("train", "model.compute_dtype=bfloat61", "model.compute_dtype=bfloat16"),
    ("train", "data.validation_fraction=1", "data.validation_fraction=0.5"),
    ("train", "data.prefetch=-2", "data.prefetch=0"),
    ("train", "checkpoint.keep_last=0", "checkpoint.keep_last=1"),
    ("train", "checkpoint.keep_last={_target_: os.system}", "checkpoint.keep_last=1"),
    ("train", "peak_flops={_target_: os.system}", "peak_flops=0.5"),
    ("train", "name={_target_: os.system}", "name=TEXT"),
    ("train", "trace.start=0", "trace.start=1"),
    ("train", "evaluation.windows=null", "evaluation.windows=1"),
    ("train", "sample.top_k=0", "sample.top_k=1"),
    ("train", "+mixer.scale=-2", "mixer.scale=2"),
    ("finetune", "rank=0.5", "rank=1"),
    ("finetune", "bits=33", "bits=32"),
    ("finetune", "learning_rate=0", "learning_rate=0.001"),
    ("generate", "temperature=-1", "temperature=1"),
    ("generate", "samples=two", "samples=1"),
    ("generate", "block=0", "block=1"),
    ("evaluate", "windows=1.5", "windows=2"),
    ("evaluate", "batch_size=0", "batch_size=1"),
    ("bench", "rounds=2", "rounds=3"),
    ("bench", "budget_s=-1", "budget_s=1"),
    ("bench", "suite.shapes=[[1,2,0]]", "suite.shapes=[[128,1,32]]"),
    ("plot", "log_x=maybe", "log_x=false"),
    ("compare", "better=mn", "better=min"),
    ("mixers", "prompt=none", "prompt=1"),
    ("train", "evaluation=3", "evaluation.KEY=VALUE, as --cfg job shows them"),
    ("train", "checkpoint=null", "checkpoint.KEY=VALUE, as --cfg job shows them"),
    ("train", "data.only=asyncio", "data.only=[asyncio]"),
    ("compare", "columns=final", "columns=[final]"),
    ("plot", "group_by=true", "group_by=TEXT"),
    ("bench", "suite.rivals=deer", "suite.rivals=[deer]"),
    ("solver_study", "seeds=[0,-1]", "seeds=[0,0]"),
    ("solver_study", "test_lengths=[]", "test_lengths=[1]"),
    ("solver_study", "tols=[0.0]", "tols=[0.5]"),
    ("train_tokenizer", "vocab_size=256", "vocab_size=257"),
    ("fit_choice", "rounds=none", "rounds=3"),
]


@functools.cache
def shipped(command):
    return composed(command)


@pytest.mark.parametrize("command, override, instead", WRONG)
def test_a_wrong_setting_is_refused_with_one_that_fits(command, override, instead):
    cfg = copy.deepcopy(shipped(command))
    key, _, typed = override.lstrip("+").partition("=")
    value = OverridesParser.create().parse_override(f"x={typed}").value()
    OmegaConf.update(cfg, key, value, force_add=True)
    with pytest.raises(RunError) as raised:
        checks.check_settings(cfg, command)
    said = str(raised.value)
    assert said.startswith(f"{key}=") and said.count("\n") == 1
    assert said.endswith(f"type for example {instead}"), said


FIRST = {command: override for command, override, _ in reversed(WRONG)}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_refuses_in_three_lines_and_leaves_nothing(tmp_path, command):
    said = ending(COMMANDS[command], tmp_path, FIRST.get(command, "outptu=x"))
    assert isinstance(said, str) and said.startswith("error: ") and said.count("\n") <= 2, said
    assert list(tmp_path.iterdir()) == []  # no folder, no record


def composed(command, *overrides):
    with initialize_config_module("experiments.conf", version_base="1.3"):
        return compose(command, overrides=list(overrides))


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_what_is_shipped_passes_and_every_setting_has_a_rule(command):
    cfg = shipped(command)
    checks.check_settings(cfg, command)
    free = {"names", "stop"}
    free |= {key for key, _ in checks.settings_of(cfg) if key.startswith("grid.")}
    for key, _ in checks.settings_of(cfg):
        named = key in free or key.endswith((".path", ".derivative", "_args_"))
        assert named or limits.rule_for(key, command), f"{key} of {command} has no rule"


@pytest.mark.parametrize(
    "group",
    [
        "mixer",
        "optim",
        "task",
        "solver",
        "projection",
        "data",
        "cell",
        "transform",
        "model",
        "suite",
    ],
)
def test_every_member_of_every_group_passes(group):
    command = "finetune" if group == "transform" else "train"
    for path in sorted((CONF / group).rglob("*.yaml")):
        checks.check_settings(OmegaConf.create({group: OmegaConf.load(path)}), command)


def test_a_setting_of_a_transform_is_not_the_section_of_its_name():
    checks.check_settings(composed("finetune", "transform=[lora,fake_quant]"), "finetune")
    wrong = composed("finetune", "transform=[fake_quant]", "transform.fake_quant.rounding=up")
    with pytest.raises(RunError, match="expected one of nearest, stochastic"):
        checks.check_settings(wrong, "finetune")
    with pytest.raises(RunError, match="rounding=3: expected a group of settings"):
        checks.check_settings(composed("finetune", "rounding=3"), "finetune")


def test_a_rounding_is_a_word_in_a_transform_and_a_section_of_finetune():
    found = OmegaConf.create({"transform": {"fake_quant": {"rounding": "down"}}})
    with pytest.raises(RunError, match=r"rounding='down': expected one of nearest, stochastic"):
        checks.check_settings(found, "finetune")
    with pytest.raises(RunError, match="rounding='nearest': expected a group of settings"):
        checks.check_settings(OmegaConf.create({"rounding": "nearest"}), "finetune")


def test_suggested_values_fit_their_rules():
    for name, rule in limits.RULES.items():
        for value in (-1, 0, 1.5, 1e40, math.nan, True, "x", [], ["x"], None):
            if not checks.fits(value, rule) and rule.kind in ("whole", "number"):
                typed = OmegaConf.create(f"x: {checks.instead(value, rule)}")
                plain = OmegaConf.to_container(typed)["x"]
                assert checks.fits(plain, rule), (name, value, plain)


def test_objects_of_others_are_theirs_to_judge():
    theirs = OmegaConf.create({"task": {"_target_": "mine.task", "width": -1, "group": "abc"}})
    checks.check_settings(theirs)
    ours = OmegaConf.create({"task": {"_target_": "jaxpara.nn.decoder", "width": -1}})
    with pytest.raises(RunError, match="task.width=-1"):
        checks.check_settings(ours)


def test_keys_are_named_as_they_are_typed():
    cfg = composed("train")
    assert typed_key(cfg, "task.models.model.mixer.cell") == "cell"
    assert typed_key(cfg, "task.data") == "data" and typed_key(cfg, "optim") == "optim"


def test_a_number_is_text_where_text_is_expected():
    cfg = OmegaConf.create({"runs": [2024, "a"], "title": 7, "group_by": 3, "x": "tokens"})
    checks.check_settings(cfg, "plot")
    assert cfg == {"runs": ["2024", "a"], "title": "7", "group_by": "3", "x": "tokens"}


def test_the_traceback_is_there_for_who_asks(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(RunError, match="steps=1.5"):
        call(train, tmp_path, "steps=1.5")
    assert explain(ZeroDivisionError("a bug")) is None  # a bug keeps its traceback


def test_an_existing_folder_keeps_what_is_in_it(tmp_path):
    own = tmp_path / "mine"
    own.mkdir()
    (own / "notes.txt").write_text("kept")
    assert "steps=0" in ending(train, tmp_path, "steps=0", f"hydra.run.dir={own}")
    assert [path.name for path in own.iterdir()] == ["notes.txt"]
    (own / "config.yaml").write_text("name: a run\n")
    (own / ".hydra").mkdir()
    (own / ".hydra" / "overrides.yaml").write_text("- how it was begun\n")
    assert ending(train, tmp_path, "steps=0", f"hydra.run.dir={own}")
    assert "begun" in (own / ".hydra" / "overrides.yaml").read_text()


def test_a_refused_job_of_a_sweep_leaves_no_folder_and_is_reported(tmp_path, capsys):
    assert call(train, tmp_path, "-m", "steps=0,1.5") == 1
    printed = capsys.readouterr().out
    assert printed.count("│ refused") == 2 and "job 1: steps=1.5: expected a whole" in printed
    assert "2 of 2 jobs are refused: change the settings" in printed
    assert "repeat the command" not in printed, "it would refuse them again"
    [sweep] = tmp_path.glob("multirun/lm/*")
    assert [path.name for path in sweep.iterdir()] == ["multirun.yaml"]


# -- memory


def linear_task(width, rows):
    """A model whose step is counted by hand: one matrix, squared errors."""

    def init(key):
        return {"kernel": jax.random.normal(key, (width, width))}

    def loss(params, batch, key):
        del key
        value = jnp.mean(jnp.square(jnp.sin(batch @ params["kernel"])))
        return value, {"loss": value}

    nothing = dict.fromkeys(
        ("batches", "tokens_per_step", "columns", "evaluate", "best", "describe", "finish")
    )
    like = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    model = Model(init, lambda params, x: x @ params["kernel"])
    return Task(model=model, loss=loss, about="", batch_like=like, **nothing)


def test_the_estimate_is_the_count_by_hand():
    task = linear_task(8, 100)
    found = memory.estimate(task, optax.adam(1e-3), accumulate=1)
    assert found.parameters == found.gradients == 4 * 64
    assert found.optimiser == 2 * 4 * 64 + 4  # two moments and a count
    assert found.batch == 4 * 800
    # the input, the cosine of the product, the sine that is squared
    assert 3 * 3200 <= found.activations + found.parameters <= 3 * 3200 + 4 * 64 + 64
    parts = memory.estimate(task, optax.adam(1e-3), accumulate=4)
    assert parts.batch == found.batch and parts.activations < found.activations / 3


def test_gradients_are_counted_of_what_is_trained_whatever_the_optimiser():
    params = {"kernel": jnp.zeros((8, 8)), "frozen": jnp.zeros((8, 8))}
    task = linear_task(8, 100)
    task = task._replace(
        model=task.model._replace(init=lambda key: params),
        trainable=lambda params: {"kernel": True, "frozen": False},
    )
    for optimizer in (optax.sgd(0.1), optax.adam(0.1)):
        found = memory.estimate(task, optimizer, accumulate=1)
        assert (found.parameters, found.gradients) == (2 * 4 * 64, 4 * 64)


def test_the_estimate_is_near_what_xla_accounts_for():
    task = linear_task(64, 50_000)
    optimizer = optax.adam(1e-3)
    state = jax.eval_shape(lambda: init_state(task.model, optimizer, jax.random.key(0)))
    step = jax.jit(make_step(task.loss, optimizer), donate_argnums=0)
    account = step.lower(state, task.batch_like).compile().memory_analysis()
    held = account.argument_size_in_bytes + account.temp_size_in_bytes
    assert 0.5 < sum(memory.estimate(task, optimizer, accumulate=1)) / held < 2.5


def test_a_step_beyond_the_memory_is_refused_with_the_numbers():
    task, optimizer = linear_task(8, 100), optax.sgd(0.1)
    needed = sum(memory.estimate(task, optimizer, accumulate=1))
    memory.check_step(task, optimizer, accumulate=1, have=lambda: needed)
    with pytest.raises(RunError, match=r"batch_size=100: .* KiB \(parameters 256 B.*\n.*=\d+ or"):
        memory.check_step(task, optimizer, accumulate=1, have=lambda: needed - 1)
    with pytest.raises(RunError, match="give a smaller model"):
        memory.check_step(task, optimizer, accumulate=1, have=lambda: 300)


def test_a_huge_batch_is_refused_by_the_command(tmp_path):
    said = ending(train, tmp_path, "experiment=state_tracking", "batch_size=100000000")
    assert said.startswith("error: batch_size=100000000: a training step needs about")
    assert "activations" in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    said = ending(train, tmp_path, "experiment=state_tracking", "task.test_sequences=2000000000")
    assert "task.test_sequences=2000000000 of 256 tokens need" in said


def test_names_to_export_that_are_no_table_are_refused_with_one(tmp_path):
    said = ending(export_adapters, tmp_path, "run=x", "names=3")
    assert said.startswith("error: names=3: expected") and "type for example" in said


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_folder_that_a_command_would_not_use_is_refused(tmp_path, capfd, name):
    """One run's folder: in a sweep, or by a command that makes none."""
    sweep = ["-m", "seed=0,1"] if name in ("bench", "finetune", "solver_study", "train") else []
    assert call(COMMANDS[name], tmp_path, *sweep, "hydra.run.dir=new") == 1
    said = capfd.readouterr().err
    assert "hydra.run.dir=new are for one run" in said if sweep else "makes no folder" in said
    assert said.count("\n") <= 3
    assert list(tmp_path.iterdir()) == []


OF_SWEEPS = ["hydra.sweep.dir=s", "hydra/sweeper=basic", "hydra.sweep={dir: s}"]
OF_SWEEPS += ["hydra={sweep: {dir: s}}", "hydra.sweeper={max_batch_size: 1}"]


@pytest.mark.parametrize("name", sorted(COMMANDS))
@pytest.mark.parametrize("given", OF_SWEEPS)
def test_settings_of_a_sweep_need_one(tmp_path, capfd, name, given):
    assert call(COMMANDS[name], tmp_path, given) == 1
    assert f"error: {given} is for a sweep, and this is one run: add -m" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", ["hydra.run={dir: new}", "hydra={run: {dir: new}}"])
def test_a_folder_in_a_mapping_is_one_too(tmp_path, capfd, given):
    assert call(plot, tmp_path, given) == 1
    assert "hydra.run.dir=new: this command makes no folder" in capfd.readouterr().err
    assert call(train, tmp_path, "-m", "seed=0,1", given) == 1
    assert "hydra.run.dir=new are for one run" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_users_own_object_may_use_the_names_of_ours():
    for node in (
        {"mixer": {"_target_": "mine.mixer", "cell": {"hidden": 3}, "solver": {"k": 1}}},
        {"data": {"_target_": "mine.data", "sampler": {"a": 1}}},
    ):
        checks.check_settings(OmegaConf.create(node))
    ours = {"mixer": {"_target_": "jaxpara.nn.mixers.recurrent", "cell": {"hidden": 3}}}
    with pytest.raises(RunError, match="mixer.cell=.*expected an object"):
        checks.check_settings(OmegaConf.create(ours))
