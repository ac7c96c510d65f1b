"""Sweeps: folders that a repeated command finds, failures that stay their own, real launchers."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate

from experiments import train
from experiments.sweep import outcomes, sweeps
from experiments.sweep.sweep_folders import digest, job_folder, sweep_first, sweep_name
from tests.experiments import sweep_program
from tests.experiments.programs import ending, statuses, sweep

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "experiments" / "conf"
PROGRAM = Path(sweep_program.__file__)


def needs(plugin):
    there = importlib.util.find_spec("hydra_plugins")
    there = there and importlib.util.find_spec(f"hydra_plugins.{plugin}")
    package = plugin.replace("_", "-")
    return pytest.mark.skipif(not there, reason=f"{package} is not installed: extra sweeps")


def launch(folder, *arguments):
    """Starts the program in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def jobs(folder):
    """What each job's visits were, by the readable part of its folder's name."""
    return {
        path.parent.name.rpartition("-")[0]: path.read_text().split("\n")[:-1]
        for path in folder.rglob("visits")
    }


@pytest.mark.parametrize(
    "overrides, folder",
    [
        (["seed=0,1"], "seed"),
        (["cell=a,b", "optim.learning_rate=0.1,0.2"], "cell+learning_rate"),
        (["solver@parallel=a,b"], "parallel"),
        (["sweep=seeds"], "seeds"),
        (["sweep=seeds", "cell=a,b", "experiment=lm"], "seeds+cell"),
        (["x=interval(0,1)"], "x"),
        (["suite.shapes=[1,2],[3]"], "shapes"),
        (["seed=0"], ""),
        ([], ""),
    ],
)
def test_a_sweep_is_named_by_what_varies(overrides, folder):
    assert sweep_name(overrides)[0] == folder


def test_fixed_overrides_are_part_of_the_name():
    (plain, keys), (fixed, same) = sweep_name(["seed=0,1"]), sweep_name(["seed=0,1", "steps=5"])
    assert keys == same == "seed"
    assert fixed.startswith(f"{plain}-") and fixed != sweep_name(["seed=0,1", "steps=6"])[0]


def test_a_sweep_is_named_by_its_command_line_and_not_by_what_references_give(tmp_path, capfd):
    for value in ("1", "2"):
        code = sweep(tmp_path, "-m", "act=finish,fail", f"x={value}", "name=n${x}")
        assert code == 1 and list(statuses(capfd.readouterr().out)) == ["act=finish", "act=fail"]
    names = {path.parent.name: path for path in tmp_path.glob("multirun/*/*/multirun.yaml")}
    assert set(names) == {f"act-{digest(sorted(['name=n${x}', f'x={v}']), 4)}" for v in "12"}
    assert sweep(tmp_path, "-m", "act=finish", "x=1,2", "+w='a(b'", "name=${w}") == 0


@pytest.mark.parametrize("shown", [("--cfg", "job"), ("--info", "config"), ("--help",)])
def test_a_config_that_is_only_shown_is_no_sweep(tmp_path, capfd, shown):
    assert sweep(tmp_path, "hydra.mode=MULTIRUN", "x=1", *shown) == 0
    assert not list(tmp_path.iterdir())


def test_a_place_that_jobs_would_take_for_a_reference_is_refused(tmp_path, capfd):
    (tmp_path / "p${x}").mkdir()
    for place, given in ((tmp_path, r"hydra.sweep.dir=a\${x}"), (tmp_path / "p${x}", "x=1")):
        assert sweep(place, "-m", "x=1,2" if given != "x=1" else "act=finish,fail", given) == 1
        assert "no sweep has a place with ${" in capfd.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["p${x}"]


def test_several_sweeps_in_one_are_refused(tmp_path, capfd):
    assert ending(train, tmp_path, "-m", "experiment=lm", "sweep=seeds,solvers") == 1
    assert "sweep= takes one sweep" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_flag_comes_first_and_nothing_else_moves():
    assert sweep_first(["a=1", "-m", "b=1,2", "-x"]) == ["-m", "a=1", "b=1,2", "-x"]


@pytest.mark.parametrize(
    "given",
    ["hydra.sweep.dir=p/q", "++hydra.sweep.dir=p/q", "hydra.sweep={dir:p/q}"],
)
def test_a_folder_of_ones_own_is_taken_however_it_is_given(tmp_path, capfd, given):
    assert sweep(tmp_path, "-m", "x=1,2", given) == 0
    assert len(list(tmp_path.glob("p/q/x-*/config.yaml"))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize("place", ["p/${oc.env:NOPE_7}", "p/${nope}", "???", "p/${job_folder:x}"])
def test_a_folder_that_refers_to_nothing_is_a_line(tmp_path, capfd, place):
    assert sweep(tmp_path, "-m", "x=1,2", f"hydra.sweep.dir={place}") == 1
    shown = capfd.readouterr().err
    assert "error: " in shown and "Traceback" not in shown and not list(tmp_path.iterdir())


def folder_of(*overrides, keys=()):
    with initialize_config_module("experiments.conf", version_base="1.3"):
        cfg = compose("train", list(overrides), return_hydra_config=True)
    cfg.hydra.overrides.task = list(overrides)
    return job_folder(*keys, _root_=cfg)


def test_a_jobs_folder_reads_as_its_overrides_and_differs_with_the_whole_config():
    first = folder_of("cell=slstm", "optim.learning_rate=0.01", keys=("cell", "learning_rate"))
    assert re.fullmatch(r"cell-slstm\+learning_rate-0\.01-[0-9a-f]{6}", first)
    same = folder_of("cell=slstm", "optim.learning_rate=0.01", keys=("cell", "learning_rate"))
    other = folder_of(
        "cell=slstm", "optim.learning_rate=0.01", "steps=7", keys=("cell", "learning_rate")
    )
    assert first == same and other != first and other[:-6] == first[:-6]
    assert folder_of("seed=1", "resume=true", keys=("seed",)) == folder_of("seed=1", keys=("seed",))


def test_a_jobs_folder_passes_through_hydra_and_file_systems_whatever_the_values():
    awkward = folder_of("sample.prompt='a/b=c, d'", "seed=3", "data.root=/tmp/x y/../z" + "z" * 200)
    assert re.fullmatch(r"[\w.+-]+", awkward) and len(awkward) < 120
    assert OverridesParser.create().parse_override(f"run=multirun/{awkward}").value()


def test_a_failed_job_does_not_sink_the_sweep_and_is_reported(tmp_path, capfd):
    assert sweep(tmp_path, "-m", "act=fail,bug,finish") == 1
    shown = capfd.readouterr()
    assert statuses(shown.out) == {
        "act=fail": "failed",
        "act=bug": "failed",
        "act=finish": "finished",
    }
    assert "error: act=fail: give act=finish" in shown.err
    assert "job 1: ZeroDivisionError: a bug" in shown.out
    [error] = tmp_path.glob("multirun/toy/act/act-bug-*/error.txt")
    assert "a bug" in error.read_text() and "Traceback" in error.read_text()
    for command in ("compare", "plot"):
        assert f"python -m experiments.{command} runs=multirun/toy/act\n" in shown.out


@pytest.mark.slow
def test_the_same_command_runs_what_is_not_finished_and_nothing_else(tmp_path, capfd):
    arguments = ("-m", "x=1,2", "act=finish,fail,bug")
    assert sweep(tmp_path, *arguments) == 1
    (tmp_path / "mended").touch()
    capfd.readouterr()
    assert sweep(tmp_path, *arguments) == 0
    visits = jobs(tmp_path)
    assert len(visits) == 6
    for name, times in visits.items():
        assert times == (["begins"] if "finish" in name else ["begins", "goes on"])
    found = statuses(capfd.readouterr().out)
    assert found["x=1 act=finish"] == "finished before" and found["x=2 act=bug"] == "finished"
    assert not list(tmp_path.rglob("error.txt"))
    assert sweep(tmp_path, "-m", "x=1,2", "act=finish", "steps=2") == 0
    assert len(list(tmp_path.rglob("visits"))) == 8, "another config is another run"


def test_an_interrupted_job_stops_the_sweep_and_continues_when_repeated(tmp_path, capfd):
    assert sweep(tmp_path, "-m", "act=finish,stop,bug") == 130
    assert set(jobs(tmp_path)) == {"act-finish", "act-stop"}, "what follows must not be begun"
    shown = capfd.readouterr().out
    assert statuses(shown) == {"act=finish": "finished", "act=stop": "no ending"}
    assert "1 of 2 jobs are not finished: repeat the command" in shown
    (tmp_path / "mended").touch()
    assert sweep(tmp_path, "-m", "act=finish,stop,bug") == 0
    assert jobs(tmp_path)["act-stop"] == ["begins", "goes on"]


@pytest.mark.parametrize("behind", [-3600, 3600])
def test_the_clock_of_the_disk_need_not_be_that_of_the_machine(
    tmp_path, capfd, monkeypatch, behind
):
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - behind)
    for expected in ({"x=1": "finished"}, {"x=1": "finished before"}):
        assert sweep(tmp_path, "-m", "x=1", "hydra.sweep.dir=s") == 0
        assert statuses(capfd.readouterr().out) == expected
    assert sweep(tmp_path, "-m", "act=bug", "hydra.sweep.dir=s") == 1
    assert statuses(capfd.readouterr().out) == {"act=bug": "failed"}


def test_a_sweep_without_a_job_is_not_done(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(outcomes, "jobs", lambda: [])
    assert "has begun no job" in sweep(tmp_path, "-m", "x=1")


def test_one_runs_folder_is_refused_in_a_sweep(tmp_path, capfd):
    for chosen in (["-m", "x=1,2"], ["hydra.mode=MULTIRUN"]):
        assert sweep(tmp_path, "resume=true", "hydra.run.dir=r", *chosen) == 1
        said = capfd.readouterr().err
        assert said.startswith("error: resume=FOLDER and hydra.run.dir=r are for one run")
        assert "repeated" in said and said.count("\n") == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [["hydra.run.dir="], ["-m", "x=1", "hydra.sweep.dir="]])
def test_a_place_without_a_name_is_refused(tmp_path, capfd, given):
    code = sweep(tmp_path, *given)
    said = f"{code} {capfd.readouterr().err}"
    assert f"{given[-1]}'': expected text that is not empty" in said, said
    assert list(tmp_path.iterdir()) == []


def test_a_refused_command_takes_away_only_the_folders_that_it_made(tmp_path, capfd):
    (tmp_path / "mine").mkdir()
    for given in (
        ["hydra.run.dir=mine"],
        ["hydra.run.dir=new/deep"],
        ["-m", "hydra.sweep.dir=mine"],
        ["-m", "hydra.sweep.dir=new/deep"],
    ):
        assert sweep(tmp_path, *given, "steps=0" if given[0] != "-m" else "+x=1,2")
        assert [path.name for path in tmp_path.rglob("*")] == ["mine"], given


def test_ctrl_c_while_arguments_are_read_is_no_traceback(tmp_path):
    def press(arguments):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        sweeps.start(sweep_program.compose, press)
    assert end.value.code == 130


def test_outside_a_sweep_errors_are_raised_and_no_table_is_shown(tmp_path, capfd):
    assert sweep(tmp_path, "act=fail") == "error: act=fail: give act=finish"
    assert capfd.readouterr().out == ""
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        sweep(tmp_path, "act=bug")
    assert sweep(tmp_path) == 0


@pytest.mark.parametrize("argument", sorted(sweeps.PLUGINS))
def test_a_missing_plugin_is_an_error_that_names_the_extra(monkeypatch, argument):
    found = importlib.util.find_spec
    hide = lambda name: None if name.startswith("hydra_plugins") else found(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hide)
    with pytest.raises(SystemExit, match=rf"{argument} needs hydra-\w+-\w+: pip install .*sweeps"):
        sweeps.check_plugins(["seed=0", argument])


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, second, ending",
    [
        pytest.param("joblib", "fail", "failed", marks=needs("hydra_joblib_launcher")),
        # A process that is killed does not take the others with it.
        pytest.param("local", "die", "no ending", marks=needs("hydra_submitit_launcher")),
    ],
)
def test_a_launcher_runs_jobs_in_processes_of_their_own(tmp_path, launcher, second, ending):
    process = launch(tmp_path, "-m", f"act=finish,{second}", f"hydra/launcher={launcher}")
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 1, said
    assert statuses(said) == {"act=finish": "finished", f"act={second}": ending}, said
    assert set(jobs(tmp_path)) == {"act-finish", f"act-{second}"}


@pytest.mark.slow
@needs("hydra_joblib_launcher")
def test_ctrl_c_stops_a_sweep_and_its_processes(tmp_path):
    process = launch(tmp_path, "-m", "act=finish,sleep", "hydra/launcher=joblib")
    deadline = time.monotonic() + 240
    while len(jobs(tmp_path)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert statuses(said)["act=sleep"] == "no ending"
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(process.pid, 0)  # no process of the group is left
            time.sleep(0.1)


@pytest.mark.slow
@needs("hydra_optuna_sweeper")
@pytest.mark.filterwarnings("ignore")
def test_optuna_minimises_the_figure_and_a_repetition_runs_nothing_again(tmp_path, capfd):
    arguments = ("-m", "hydra/sweeper=optuna", "x=interval(-5.0,5.0)", "act=finish")
    settings = ("n_trials=3", "n_jobs=1", "max_failure_rate=1.0", "sampler.seed=0")
    arguments += tuple(f"hydra.sweeper.{setting}" for setting in settings)
    assert sweep(tmp_path, *arguments) == 0
    assert set(statuses(capfd.readouterr().out).values()) == {"finished"}
    [results] = tmp_path.rglob("optimization_results.yaml")
    found = {float(name.removeprefix("x-")) for name in jobs(tmp_path)}
    best = float(re.search(r"best_value: (\S+)", results.read_text())[1])
    assert len(found) == 3 and best == pytest.approx(min((x - 3) ** 2 for x in found))
    assert sweep(tmp_path, *arguments) == 0
    assert set(map(tuple, jobs(tmp_path).values())) == {("begins",)}


@needs("hydra_optuna_sweeper")
@pytest.mark.filterwarnings("ignore")
def test_optuna_leaves_failed_trials_out(tmp_path):
    arguments = ("-m", "hydra/sweeper=optuna", "x=choice(1.0,5.0)", "act=choice(finish,fail)")
    settings = ("n_trials=4", "n_jobs=1", "max_failure_rate=1.0", "sampler.seed=0")
    arguments += tuple(f"hydra.sweeper.{setting}" for setting in settings)
    assert sweep(tmp_path, *arguments) == 1
    [results] = tmp_path.rglob("optimization_results.yaml")
    assert "best_value: 4.0" in results.read_text() and "act: finish" in results.read_text()


@pytest.mark.parametrize(
    "choice",
    [
        pytest.param("hydra/launcher=local", marks=needs("hydra_submitit_launcher")),
        pytest.param("hydra/launcher=slurm", marks=needs("hydra_submitit_launcher")),
        pytest.param("sweep=optuna", marks=needs("hydra_optuna_sweeper")),
    ],
)
def test_the_configs_of_launchers_and_of_optuna_compose(choice):
    with initialize_config_module("experiments.conf", version_base="1.3"):
        cfg = compose("train", [choice], return_hydra_config=True)
    if choice == "sweep=optuna":
        assert cfg.hydra.sweeper.sampler.seed == 0 and cfg.hydra.sweeper.params
    else:
        assert cfg.hydra.launcher.timeout_min > 60


def contenders():
    return sorted(path.stem for path in (CONF / "contender").glob("*.yaml"))


def test_contenders_have_equal_parameters_and_every_one_is_in_the_sweep():
    counts = {}
    with initialize_config_module("experiments.conf", version_base="1.3"):
        for name in contenders():
            model = instantiate(compose("train", [f"contender={name}"]).model)
            shapes = jax.eval_shape(model.init, jax.random.key(0))
            counts[name] = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        for name, count in counts.items():
            head = (CONF / "contender" / f"{name}.yaml").read_text()
            assert f"{count:,} parameters" in head
        assert max(counts.values()) < 1.02 * min(counts.values()), counts
        swept = compose("train", ["sweep=mixers"], return_hydra_config=True).hydra.sweeper.params
    assert sorted(swept.contender.split(",")) == contenders()
    assert {"para_gru", "para_lstm", "slstm", "min_gru", "attention", "hybrid"} == set(counts)
