"""The pages of docs/ that a stranger follows: their code is run as it stands."""

import pathlib
import pkgutil
import re
import runpy

import jax
import jax.numpy as jnp
import pytest

import jaxpara as jp

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"


def blocks(text, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def sections(page):
    """Heading -> text of each second-level section."""
    parts = re.split(r"^## (.*)$", (DOCS / page).read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


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
def test_the_page_on_adding_a_cell_can_be_followed(tmp_path, monkeypatch, capsys):
    page = (DOCS / "contributing/cell.md").read_text()
    files = {block.split()[1]: block for block in blocks(page)}
    assert set(files) == {"mycells.py", "check_mycells.py"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    runpy.run_path(str(tmp_path / "check_mycells.py"))
    assert capsys.readouterr().out.startswith("Diagonal ")
    # What the training command builds from the dotted name that the page gives it.
    (override,) = re.findall(r"cell\.path=(\S+)", "".join(blocks(page, "bash")))
    mixer = jp.nn.mixers.recurrent(pkgutil.resolve_name(override))(8)
    state = mixer.start(params := mixer.init(jax.random.key(0)), 2, 4, jnp.float32)
    _, y = mixer.run(params, state, jnp.ones((2, 4, 8)), None)
    assert y.shape == (2, 4, mixer.outputs) and "recurrent" in params
