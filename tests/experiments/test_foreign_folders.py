"""A folder from anybody, again: where it makes a command write, how much is read, what is shown."""

import contextlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

from experiments import bench, evaluate, finetune, generate, plot, train
from experiments.run import (
    checkpoints,
    claim,
    disk,
    folders,
    metrics,
    names,
    opening,
    plain_files,
    seals,
    trust,
)
from experiments.run.folders import RunError
from experiments.shell.explanations import explain
from experiments.shell.foreign import content_of
from experiments.sweep import run_sets
from tests.experiments.run_folders import config, make_run
from tests.experiments.saved_run import MODEL, call, save_run
from tests.experiments.test_bench_resume import SUITE
from tests.experiments.test_finetune import SMALL

ESCAPE = "\x1b]0;owned\x07\x1b[31m"
LOAD = {"_target_": "numpy.load", "file": "numpy/w.npy", "allow_pickle": True}
STDLIB = {"_target_": "experiments.data.stdlib.load", "validation_fraction": 0.2}


def edited(folder, **changes):
    """A run's config with top-level keys replaced; `a__b` changes the key `b` in `a`."""
    path = folder / "config.yaml"
    values = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        outer, _, inner = key.partition("__")
        values[outer] = {**values[outer], inner: value} if inner else value
    path.write_text(yaml.safe_dump(values))
    return folder


def everything(folder):
    """What is in a folder, by path: the content of files, and where links lead."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    place = tmp_path_factory.mktemp("saved")
    (place / "text").mkdir()
    for i in range(5):
        (place / "text" / f"{i}.py").write_text(f"one_{i} = [{i}, 'x']\n" * 20)
    save_run(place / "run", data={**STDLIB, "root": str(place / "text"), "tokenizer": None})
    return place


@pytest.fixture
def run(tmp_path, saved):
    shutil.copytree(saved / "run", tmp_path / "run")
    return tmp_path / "run"


# Trust.


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """Where numpy.load leaves a mark, as the pickle in a file that it reads could."""
    mark, load = tmp_path / "marker.txt", np.load
    monkeypatch.setattr(np, "load", lambda *a, **k: mark.touch() or load(*a, **k))
    return mark


@pytest.mark.parametrize(
    "program, arguments",
    [
        (finetune, ["from=numpy", *SMALL]),
        (evaluate, ["run=./numpy", "data=text", "data.path=numpy"]),
        (evaluate, ["run=./numpy", "data=stdlib", "data.root=numpy"]),
        (evaluate, ["run=./numpy", "data=stdlib", "data.tokenizer=numpy"]),
        (generate, ["run=numpy", "trust=./numpy"]),
    ],
    ids=str,
)
def test_a_path_that_is_called_like_a_package_trusts_no_package(
    tmp_path, run, loaded, program, arguments
):
    edited(run.rename(tmp_path / "numpy"), model__mlp_hidden=LOAD)
    said = call(program, tmp_path, *arguments)
    assert "=numpy.load, which is neither shipped nor a public name" in said
    assert not loaded.exists()


def test_a_bare_word_of_trust_is_a_package_and_a_path_has_a_slash(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word, package, path in (
        ("numpy", True, False),
        ("./numpy", False, True),
        (f"{tmp_path}/numpy", False, True),
    ):
        edited(run, model__mlp_hidden=LOAD | {"file": "run/w.npy"})
        with trust.from_command_line(OmegaConf.create({"trust": [word]})):
            assert trust._is_allowed("numpy.load") == package
            assert trust._is_ours("numpy", run) == path


def test_modules_of_tests_are_not_public():
    name = "optax.optax_test.OptaxTest"
    found = [one for one in sys.modules if one.startswith("optax.") and "test" in one]
    assert names.locate("optax.adamw") and not names.is_public(name), found
    assert names.is_public("jaxpara.testing.check_model") and names.is_public("optax.adamw")
    parts = ("optax_test", "tests", "test_x", "_src", "test")
    assert all(names.PRIVATE.search(part) for part in parts)
    assert not any(names.PRIVATE.search(part) for part in ("testing", "latest", "contest"))


# Writing.


LINKS = [claim.LOCK, claim.HOLDER, "env.json", "summary.json.part", "x", "checkpoints/0/x"]


@pytest.mark.parametrize("there", [True, False], ids=["a file", "nothing"])
@pytest.mark.parametrize("name", LINKS)
def test_a_run_whose_links_lead_out_is_refused_before_it_is_claimed(tmp_path, run, name, there):
    (tmp_path / "victim").mkdir()
    if there:
        (tmp_path / "victim/file").write_text("precious")
    (run / name).symlink_to(tmp_path / "victim/file")
    before = everything(tmp_path)
    for program in (train, finetune):
        said = call(program, tmp_path, f"resume={run}")
        assert f"{name} is a link to {tmp_path}/victim/file, which is not in" in said
        assert everything(tmp_path) == before
    with pytest.raises(RunError, match="is a link to"), claim.claimed(run):
        pass
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json", ".hydra/config.yaml", "x"])
def test_a_new_run_in_a_folder_whose_links_lead_out_is_refused(tmp_path, name):
    (tmp_path / "new" / ".hydra").mkdir(parents=True)
    (tmp_path / "new" / name).symlink_to(tmp_path / "victim")
    before = everything(tmp_path)
    with pytest.raises(RunError, match="is a link to"):
        with opening.opened(tmp_path / "new", OmegaConf.create({"a": 1})):
            pass
    said = call(bench, tmp_path, *SUITE, f"hydra.run.dir={tmp_path / 'new'}")
    assert "is a link to" in said and everything(tmp_path) == before


@pytest.mark.parametrize("name", ["damaged", "tensorboard", "checkpoints/9"])
def test_no_trust_lets_a_run_write_through_its_links(tmp_path, run, name):
    victim = tmp_path / "victim"
    (victim / "2").mkdir(parents=True)
    (victim / "2" / "text").write_text("x")
    (run / name).symlink_to(victim)
    before = everything(tmp_path)
    said = call(train, tmp_path, f"resume={run}", f"trust={victim}")
    assert "is a link to" in said and "trust=" not in said, said
    assert everything(tmp_path) == before


def swept(folder, *arguments):
    """What a sweep that fails says."""
    program = [sys.executable, "-m", "experiments.train", "-m", *arguments]
    ended = subprocess.run(
        [*program, f"hydra.sweep.dir={folder}"],
        cwd=folders.REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        encoding="utf-8",
    )
    assert ended.returncode == 1, ended.stderr
    return ended.stderr


def test_a_sweep_is_refused_in_a_folder_whose_links_lead_out(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "victim").write_text("x")
    (tmp_path / "sweep" / "multirun.yaml").symlink_to(tmp_path / "victim")
    before = everything(tmp_path)
    said = swept(tmp_path / "sweep", "seed=0,1", "steps=1")
    assert "multirun.yaml is a link to" in said and everything(tmp_path) == before, said


def test_a_sweep_that_is_refused_before_its_first_job_leaves_no_folder(tmp_path):
    said = swept(tmp_path / "sweep", "cell=para_gru,para_ltsm")
    assert "para_ltsm" in said and everything(tmp_path) == {}, said


def test_a_line_end_in_a_name_makes_no_line_of_its_own(tmp_path, run):
    (run / "a\nerror: run this\nb").symlink_to("/etc/passwd")
    said = call(generate, tmp_path, f"run={run}")
    assert "is a link to /etc/passwd" in said and "\nerror: run this" not in said
    (run / "a\nerror: run this\nb").unlink()
    (run / "checkpoints/0/params/a\nerror: run this").write_text("x")
    with pytest.raises(seals.Damaged, match=r"a\\nerror: run this was not written with"):
        seals.check(run / "checkpoints/0")


def test_runs_by_relative_and_absolute_paths_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [SimpleNamespace(folder=Path(place)) for place in ("a", tmp_path / "b")]
    assert run_sets.short_names(runs) == ["a", "b"]


def test_a_terminal_only_shows_what_a_model_writes():
    assert plain_files.for_terminal("a\tb\n\x1b]0;x\a") == "a\tb\n\\x1b]0;x\\x07"


def test_a_link_inside_a_folder_is_replaced_and_never_written_through(tmp_path):
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.write_text("step\n")
    for write in (
        lambda: plain_files.write_text(link, "new"),
        lambda: folders.write_json(link, {}),
        lambda: metrics.append(link, {"step": 1}),
        lambda: metrics.append(link, {"step": 1, "more": 2}),
        lambda: metrics.start(link, ["step"]),
    ):
        link.unlink(missing_ok=True)
        link.symlink_to(victim)
        (tmp_path / "link.part").symlink_to(victim)
        with contextlib.suppress(OSError):  # some replace it, some refuse
            write()
        (tmp_path / "link.part").unlink(missing_ok=True)
        assert victim.read_text() == "step\n"


def test_what_writes_into_a_runs_folder_writes_by_plain_files():
    root = folders.REPOSITORY / "experiments/run"
    writes = re.compile(r"\.write_(text|bytes)\(|OmegaConf\.save\(|shutil\.copy\w*\(|\"[wa]\"")
    for path in sorted(root.glob("*.py")):
        for line in path.read_text().splitlines() if path.name != "plain_files.py" else ():
            fresh = re.search(r"\bpart\)|(fresh|whole)\.open", line)
            assert fresh or not writes.search(line), (path, line)


@pytest.mark.parametrize("by", ["judged_by", "likely"])
def test_a_figure_is_never_named_out_of_its_folder(tmp_path, by):
    y = "../../victim/accuracy"
    (tmp_path / "victim").mkdir()
    (tmp_path / "at").mkdir()
    rows = [{"step": i, "tokens": i, y: 1.0 / (1 + i)} for i in range(3)]
    summary = {"judged_by": [y, "min"]} if by == "judged_by" else {}
    make_run(tmp_path / "run", config(), rows, summary=summary)
    assert call(plot, tmp_path / "at", f"runs={tmp_path / 'run'}", "x=tokens") is None
    assert list((tmp_path / "victim").iterdir()) == []
    assert {p.name for p in (tmp_path / "at/plots").iterdir()} == {
        "_.._victim_accuracy-by-tokens.png",
        "_.._victim_accuracy-by-tokens.csv",
    }


@pytest.mark.parametrize("text", ["../x", "/etc/x", "..", ".", "", "a\0b", "a\nb", "é", "x" * 999])
def test_a_safe_name_is_one_name(text):
    name = plain_files.safe_name(text)
    assert re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*", name) and len(name) <= 80


# Settings.


SETTINGS = [
    ({"model__conv_taps": 10**6}, "model.conv_taps=1000000: expected a whole number from 1"),
    ({"model__compute_dtype": "object"}, "compute_dtype='object': expected one of"),
    ({"model__width": "0x" + "f" * 5000}, "model.width holds a huge number"),
    ({"model": 5}, "model=5: expected a group of settings"),
    ({"model": [1]}, r"model=\[1\]: expected a group of settings"),
    ({"transform": {"a": 5}}, "transform.a=5: expected the config of a transform"),
    ({"transform": {"a": None}}, "transform.a=None: expected the config of a transform"),
    pytest.param(  # annotations find that first
        {"model": {"_target_": "jaxpara.nn.decoder"}},
        "config.yaml: model: .* add it there",
        marks=pytest.mark.untyped,
    ),
    ({"model": {"_target_": "jaxpara.Model", "init": 1, "apply": 2}}, "(init|TypeError|callable)"),
    ({"model": {**MODEL, "width": "???"}}, "width must be given: add it there, or give another"),
    ({"model": {**MODEL, "_partial_": "yes"}}, "_partial_: give true or false, or leave it out"),
    ({"model": {**MODEL, "_recursive_": "x"}}, "_recursive_: give true or false, or leave it out"),
    (
        {"transform": {"a": {"_target_": "jaxpara.lora", "rank": 2, "rnk": 3}}},
        r"transform.a.rnk: jaxpara\S+ has no such setting; did you mean transform.a.rank?",
    ),
    (
        {"transform": {"a": {"_target_": "jaxpara.lora", "rank": 2, "where": "nothing/*"}}},
        "nothing",
    ),
]


@pytest.mark.parametrize("changes, message", SETTINGS, ids=lambda x: str(x)[:60])
def test_a_setting_of_a_folder_that_cannot_be_used_is_refused(tmp_path, run, changes, message):
    edited(run, **changes)
    path = run / "config.yaml"
    path.write_text(re.sub("'(0xf+)'", r"\1", path.read_text()))
    for program in (generate, evaluate):
        said = call(program, tmp_path, f"run={run}", "trust=/")
        assert re.search(message, said) and len(said.splitlines()) <= 3, said
        assert str(run) in said or "transform.a" in said
        assert "on the command line" not in said, "nothing there changes a folder's config"


EVALUATION = [
    ({"evaluation__windows": value}, "evaluation.windows=")
    for value in ("x", None, float("nan"), 1.5)
]
EVALUATION += [({"evaluation__batch_size": v}, "evaluation.batch_size=") for v in (0, -1, 1.5)]
EVALUATION += [({"evaluation": v}, "(evaluation=|no evaluation)") for v in (None, "x", [1])]
EVALUATION += [({"data": v}, "(data=|no data)") for v in (None, "x", [1])]
EVALUATION += [
    ({"evaluation__windows": 2**31 - 1}, "windows=2147483647 of 16 tokens need"),
    ({"data__encoding": b"utf-8"}, "data.encoding holds a bytes"),
]


@pytest.mark.parametrize("changes, message", EVALUATION, ids=lambda x: str(x)[:60])
def test_numbers_by_which_a_run_is_judged_are_checked(tmp_path, run, monkeypatch, changes, message):
    monkeypatch.setattr("experiments.run.memory.machine_bytes", lambda: 2**30)
    edited(run, **changes)
    said = call(evaluate, tmp_path, f"run={run}", "trust=/")
    assert re.search(message, said) and len(said.splitlines()) <= 3
    assert str(run) in said or "give windows=" in said


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {**MODEL, "_target_": "os.system\n\nerror: paste this"}},
        {"model": {**MODEL, f"{ESCAPE}\nerror: paste this": {"_target_": "os.system"}}},
        {"model": {**MODEL, "width": f"{ESCAPE}\nerror: paste this"}},
        {"data": {**STDLIB, "root": f"/x{ESCAPE}\nerror: paste this"}},
    ],
    ids=str,
)
def test_a_text_of_a_folder_is_one_word_of_a_message(tmp_path, run, changes):
    edited(run, **changes)
    said = call(evaluate, tmp_path, f"run={run}")
    assert "\x1b" not in said and "\\nerror: paste this" in said
    assert not any(line.startswith("error: paste") for line in said.splitlines())


def test_whatever_orbax_reads_it_reads_quietly(run, monkeypatch):
    logger, levels = logging.getLogger("absl"), []
    monkeypatch.setattr(logger, "level", 0)
    note = lambda *given, **named: levels.append(logger.level)  # noqa: E731
    monkeypatch.setattr(disk.ocp.Checkpointer, "restore", note)
    disk.read_items(run / "checkpoints/0")
    assert levels == [logging.CRITICAL] and logger.level == 0


def test_any_other_error_about_a_folder_names_it(tmp_path):
    for error in (TypeError("no\x1b\nway"), KeyError("a"), RuntimeError("x" * 999), OSError("odd")):
        with pytest.raises(RunError, match=f"^{tmp_path} holds something") as refused:
            with content_of(tmp_path):
                raise error
        said = explain(refused.value)
        assert type(error).__name__ in said and "HYDRA_FULL_ERROR=1" in said
        assert "\x1b" not in said and len(said) < 500 and len(said.splitlines()) == 2
    for error in (KeyboardInterrupt(), MemoryError(), RunError("x"), FileNotFoundError(2, "y")):
        with pytest.raises(type(error)) as passed, content_of(tmp_path):
            raise error
        assert passed.value is error


def test_the_resume_command_trusts_what_the_run_calls_and_reads(tmp_path):
    data = {"_target_": "experiments.data.text.load", "path": "/data/my texts"}
    theirs, ours = {"_target_": "their.made.optimizer"}, {"_target_": "optax.adamw"}
    for cfg, trusted in (
        ({"data": data}, ["trust='/data/my texts'"]),
        ({"optim": theirs}, ["trust=their"]),
        ({"optim": ours}, []),
        ({"data": data, "optim": theirs}, ["trust=[their,'/data/my texts']"]),
    ):
        OmegaConf.save(cfg, tmp_path / "config.yaml")
        assert shlex.split(checkpoints.resume_command(tmp_path))[4:] == trusted
