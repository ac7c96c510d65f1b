"""The pages of docs/ that a stranger follows: their code is run as it stands."""

import importlib.util
import pathlib
import pkgutil
import re
import runpy
import sys

import jax
import jax.numpy as jnp
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

import jaxpara as jp

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"


# Pages whose Python is run from top to bottom, each in a namespace of its own.
RUN = ("start/install.md", "start/first_scan.md", "start/your_model.md", "guides/weights.md")


def blocks(text, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def sections(page):
    """Heading -> text of each second-level section."""
    parts = re.split(r"^## (.*)$", (DOCS / page).read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("page", RUN)
def test_the_code_of_a_page_runs_from_top_to_bottom(page):
    code = blocks((DOCS / page).read_text())
    assert code and "assert " in "".join(code)
    namespace = {"__name__": "page"}
    for block in code:
        exec(compile(block, page, "exec"), namespace)


def files_of(page, languages=("python", "yaml")):
    """`# path` in the first line of a block -> the block."""
    found = {}
    for language in languages:
        for block in blocks((DOCS / page).read_text(), language):
            first, _, rest = block.partition("\n")
            if re.fullmatch(r"# [\w/.]+\.(py|yaml)", first):
                found[first[2:]] = rest
    return found


@pytest.mark.parametrize(
    ("page", "count"),
    [
        ("contributing/weight_method.md", 3),
        ("contributing/task.md", 2),
        ("contributing/cell.md", 2),
        ("contributing/solver.md", 2),
        ("contributing/kernel.md", 2),
    ],
)
def test_something_new_takes_at_most_five_files_and_150_lines(page, count):
    files = files_of(page)
    assert len(files) == count <= 5
    assert sum(text.count("\n") for text in files.values()) <= 150


def test_the_page_on_adding_a_weight_method_can_be_followed(tmp_path, monkeypatch):
    files = files_of("contributing/weight_method.md")
    method, config, test = files  # its three files, in order of language: py, py, yaml
    if config.endswith(".py"):
        config, test = test, config
    assert config == "experiments/conf/transform/hira.yaml" and test.startswith("tests/")
    path = tmp_path / "hira.py"
    path.write_text(files[method])
    spec = importlib.util.spec_from_file_location("jaxpara.weights.hira", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "jaxpara.weights.hira", module)
    spec.loader.exec_module(module)
    namespace = {"__name__": "test_hira"}
    exec(compile(files[test], test, "exec"), namespace)
    tests = [value for name, value in namespace.items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0]()
    made = OmegaConf.create(files[config])
    made.rank = 3
    assert isinstance(instantiate(made.hira), jp.Reparam)
    with pytest.raises(ValueError, match="rank=0: give at least 1"):
        module.hira(rank=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "package"),
    [
        ("Flax Linen", "flax"),
        ("Flax NNX", "flax"),
        ("Equinox", "equinox"),
        ("Haiku", "haiku"),
    ],
)
def test_the_examples_of_the_bridges_page_run_in_order(section, package):
    pytest.importorskip(package)
    code = blocks(sections("guides/bridges.md")[section])
    assert code and "assert " in "".join(code)
    namespace = {"__name__": "page"}
    for block in code:
        exec(compile(block, f"docs/guides/bridges.md, {section}", "exec"), namespace)


def test_every_section_of_the_bridges_page_is_run():
    with_code = {name for name, text in sections("guides/bridges.md").items() if blocks(text)}
    assert with_code == {"Flax Linen", "Flax NNX", "Equinox", "Haiku"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "said"),
    [("cell", " iterations\n"), ("solver", " iterations\n"), ("kernel", " multiples of 128\n")],
)
def test_a_page_of_a_module_and_its_check_can_be_followed(
    page, said, tmp_path, monkeypatch, capsys
):
    files = files_of(f"contributing/{page}.md")
    module, check = files
    assert check == f"check_{module}"
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    runpy.run_path(str(tmp_path / check))
    assert capsys.readouterr().out.endswith(said)


def test_the_factory_of_the_page_on_cells_is_what_the_training_command_builds(
    tmp_path, monkeypatch
):
    page = (DOCS / "contributing/cell.md").read_text()
    files = {block.split()[1]: block for block in blocks(page)}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    # What the training command builds from the dotted name that the page gives it.
    (override,) = re.findall(r"cell\.path=(\S+)", "".join(blocks(page, "bash")))
    mixer = jp.nn.mixers.recurrent(pkgutil.resolve_name(override))(8)
    state = mixer.start(params := mixer.init(jax.random.key(0)), 2, 4, jnp.float32)
    _, y = mixer.run(params, state, jnp.ones((2, 4, 8)), None)
    assert y.shape == (2, 4, mixer.outputs) and "recurrent" in params
