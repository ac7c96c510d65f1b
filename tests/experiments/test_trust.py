"""A folder from anybody: it is read, and nothing in it is run."""

import contextlib
import importlib
import inspect
import json
import os
import pkgutil
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

import jaxpara
from experiments import evaluate, export_adapters, finetune, generate, train
from experiments.inject import hostile
from experiments.run import folders, names, opening, resuming, trust
from experiments.run.folder_arguments import quote_value
from experiments.run.resuming import _choices
from experiments.shell import build, commandline
from experiments.shell.explanations import explain
from experiments.studies import mixers
from tests.experiments.saved_run import MODEL, call, save_run
from tests.experiments.test_finetune import SMALL

MARK = "marker.txt"
# What each of these would do if it were called: leave a file behind.
CODE = "import pathlib\n\ndef make(**rest):\n    pathlib.Path({mark!r}).write_text('run')\n"


def edited(folder, **changes):
    """A run's config with top-level keys replaced."""
    path = folder / "config.yaml"
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**values, **changes}))
    return folder


def touch(path):
    return {"_target_": "pathlib.Path.touch", "_args_": [str(path)]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    place = tmp_path_factory.mktemp("saved") / "run"
    return save_run(place, data={"_target_": "experiments.data.stdlib.load"})


@pytest.fixture
def run(tmp_path, saved):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("place", hostile.PLACES)
def test_a_constructor_of_anybodys_is_refused_wherever_it_stands(tmp_path, run, place):
    mark = tmp_path / MARK
    edited(run, model=hostile.PLACES[place](MODEL, touch(mark)))
    said = call(generate, tmp_path, f"run={run}")
    assert "=pathlib.Path.touch, which is neither shipped nor a public name of" in said
    assert "trust=pathlib" in said and not mark.exists()
    # The control: Hydra itself calls it.
    build.instantiate(touch(mark))
    assert mark.exists()


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """Where numpy.load leaves a mark, as the pickle in a file that it reads could."""
    mark, load = tmp_path / MARK, np.load
    monkeypatch.setattr(np, "load", lambda *a, **k: mark.touch() or load(*a, **k))
    return mark


@pytest.mark.untyped  # its weights are numbers, which annotations refuse before
@pytest.mark.parametrize("how", hostile.MADE)
def test_what_a_constructor_has_made_is_never_built(tmp_path, run, loaded, how):
    values = hostile.MADE[how]
    edited(run, **values)
    said = call(generate, tmp_path, f"run={run}")
    assert said and "Traceback" not in said and len(said.splitlines()) <= 3
    with pytest.raises((folders.RunError, InstantiationException)) as refused:
        build.build_model(OmegaConf.create({"model": MODEL, **values}))
    assert "a constructor is asked to build " in (explain(refused.value) or "")
    assert not loaded.exists()


def test_what_a_config_spells_out_is_built_by_its_own_constructors():
    inner = {"_target_": "jaxpara.lora", "rank": 2}
    chained = {"_target_": "experiments.shell.build.chain_of", "_recursive_": False}
    assert build.make(OmegaConf.create({**chained, "members": {"a": inner}})) is not None
    with pytest.raises(folders.RunError, match="does not spell out"):
        build.chain_of({"a": inner})


@pytest.mark.parametrize("part", ["model", "transform", "optim"])
def test_only_data_and_tasks_read_files(run, part):
    node = {"_target_": "experiments.data.text.load", "path": "/etc/passwd"}
    edited(run, **{part: {"a": node}})
    with pytest.raises(folders.RunError, match=f"read {part}.a.path=/etc/passwd, which is not in"):
        trust.open_config(run)
    with trust.granted(["/etc/passwd"]):
        trust.open_config(run)


@pytest.mark.parametrize("name", hostile.NAMES, ids=ascii)
def test_names_that_are_not_of_what_is_built_are_refused(run, name):
    for form in hostile.FORMS.values():
        edited(run, model={**MODEL, "mixer": form(name)})
        refusal = "which is neither shipped nor" if name and isinstance(name, str) else "is damaged"
        with pytest.raises(folders.RunError, match=refusal):
            trust.open_config(run)


@pytest.mark.parametrize("node", [{}, {"path": None}, {"path": ""}, {"path": ["jaxpara"]}], ids=str)
def test_a_config_that_was_cut_off_is_damaged_and_nobodys_to_trust(run, node):
    edited(run, data={"split": {"_target_": "hydra.utils.get_method", **node}})
    with pytest.raises(folders.RunError, match="is damaged: data.split.path is") as refused:
        trust.open_config(run)
    assert "trust=" not in str(refused.value)


@pytest.mark.parametrize("flag", ["_recursive_", "_partial_"])
@pytest.mark.parametrize("value", [[1], "no", 1])
def test_a_flag_of_hydra_that_is_no_boolean_is_named(tmp_path, run, flag, value):
    edited(run, model={**MODEL, flag: value})
    said = call(generate, tmp_path, f"run={run}")
    assert f"{flag}: give true or false" in said and len(said.splitlines()) <= 3


@pytest.mark.parametrize(
    "name",
    [
        "optax.adamw",
        "optax.contrib.muon",
        "optax.losses.squared_error",
        "jaxpara.lora",
        "jaxpara.nn.decoder",
        "jaxpara.nn.mixers.attention",
        "jaxpara.cells.para_gru",
        "jaxpara.newton",
        "jaxpara.testing.check_model",
    ],
)
def test_public_names_of_jaxpara_and_optax_are_built(run, name):
    edited(run, optim={"_target_": name})
    assert trust.open_config(run).optim["_target_"] == name


def test_what_a_folder_may_name_of_jaxpara_is_what_the_reference_documents():
    pages = (folders.REPOSITORY / "docs/api").glob("*.md")
    documented = {one for p in pages for one in re.findall(r"(?m)^::: (\S+)$", p.read_text())}
    there = set()
    for found in pkgutil.walk_packages(jaxpara.__path__, "jaxpara."):
        with contextlib.suppress(ImportError):  # what needs a package that is not here
            there |= {f"{found.name}.{one}" for one in dir(importlib.import_module(found.name))}
    there |= {f"{place}.{one}" for place in names.PUBLIC for one in dir(names.locate(place))}
    public = {one for one in there if names.is_public(one)}
    assert public <= documented
    values = {one for one in documented if not callable(names.locate(one))}  # and types of unions
    assert documented - public <= values | {"jaxpara.Structure"} and len(public) > 100


@pytest.mark.parametrize("kept", ["commit", "no record", "another's record"])
def test_a_folder_of_another_version_says_what_its_names_are_now(tmp_path, run, kept):
    old = "experiments.language_model.language_model"
    record = {"git_commit": "0123456789" * 4 if kept == "commit" else "$(touch x)"}
    if kept != "no record":
        (run / "env.json").write_text(json.dumps(record))
    edited(run, task={"_target_": old})
    said = call(evaluate, tmp_path, f"run={run}", "trust=experiments")
    assert f"names {old}, which is not in this version of jaxpara" in said
    assert f"{old} -> experiments.text.language_model.language_model" in said
    assert ("`git checkout 01234567` brings" in said) == (kept == "commit")
    assert "touch" not in said and "Traceback" not in said and len(said.splitlines()) <= 3


def test_everything_that_a_shipped_config_names_is_built():
    assert {
        "experiments.data.text.load",
        "jaxpara.cells.para_gru",
        "builtins.tuple",
    } < names.shipped()
    assert not {name for name in names.shipped() if names.locate(name) is None}
    assert not any(name.startswith("hydra.") for name in names.shipped())


@pytest.mark.parametrize("node", hostile.GETTERS, ids=str)
def test_a_getter_takes_one_path_and_nothing_besides(run, node):
    edited(run, model={**MODEL, "mixer": node})
    with pytest.raises(folders.RunError, match="_target_=hydra.utils.get_"):
        trust.open_config(run)


@pytest.mark.parametrize("text", hostile.TEXTS)
def test_nothing_in_a_folder_is_interpolated(tmp_path, run, monkeypatch, text):
    monkeypatch.setenv("SECRET", "hunter2")
    for changes in ({"model": {**MODEL, "_target_": text}}, {"sample": {"prompt": [{"a": text}]}}):
        edited(run, **changes)
        said = call(generate, tmp_path, f"run={run}")
        assert "begins an interpolation" in said and "hunter2" not in said


def test_a_config_with_an_interpolated_text_is_refused_before_its_run_begins(tmp_path):
    cfg = OmegaConf.create({"sample": {"prompt": "\\${x}"}})
    with pytest.raises(folders.RunError, match="the config: sample.prompt holds"):
        opening.open_run(tmp_path / "new", cfg)
    assert not (tmp_path / "new").exists()


def test_the_users_own_package_needs_trust_on_the_command_line(tmp_path, run, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path / "code")
    (tmp_path / "code").mkdir()
    mark = tmp_path / MARK
    (tmp_path / "code" / "theirs_7.py").write_text("import os\n" + CODE.format(mark=str(mark)))
    edited(run, model={"_target_": "theirs_7.make"}, trust="theirs_7")
    said = call(generate, tmp_path, f"run={run}")
    assert "trust=theirs_7" in said and "theirs_7" not in sys.modules, "not even imported"
    said = call(generate, tmp_path, f"run={run}", "trust=[theirs,/data]")
    assert shlex.split(said)[-1] == "trust=[theirs,'/data',theirs_7]" and not mark.exists()
    said = call(generate, tmp_path, f"run={run}", "trust=theirs_7")
    assert "model= makes a NoneType" in said
    assert mark.read_text() == "run"
    # What the package has imported itself is not the package.
    edited(run, model={"_target_": "theirs_7.os.system", "command": "true"})
    assert "theirs_7.os.system, which" in call(generate, tmp_path, f"run={run}", "trust=[theirs_7]")


def test_a_module_in_the_folder_is_not_imported(tmp_path, run, monkeypatch):
    (run / "inside_7.py").write_text(CODE.format(mark=str(tmp_path / MARK)))
    edited(run, model={"_target_": "inside_7.make"})
    monkeypatch.syspath_prepend(str(run))
    said = call(generate, tmp_path, f"run={run}", "trust=inside_7")
    assert "its files would be run as code. Start the program from another folder" in said
    assert not (tmp_path / MARK).exists()


PROGRAMS = {
    "generate": (generate, ["run={run}"]),
    "evaluate": (evaluate, ["run={run}"]),
    "export_adapters": (export_adapters, ["run={run}"]),
    "resume": (train, ["resume={run}"]),
    "finetune": (finetune, ["from={run}", *SMALL]),
    "finetune again": (finetune, ["resume={run}"]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_that_opens_a_folder_refuses(tmp_path, run, name):
    program, arguments = PROGRAMS[name]
    edited(run, model=touch(tmp_path / MARK))
    said = call(program, tmp_path, *(a.format(run=run) for a in arguments))
    assert "which is neither shipped nor" in said and not (tmp_path / MARK).exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "runs"}


def test_only_what_does_not_build_reads_a_config_without_asking():
    reading = {
        "run_sets",
        "finetune_figure",
        "finetune",
        "train",
        "trust",
        "evaluate",  # asks whether keys are there
        "checkpoints",  # compares it with what they were trained with
        "bench_rows",  # its own settings, for whether rows are of them
    }  # `twin`, resume's check
    root = folders.REPOSITORY / "experiments"
    found = {p.stem for p in root.rglob("*.py") if "load_config(" in p.read_text()} - {"folders"}
    assert found <= reading
    assert "from_command_line" in inspect.getsource(commandline.guarded)
    for module in (generate, evaluate, export_adapters, mixers, train, finetune):
        assert re.search(r"guarded\(.*, cfg\)", inspect.getsource(module))


# Bytes are no path of a config, wherever they lead.
TEXTS = [data for data in hostile.DATA if not isinstance(data.get("path"), bytes)]


@pytest.mark.parametrize("data", TEXTS, ids=str)
def test_a_file_outside_the_folder_is_read_only_if_the_user_names_it(tmp_path, run, data):
    data = {k: v.format(run=run) if isinstance(v, str) else v for k, v in data.items()}
    edited(run, data=data, trust="/")
    [path] = [p for _, p in trust.paths(data, "")]
    cfg = trust.open_config(run)
    with pytest.raises(folders.RunError, match="which is not in that folder") as caught:
        trust.check_paths(cfg, run)
    [override] = shlex.split(str(caught.value).split("with ")[1])
    said = OverridesParser.create().parse_override(override).value()
    for given in (path, said) if path.isprintable() else (path,):
        with trust.granted([given]):
            trust.check_paths(cfg, run)
    with trust.granted(["/nowhere", "x", "./x"]), pytest.raises(folders.RunError):
        trust.check_paths(cfg, run)


def test_files_of_the_folder_itself_are_read(tmp_path, run):
    for path in (run / "texts", run / "texts" / "*.txt", os.path.relpath(run / "texts")):
        edited(run, data={"_target_": "experiments.data.text.load", "path": str(path)})
        trust.check_paths(trust.open_config(run), run)


def test_evaluate_reads_outside_text_once_the_command_line_names_it(tmp_path, run):
    (tmp_path / "one").mkdir()
    for i in range(5):
        (tmp_path / "one" / f"{i}.py").write_text(f"one_{i} = [{i}, 'x']\n" * 20)
    load = {"_target_": "experiments.data.stdlib.load", "validation_fraction": 0.2}
    edited(run, data={**load, "root": str(tmp_path / "one")})
    assert "asks to read data.root=" in call(evaluate, tmp_path, f"run={run}")
    assert call(evaluate, tmp_path, f"run={run}", "trust=./one") is None
    assert call(evaluate, tmp_path, f"run={run}", f"trust=[{tmp_path}]") is None


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path, run):
    (tmp_path / "precious.txt").write_text("x")
    (run / "inside.txt").symlink_to(run / "config.yaml")
    trust.open_config(run)
    (run / "metrics.csv").symlink_to(tmp_path / "precious.txt")
    with pytest.raises(
        folders.RunError, match="metrics.csv is a link to .*precious.txt, which is not"
    ):
        trust.open_config(run)
    with trust.granted([str(tmp_path / "precious.txt")]):
        trust.open_config(run)
    (run / "loop").symlink_to("loop")
    with (
        trust.granted([str(tmp_path / "precious.txt")]),
        pytest.raises(folders.RunError, match="loop is a link to .*loop, which is not"),
    ):
        trust.open_config(run)


def test_every_path_argument_of_callable_constructors_is_known():
    harmless = {
        "name", "split", "field", "validation_split", "encoding", "only", "without",
        "project", "mode", "tags", "group", "letters", "where",
    }  # fmt: skip
    for name in sorted(names.shipped()):
        if not name.startswith("experiments.") or not inspect.isfunction(
            found := names.locate(name)
        ):
            continue
        for parameter in inspect.signature(found).parameters.values():
            if parameter.name in trust.FILES:
                assert parameter.kind is parameter.KEYWORD_ONLY, "or _args_ would give it"
            kind = str(parameter.annotation).replace("Mapping[str,", "")
            if (
                "str" in kind
                or "Path" in kind
                or kind in ("typing.Any", "<class 'inspect._empty'>")
            ):
                known = harmless | set(trust.FILES)
                assert parameter.name in known, (name, parameter)


def test_the_record_that_hydra_kept_is_read_as_values(tmp_path, monkeypatch):
    record = tmp_path / ".hydra" / "hydra.yaml"
    record.parent.mkdir()
    for text in ("hydra: ${oc.env:X}", "hydra: {runtime: {choices: '${oc.env:X}'}}", "[]", "a: 1"):
        record.write_text(text)
        assert _choices(tmp_path) == {}
    for damaged in (
        b"",
        b"[",
        b"a: &a [*a]",
        b"\xff\xfe\x00",
        b"[" * 5000,
        b"!!python/name:os.system",
    ):
        record.write_bytes(damaged)
        assert _choices(tmp_path) == {}
    record.write_text("hydra: {runtime: {choices: {cell: gru, a: '${oc.env:X}'}}}")
    assert _choices(tmp_path) == {"cell": "gru", "a": "${oc.env:X}"}


@pytest.mark.parametrize(
    "text", ["a b", "[x]", "a,b=c", "it's", "a\\'b", "100%", "é", "x\\", "$ {a}"]
)
def test_paths_with_characters_of_hydras_grammar_come_through(text):
    for path in (text, f"/x/{text}", f"./{text}/y"):
        value = OverridesParser.create().parse_override(f"k={quote_value(path)}").value()
        assert OmegaConf.create({"k": value}).k == path
    assert json.dumps(quote_value("./runs/a-b_1.c")) == '"./runs/a-b_1.c"'


def test_the_base_of_rotary_angles_is_a_number_and_no_path():
    mixer = {"_target_": "jaxpara.nn.mixers.attention", "base": 500}
    task = {"_target_": "experiments.tasks.finetune", "base": "runs/a"}
    assert list(trust.paths({"mixer": mixer, "task": task}, "")) == [("task.base", "runs/a")]
    now = {"mixer": mixer}
    assert resuming.compared(now)["mixer.base"] == 500
    with pytest.raises(folders.RunError, match="mixer.base=3, and it was trained with 500"):
        resuming.check_same(resuming.compared(now), {"mixer": {**mixer, "base": 3}}, "it")
