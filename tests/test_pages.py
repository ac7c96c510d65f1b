"""The pages of docs/ that a stranger follows: their code is run as it stands."""

import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"


def blocks(text, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def sections(page):
    """Heading -> text of each second-level section."""
    parts = re.split(r"^## (.*)$", (DOCS / page).read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize(
    ("section", "package"),
    [
        ("Flax Linen", "flax"),
        ("Flax NNX", "flax"),
        ("Equinox", "equinox"),
        ("Haiku", "haiku"),
    ],
)
def test_the_examples_of_the_adapters_page_run_in_order(section, package):
    pytest.importorskip(package)
    code = blocks(sections("adapters.md")[section])
    assert code and "assert " in "".join(code)
    namespace = {"__name__": "page"}
    for block in code:
        exec(compile(block, f"docs/adapters.md, {section}", "exec"), namespace)


def test_every_section_of_the_adapters_page_is_run():
    with_code = {name for name, text in sections("adapters.md").items() if blocks(text)}
    assert with_code == {"Flax Linen", "Flax NNX", "Equinox", "Haiku"}
