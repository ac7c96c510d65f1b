"""Public names are documented, cited, tested and annotated; what the documents say is so."""

import ast
import doctest
import inspect
import itertools
import operator
import pathlib
import re
import types

import pytest

import jaxpara

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The pages with an entry for each public name; the index and the kernels' own page are prose.
PROSE = ("index.md", "kernels.md")
METHODS = "\n".join(
    p.read_text() for p in sorted((ROOT / "docs/methods").glob("*.md")) if p.name not in PROSE
)
README = (ROOT / "README.md").read_text()
KEYS = set(re.findall(r"^@\w+\{([\w-]+),", (ROOT / "docs/references.bib").read_text(), re.M))
# A lone axis name in brackets is a shape, not a citation.
AXES = {"time", "batch", "state", "feature", "features", "tokens", "heads", "head", "vocab"}


def public_names():
    """Qualified name -> object: jaxpara's own, then those of the modules it exposes by name."""
    found = {}

    def collect(module, prefix):
        for name in getattr(module, "__all__", vars(module)):
            value = getattr(module, name)
            # a plain file also holds what it imports; a package's __init__ only what it offers
            own = hasattr(module, "__path__") or getattr(value, "__module__", "") == module.__name__
            if own and not name.startswith("_") and not isinstance(value, types.ModuleType):
                found[prefix + name] = value

    collect(jaxpara, "")
    for name in (
        "cells",
        "structure",
        "nn",
        "nn.mixers",
        "train",
        "weights",
        "testing",
        "linen",
        "nnx",
    ):
        try:
            collect(operator.attrgetter(name)(jaxpara), f"{name}.")
        except AttributeError:
            continue  # the first test below says what must be there
    return found


PUBLIC = public_names()
EVERY = pytest.mark.parametrize("name", sorted(PUBLIC))
# Type aliases carry no docstring, and constants none of their own.
DOCUMENTED = {n: v for n, v in PUBLIC.items() if inspect.isclass(v) or inspect.isfunction(v)}


def cited(text):
    """Citation keys in a text: a bracket that follows no word and opens no link."""
    for group in re.findall(r"(?<![\w\])`'])\[([a-z][\w, ]+)\](?![(\w])", text):
        keys = {k.strip() for k in group.split(",")}
        if keys & KEYS or len(keys) == 1 and not keys & AXES:
            yield from keys


def test_the_public_names_are_the_ones_that_the_design_promises():
    promised = (
        "newton_scan solve_scan SolveInfo shooting newton quasi_newton jacobi sequential auto "
        "explain_choice jacobian_structure linear_recurrence with_reset "
        "structure.Diagonal structure.Block structure.Dense "
        "Model Cell"
    )
    assert set(promised.split()) <= set(PUBLIC)
    assert any(name.startswith("cells.") for name in PUBLIC)
    assert any(name.startswith("nn.") for name in PUBLIC)
    assert any(name.startswith("train.") for name in PUBLIC)


@EVERY
def test_has_a_docstring_with_its_arguments_and_what_it_returns(name):
    if name not in DOCUMENTED:
        pytest.skip("a type alias or a value: nothing to put a docstring on")
    value = PUBLIC[name]
    text = inspect.getdoc(value) or ""
    assert text and not text.startswith(f"{value.__name__}("), f"{name} has no docstring"
    if inspect.isfunction(value):
        parameters = inspect.signature(value).parameters
        assert "Returns:" in text, f"{name}'s docstring has no Returns:"
        if parameters:
            assert "Args:" in text, f"{name}'s docstring has no Args:"
        for parameter in parameters:
            assert re.search(rf"\b{parameter}\b", text), f"{name} does not describe {parameter}"


@EVERY
def test_is_annotated(name):
    value = PUBLIC[name]
    if not inspect.isfunction(value):
        pytest.skip("not a function")
    signature = inspect.signature(value)
    bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
    assert not bare, f"{name}: no annotation on {bare}"
    assert signature.return_annotation is not signature.empty, f"{name}: no return annotation"


WHERE = (
    "a glob (`*` within a name, `**` across names), a compiled regular expression, or a function "
    "of (path, leaf); None: floating leaves of two or more axes"
)
CHOOSING = [
    n
    for n, v in PUBLIC.items()
    if inspect.isfunction(v) and "where" in inspect.signature(v).parameters
]


@pytest.mark.parametrize("name", CHOOSING)
def test_says_what_its_where_takes(name):
    assert WHERE in " ".join(inspect.getdoc(PUBLIC[name]).split())


def test_many_functions_take_a_where():
    assert {"lora", "nf4", "fake_quant", "marked"} <= set(CHOOSING)


@EVERY
def test_has_an_entry_in_methods(name):
    heading = rf"^## .*`(jp\.)?{re.escape(name)}`"
    assert re.search(heading, METHODS, re.M), f"docs/methods has no entry ## `{name}`"


@EVERY
def test_has_a_place_in_the_reference_of_the_site(name):
    pages = [p.read_text() for p in (ROOT / "docs/api").glob("*.md")]
    found = sum(len(re.findall(rf"^::: jaxpara\.{re.escape(name)}$", p, re.M)) for p in pages)
    assert found == 1, f"docs/api names `::: jaxpara.{name}` {found} times"


def test_the_site_has_every_page():
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    named = re.findall(r"- (\S+\.md)$", nav, re.M)  # that of the references is made from the .bib
    pages = [p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")]
    assert sorted(named) == sorted(pages)


@EVERY
def test_is_mentioned_in_a_test(name):
    last = name.split(".")[-1]
    tests = [p for p in (ROOT / "tests").rglob("*.py") if p.name != pathlib.Path(__file__).name]
    assert any(re.search(rf"\b{last}\b", p.read_text()) for p in tests), f"no test names {name}"


def test_every_entry_of_methods_says_when_cost_source_and_the_command_that_shows_it():
    entries = re.split(r"^## ", METHODS, flags=re.M)[1:]
    assert len(entries) > 10
    for entry in entries:
        title, body = entry.split("\n", 1)
        for label in ("When", "Cost", "Source", "Shown by"):
            assert f"**{label}**" in body, f"docs/methods: {title} has no **{label}**"


def test_methods_describes_nothing_that_is_not_there():
    for title in re.findall(r"^## (.*)$", METHODS, re.M):
        for name in re.findall(r"`(?:jp\.)?([\w.]+)`", title):
            assert name in PUBLIC, f"docs/methods describes `{name}`, which jaxpara has not"


def sources():
    for folder in ("jaxpara", "pallas_kernels", "experiments", "benchmarks"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_every_citation_is_in_the_references():
    found = 0
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for key in cited(ast.get_docstring(node) or ""):
                    found += 1
                    assert key in KEYS, f"{path.name}: [{key}] is not in docs/references.bib"
    for key in cited(METHODS):
        assert key in KEYS, f"docs/methods: [{key}] is not in docs/references.bib"
    assert found > 5
    assert set(cited("as in [nobody2020], s'[cd], x[time], [batch] and [deer, elk]")) == {
        "nobody2020",
        "deer",
        "elk",
    }


def commands(text):
    """What stands in backticks or at the beginning of a line of a code block."""
    return re.findall(r"(?:^|`)(make [a-z][^\n`]*|python -m experiments\.[^\n`]*)", text, re.M)


DOCUMENTS = [
    "README.md",
    *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md")),
]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_commands_of_the_documents_exist(document):
    found = commands((ROOT / document).read_text())
    assert found or document not in ("README.md", "docs/methods/recurrence.md")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for command in found:
        words = command.split("#")[0].split()
        if words[0] == "make":
            assert words[1] in targets, f"{document}: `{command}`: no such target"
            continue
        module = words[2].removeprefix("experiments.")
        assert (ROOT / f"experiments/{module.replace('.', '/')}.py").exists(), (
            f"{document}: `{command}`"
        )
        groups = r"(?<![\w.])(experiment|suite|sweep|model|cell|solver|mixer|optim|projection|task"
        groups += r"|contender|data)=([\w/]+)"
        for group, value in re.findall(groups, command):
            path = f"experiments/conf/{group}/{value}.yaml"
            told = path.removeprefix("experiments/") in (ROOT / document).read_text()  # to write it
            assert told or (ROOT / path).exists(), f"{document}: `{command}`: no {path}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_links_of_the_documents_lead_somewhere(document):
    path = ROOT / document
    for link in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", path.read_text()):
        assert (path.parent / link).exists(), f"{document} links to {link}"


ITEM = re.compile(r"(?:[-*]|\d+\.) ")


def glued(text):
    """First items of lists that follow a paragraph's line: the site shows them as more of it."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines = ["", *prose.splitlines()]
    for before, line in itertools.pairwise(lines):
        if ITEM.match(line) and before.strip() and not re.match(r" |[-*] |\d+\. ", before):
            yield line


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.startswith("docs/")])
def test_lists_of_the_site_follow_an_empty_line(document):
    assert list(glued((ROOT / document).read_text())) == []
    assert list(glued("said:\n- one\n  more\n- two\n\n1. three\n\n```\nx\n- y\n```")) == ["- one"]


def test_the_code_of_the_readme_runs_and_the_custom_cell_has_ten_lines_or_fewer():
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    assert blocks
    cell = next(b for b in blocks if "newton_scan" in b)
    assert len([line for line in cell.splitlines() if line.strip()]) <= 10
    assert "class " not in cell and "structure" not in cell
    namespace = {}
    for block in blocks:
        exec(block, namespace)


SPEED = re.compile(r"TB/s|microsecond|[Ff]astest|wins|in one kernel|Pallas kernel|make gpu +#")


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/methods/recurrence.md",
        "docs/methods/kernels.md",
        "docs/measured/kernels.md",
    ],
)
def test_pages_on_device_speed_say_that_no_kernel_has_run(document):
    spoken = 0
    for section in re.split(r"(?m)^(?=#+ )", (ROOT / document).read_text()):
        device = re.search(r"GPU|TPU|H100|accelerator", section)
        if device and SPEED.search(section) and "pallas_kernels/](" not in section:
            spoken += 1
            said = re.sub(r"\s+", " ", section)
            assert "has run on a GPU or a TPU yet" in said, section.splitlines()[0]
    assert spoken, "the pattern finds nothing"


def test_nothing_that_was_to_be_measured_is_left_open():
    token = "TODO-" + "MEASURE"
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *sources()]
    texts += (ROOT / "experiments").rglob("*.yaml")
    assert [p.relative_to(ROOT).as_posix() for p in texts if token in p.read_text()] == []


# What people try first: each shows itself at work.
FRONT_DOORS = (
    "newton_scan solve_scan linear_recurrence auto shooting fused newton quasi_newton jacobi "
    "sequential lora fake_quant chain lift weights.layout"
).split()


def examples(value):
    """The examples of a docstring, each beginning with nothing imported."""
    parts = (value, *vars(value).values()) if inspect.isclass(value) else (value,)
    finder = doctest.DocTestFinder(recurse=False)
    for part in parts:
        if inspect.isfunction(part) or inspect.isclass(part):
            yield from (test for test in finder.find(part, "example", globs={}) if test.examples)


SHOWN = [name for name in sorted(DOCUMENTED) if list(examples(DOCUMENTED[name]))]


@pytest.mark.parametrize("name", SHOWN)
def test_the_examples_of_a_docstring_are_so(name):
    for test in examples(DOCUMENTED[name]):
        said: list[str] = []
        assert doctest.DocTestRunner().run(test, out=said.append).failed == 0, "".join(said)


def test_front_doors_have_examples_and_a_wrong_one_is_found():
    assert set(FRONT_DOORS) <= set(SHOWN)
    (test,) = doctest.DocTestFinder().find(
        types.SimpleNamespace(__doc__=">>> 1 + 1\n3\n"), "wrong", globs={}
    )
    assert doctest.DocTestRunner().run(test, out=lambda text: None).failed == 1
