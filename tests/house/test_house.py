"""The rules of the house, enforced by parsing the sources: who imports what, and what nobody does.

Each rule is a function from a source text to its violations, so that each is also shown to bite.
"""

import ast
import pathlib
import re
import statistics
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIBRARY = sorted(p for d in ("jaxpara", "pallas_kernels") for p in (ROOT / d).rglob("*.py"))
OUTSIDE = ("benchmarks", "experiments", "tests", "tools")
OURS = LIBRARY + sorted(p for d in OUTSIDE for p in (ROOT / d).rglob("*.py"))

ALLOWED = {
    "pallas_kernels": {"jax", "numpy", "pallas_kernels"},
    "jaxpara": {"jax", "numpy", "optax", "jaxtyping", "jaxpara", "pallas_kernels"},
}
ADAPTERS = {"jaxpara/linen.py", "jaxpara/nnx.py"}  # the only two that know Flax
SHARED = {
    "types",
    "compat",
    "jaxprs",
    "tree",
    "sizes",
    "arguments",
    "matmul",
}  # what every wing may import
NOT_WINGS = {"nn", "train"}  # folders that may import wings
# The rooms of a house, from the ground up: a folder or files; what is not named is above them all.
FLOORS = {
    "experiments": (
        {"run"},
        {"data"},
        {"shell"},
        {"tasks", "text"},
        {"adapt"},
        {"sweep"},
        {"studies"},
        {"contest"},
        {"inject"},
    ),
    "jaxpara/recurrence": (
        {"structure"},
        {"lanes", "system", "wide"},
        {"kernel"},
        {"solve"},
    ),
}
MAY_IMPORT_WINGS = {"nn", "train", "testing", "linen", "nnx", "__init__"}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imported(source, path):
    """(line, dotted module) of every import, relative ones resolved, `from a import b` as a.b."""
    package = pathlib.PurePosixPath(path).parent.parts
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = [*package[: len(package) - node.level + 1], *base]
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])


def foreign_imports(source, path):
    """Imports of packages that this package of ours must not know."""
    allowed = ALLOWED[path.split("/")[0]] | ({"flax"} if path in ADAPTERS else set())
    return [
        f"{path}:{line} imports {module}"
        for line, module in imported(source, path)
        if module.split(".")[0] not in allowed | sys.stdlib_module_names
    ]


def wing_crossings(source, path):
    """Imports by which a wing meets another wing, or a shared file knows a wing."""
    place = path.removesuffix(".py").split("/")[1:]
    if place[0] in MAY_IMPORT_WINGS:
        return []
    own = {place[0]} if len(place) > 1 else set()
    return [
        f"{path}:{line} imports {module}"
        for line, module in imported(source, path)
        if (parts := module.split("."))[0] == "jaxpara"
        and (len(parts) == 1 or parts[1] not in SHARED | own)
    ]


def arrows_up(source, path):
    """Imports of a room by one below it: a floor knows itself and those under it."""
    found = []
    for house, floors in FLOORS.items():
        if not path.startswith(house + "/"):
            continue

        def floor(parts, floors=floors):
            named = [n for n, rooms in enumerate(floors) if parts and parts[0] in rooms]
            return named[0] if named else len(floors)

        inside = path.removeprefix(house + "/").removesuffix(".py").split("/")
        prefix = house.replace("/", ".") + "."
        found += [
            f"{path}:{line} imports {module}"
            for line, module in imported(source, path)
            if module.startswith(prefix)
            and floor(module.removeprefix(prefix).split(".")) > floor(inside)
        ]
    return found


def import_time_effects(source, path):
    """Environment reads and jax.config changes in code that runs when the module is imported."""
    found = []

    def visit(node):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            arguments = node.args.defaults + [d for d in node.args.kw_defaults if d]
            for child in [*arguments, *getattr(node, "decorator_list", [])]:
                visit(child)
            return
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
        if re.fullmatch(r"(os\.)?(environ|getenv)|(jax\.)?config\.update", text):
            found.append(f"{path}:{node.lineno} {text}")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def config_changes(source, path):
    """jax.config.update anywhere: a library leaves the user's configuration alone."""
    return [
        f"{path}:{node.lineno}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "jax.config.update"
    ]


def version_knowledge(source, path):
    """JAX's version or private modules, known outside a compat file."""
    if pathlib.PurePosixPath(path).name == "compat.py":
        return []
    found = [f"{path}:{n} imports {m}" for n, m in imported(source, path) if "jax._src" in m]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if re.match(r"(jax|jaxlib)\.(__version|version\b|_src)", text):
                found.append(f"{path}:{node.lineno} {text}")
    return found


def future_annotations(source, path):
    """`from __future__ import annotations`: it turns jaxtyping's checks into strings."""
    return [f"{path}:{n}" for n, m in imported(source, path) if m == "__future__.annotations"]


def systems_encoding(source, path):
    """Text files and processes in the encoding of the system: everything of ours is UTF-8."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {word.arg for word in node.keywords}
        words = [*node.args, *(word.value for word in node.keywords if word.arg == "mode")]
        modes = {word.value for word in words if isinstance(word, ast.Constant)}
        text = re.search(r"(^|\.)(open|fdopen)$|\.(read|write)_text$", called) and not any(
            isinstance(mode, str) and re.fullmatch("[rwxa+]*b[rwxa+]*", mode) for mode in modes
        )
        process = {"text", "universal_newlines"} & given
        if called != "os.open" and (text or process) and not {"encoding", None} & given:
            found.append(f"{path}:{node.lineno} {called}(): give encoding='utf-8'")
    return found


def too_long(source, path):
    lines = len(source.splitlines())
    return [f"{path}: {lines} lines"] if lines > 400 else []


RULES = {
    foreign_imports: LIBRARY,
    wing_crossings: [p for p in LIBRARY if name_of(p).startswith("jaxpara/")],
    arrows_up: OURS,
    import_time_effects: LIBRARY,
    config_changes: LIBRARY,
    version_knowledge: LIBRARY,
    future_annotations: OURS,
    systems_encoding: [p for p in OURS if not name_of(p).startswith("tests/")],
    too_long: OURS,
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_source_keeps_the_rule(rule):
    files = RULES[rule]
    assert files
    assert [v for p in files for v in rule(p.read_text(), name_of(p))] == []


@pytest.mark.parametrize(
    ("rule", "path", "bad"),
    [
        (foreign_imports, "jaxpara/tree.py", "def f():\n    import hydra"),
        (foreign_imports, "jaxpara/recurrence/scan.py", "import flax.linen"),
        (foreign_imports, "jaxpara/nn/a.py", "from experiments.data import x"),
        (foreign_imports, "pallas_kernels/a.py", "from jaxpara import types"),
        (wing_crossings, "jaxpara/recurrence/scan.py", "from jaxpara.mesh import specs"),
        (wing_crossings, "jaxpara/recurrence/scan.py", "from ..weights import lora"),
        (wing_crossings, "jaxpara/tree.py", "from jaxpara.recurrence.scan import newton_scan"),
        (wing_crossings, "jaxpara/recurrence/scan.py", "import jaxpara as jp"),
        (arrows_up, "experiments/run/loop.py", "from experiments.train import job"),
        (arrows_up, "experiments/data/text.py", "from experiments.text import sampling"),
        (arrows_up, "jaxpara/recurrence/structure/a.py", "from jaxpara.recurrence import lanes"),
        (arrows_up, "jaxpara/recurrence/solve/a.py", "import jaxpara.recurrence.choice"),
        (import_time_effects, "jaxpara/a.py", "import os\nX = os.environ['A']"),
        (import_time_effects, "jaxpara/a.py", "def f(x=os.getenv('A')): pass"),
        (import_time_effects, "jaxpara/a.py", "jax.config.update('jax_enable_x64', True)"),
        (config_changes, "jaxpara/a.py", "def f():\n    jax.config.update('a', 1)"),
        (version_knowledge, "jaxpara/a.py", "if jax.__version_info__ > (0, 11): pass"),
        (version_knowledge, "jaxpara/a.py", "from jax._src import core"),
        (future_annotations, "tests/a.py", "from __future__ import annotations"),
        (systems_encoding, "tools/a.py", "path.write_text('x')"),
        (systems_encoding, "tools/a.py", "regular(path).read_text()"),
        (systems_encoding, "tools/a.py", "path.open('w', newline='')"),
        (systems_encoding, "tools/a.py", "with open(name) as file: pass"),
        (systems_encoding, "tools/a.py", "subprocess.run(command, text=True)"),
        (too_long, "tests/a.py", "x = 1\n" * 401),
    ],
)
def test_each_rule_bites(rule, path, bad):
    assert rule(bad, path)


@pytest.mark.parametrize(
    ("rule", "path", "good"),
    [
        (foreign_imports, "jaxpara/linen.py", "import flax.linen as nn"),
        (wing_crossings, "jaxpara/recurrence/scan.py", "from jaxpara.recurrence import linear"),
        (wing_crossings, "jaxpara/recurrence/scan.py", "from jaxpara import compat"),
        (wing_crossings, "jaxpara/nn/a.py", "from jaxpara.recurrence import cells"),
        (arrows_up, "experiments/train.py", "from experiments.run import loop"),
        (arrows_up, "experiments/text/a.py", "from experiments.tasks import words"),
        (arrows_up, "jaxpara/recurrence/scan.py", "from jaxpara.recurrence.solve import cost"),
        (import_time_effects, "jaxpara/a.py", "def f():\n    return os.environ['A']"),
        (version_knowledge, "jaxpara/compat.py", "V = jax.__version_info__"),
        (systems_encoding, "tools/a.py", "path.open('rb')\npath.open(mode='xb')\nos.open(a, 0)"),
        (systems_encoding, "tools/a.py", "path.read_text(encoding=given)\nopen(a, **how)"),
        (systems_encoding, "tools/a.py", "write_text(path, 'x')\npath.read_bytes()"),
    ],
)
def test_no_rule_bites_what_is_allowed(rule, path, good):
    assert rule(good, path) == []


def test_every_room_is_there_and_holds_modules():
    for house, floors in FLOORS.items():
        for room in set().union(*floors):
            path = ROOT / house / room
            assert path.with_suffix(".py").exists() or list(path.glob("[a-z]*.py")), path
    commands = sorted(p for p in (ROOT / "experiments").glob("[a-z]*.py"))
    assert commands
    for path in commands:
        assert 'if __name__ == "__main__":' in path.read_text(), f"{path.name} is no command"


def test_every_folder_of_the_library_is_a_package_and_the_wheel_holds_only_the_library():
    for path in LIBRARY:
        assert (path.parent / "__init__.py").exists(), f"{name_of(path.parent)} has no __init__.py"
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert tools["packages"]["find"]["include"] == ["jaxpara*", "pallas_kernels*"]
    assert (ROOT / "jaxpara/py.typed").exists()
    # Every file of the library that is not Python is packed, and no pattern is idle.
    patterns = tools["package-data"]["jaxpara"]
    data = {
        p
        for p in (ROOT / "jaxpara").rglob("*")
        if p.is_file() and p.suffix not in (".py", ".pyc") and not p.name.startswith(".")
    }
    packed = [set((ROOT / "jaxpara").glob(pattern)) for pattern in patterns]
    assert set().union(*packed) == data and all(packed), patterns


def test_no_config_is_partial_and_objects_are_built_in_main_only():
    configs = sorted((ROOT / "experiments/conf").rglob("*.yaml"))
    assert configs
    assert [name_of(p) for p in configs if "_partial_" in p.read_text()] == []
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        source = path.read_text()
        if re.search(r"\binstantiate\(", source):
            # build.py is what the mains call when there is more than one object to build
            assert "@hydra.main" in source or path.name == "build.py", (
                f"{name_of(path)} builds objects below main"
            )


IMPORT_TIME = """
import time, sys, jax, jax.numpy
start = time.process_time()
import jaxpara as jp
jp.shooting, jp.newton_scan
unasked = {"optax", "jaxpara.weights", "jaxpara.nn", "jaxpara.train"} & set(sys.modules)
[getattr(jp, name) for name in jp.__all__]
seconds = time.process_time() - start
heavy = {"flax", "hydra", "omegaconf", "orbax", "matplotlib", "rich"} & set(sys.modules)
print(seconds, *sorted(unasked), *sorted(heavy))
"""


def test_jaxpara_imports_fast_and_solvers_need_no_other_wing():
    times = []
    for _ in range(5):  # a loaded machine gets more tries; an import that is slow fails them all
        out = subprocess.run(
            [sys.executable, "-c", IMPORT_TIME], cwd=ROOT, capture_output=True, text=True
        )
        assert out.returncode == 0, out.stderr
        seconds, *heavy = out.stdout.split()
        assert heavy == []
        times.append(float(seconds))
        if len(times) >= 3 and statistics.median(times) < 1:
            break
    assert min(times) < 1, f"import jaxpara took {times} s beyond jax"
