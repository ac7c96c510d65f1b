"""`make compile` and `make gpu`: what they read, what fails them, what they need."""

import ast
import os
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks import provenance
from pallas_kernels.shapes import COMPILED, Shape
from tools import compile_kernels, compile_worker, gpu_tests
from tools.compile_kernels import Job

ROOT = pathlib.Path(__file__).resolve().parents[2]

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a' for 'sm_90a'
ptxas info    : Function properties for a
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 26 registers, used 2 barriers
ptxas info    : Compiling entry function 'b' for 'sm_90a'
ptxas info    : Function properties for b
    48 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 168 registers, used 3 barriers
"""
HLO = """
  %f = f32[8]{0} fusion(%p), backend_config={"used_scoped_memory_configs":[{"memory_space":"1",\
"offset":"0","size":"99999999"}]}
  %k = f32[8]{0} custom-call(%f), custom_call_target="tpu_custom_call", backend_config={\
"scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"50331648"}],\
"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"262144"}]}
"""


def job(recurrence="gru", target="h100"):
    return Job(target, recurrence, "forward", "f32", Shape(2048, 8, 256))


def test_of_several_kernels_the_worst_registers_and_spills_count():
    found = compile_worker.ptxas_numbers(PTXAS)
    assert found == {"registers": 168, "spill_bytes": 44, "stack_bytes": 48}
    with pytest.raises(ValueError, match="ptxas reported no kernel"):
        compile_worker.ptxas_numbers("ptxas info : 0 bytes gmem")


def test_vmem_is_what_the_kernel_uses_not_its_limit_nor_a_fusions():
    assert compile_worker.vmem_kib(HLO) == 256
    with pytest.raises(ValueError, match="no Mosaic TPU kernel"):
        compile_worker.vmem_kib(HLO.split("%k")[0])


def test_spills_fail_up_to_two_states_and_errors_always():
    spilling = {"registers": 255, "spill_bytes": 8}
    assert compile_kernels.verdict(job("lstm"), spilling) == "spills 8 bytes with 2 state(s)"
    assert compile_kernels.verdict(job("slstm"), spilling) == "ok"
    assert compile_kernels.verdict(job(), {"registers": 9, "spill_bytes": 0}) == "ok"
    assert compile_kernels.verdict(job("slstm"), {"error": "no"}) == "no"


def test_a_spill_in_what_ptxas_prints_fails_the_run(tmp_path, monkeypatch, capsys):
    def compiled_by(text):
        numbers = compile_worker.ptxas_numbers(text)
        monkeypatch.setattr(compile_kernels, "work", lambda target, jobs: [numbers for _ in jobs])
        table = tmp_path / "table.md"
        call = ["--targets", "h100", "--only", "lstm forward bf16", "--output", str(table)]
        return compile_kernels.main(call), capsys.readouterr().out + table.read_text()

    monkeypatch.setattr(compile_kernels, "OLDEST", (3, 11))
    status, said = compiled_by(PTXAS)
    assert status == 1 and "spills 44 bytes with 2 state(s)" in said
    assert "0 of 1 kernels compile as they should" in said
    clean = PTXAS.replace("20 bytes spill", "0 bytes spill").replace(
        "24 bytes spill", "0 bytes spill"
    )
    assert compiled_by(clean)[0] == 0


def test_every_recurrence_pass_and_storage_is_compiled_for_every_target():
    every = compile_kernels.jobs(compile_kernels.TARGETS)
    assert len(every) == len(set(every))
    for target in compile_kernels.TARGETS:
        first = {(j.recurrence, j.which, j.storage) for j in every
                 if j.target == target and j.shape == COMPILED[0]}  # fmt: skip
        assert len(first) == 6 * 2 * 3
        products = {j.recurrence for j in every if j.target == target and j.which == "product"}
        assert products == {"int8", "int4"}
        shapes = {j.shape for j in every if j.target == target and j.which != "product"}
        assert shapes == set(COMPILED if target == "h100" else COMPILED[:2])
    chosen = compile_kernels.jobs(["v5e"], "gru bf16 backward")
    assert chosen == [Job("v5e", "gru", "backward", "bf16", COMPILED[0])]


def test_the_table_names_failures_and_drops_empty_columns():
    results = [
        (job(), {"registers": 64, "spill_bytes": 0, "stack_bytes": 0, "shared_kib": 204.0,
                 "lower_s": 1.0, "compile_s": 2.0}),
        (job("slstm"), {"error": "ValueError: too | much"}),
        (job(target="v5e"), {"vmem_kib": 18771.0, "lower_s": 0.1, "compile_s": 0.2}),
    ]  # fmt: skip
    text = compile_kernels.report(results, "Python 3")
    assert "2 of 3 kernels compile as they should" in text
    assert "| gru forward | f32 | 2048, 8, 256 | 64 | 0 | 0 | 204.0 | 1.0 | 2.0 | ok |" in text
    assert "| ValueError: too / much |" in text
    assert "| gru forward | f32 | 2048, 8, 256 | 18771 | 0.1 | 0.2 | ok |" in text


WORKER = """
import json, os, signal, sys
asked = json.load(sys.stdin)["jobs"]
for number, job in enumerate(asked):
    if job["recurrence"] == "gru":
        print("about to fail", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    print(json.dumps({"registers": number}), flush=True)
"""


def test_a_compiler_that_crashes_on_a_kernel_goes_on_with_the_next(tmp_path, monkeypatch):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/compile_worker.py").write_text(WORKER)
    monkeypatch.setattr(compile_kernels, "ROOT", tmp_path)
    wanted = [job("linear"), job("gru"), job("lstm"), job("three")]
    found = list(compile_kernels.work("h100", wanted))
    assert [r.get("registers") for r in found] == [0, None, 0, 1]
    assert found[1]["error"] == "the compiler died (-11): about to fail"


def test_a_compiler_that_is_not_there_fails_every_kernel_at_once(tmp_path, monkeypatch):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/compile_worker.py").write_text("raise ImportError('no libtpu')")
    monkeypatch.setattr(compile_kernels, "ROOT", tmp_path)
    found = list(compile_kernels.work("v5e", [job(), job("lstm")]))
    assert [r["error"] for r in found] == ["ImportError: no libtpu"] * 2


def test_a_selection_that_names_no_kernel_is_refused(capsys):
    with pytest.raises(SystemExit):
        compile_kernels.main(["--only", "gruu"])
    assert sys.version_info < (3, 12) or "names no kernel" in capsys.readouterr().err


# What `make gpu` may count on: JAX with CUDA, optax, jaxtyping, chex, pytest and what they bring.
ON_A_GPU_MACHINE = {"jax", "jaxlib", "numpy", "ml_dtypes", "optax", "jaxtyping", "chex", "pytest"}
OURS = {"jaxpara", "pallas_kernels", "benchmarks"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""


def foreign(path, seen):
    """Packages that a test file needs, through the helpers beside it, and may not count on."""
    if path in seen:
        return set()
    seen.add(path)
    found = set()
    for name in imported(path):
        if name.startswith(("tests.", "experiments.")):
            place = ROOT / name.replace(".", "/")
            inside = place / "__init__.py"
            found |= foreign(inside if inside.exists() else place.with_suffix(".py"), seen)
        elif name.split(".")[0] not in ON_A_GPU_MACHINE | OURS | sys.stdlib_module_names:
            found.add(f"{path.name}: {name}")
    return found


def test_what_make_gpu_runs_needs_nothing_but_jax_and_its_test_packages():
    files = (ROOT / "tests").rglob("test_*.py")
    tests = [p for p in files if "@pytest.mark.gpu" in p.read_text()]
    assert len(tests) >= 4
    measures = [
        ROOT / f"benchmarks/{name}.py"
        for name in "chains contenders fit_choice kernels points provenance recurrences report "
        "rows".split()
    ]
    measures += [ROOT / f"experiments/contest/{name}.py" for name in ("choice_map", "timing")]
    tools = [ROOT / "tools/gpu_tests.py", ROOT / "tools/gpu_ready.py"]
    for path in [*tests, *measures, *tools, ROOT / "tests/conftest.py"]:
        if path.name != pathlib.Path(__file__).name:
            assert foreign(path, set()) == set()
    assert foreign(ROOT / "tests/experiments/test_bench.py", set())  # the check does bite


@pytest.mark.slow
def test_make_gpu_without_a_gpu_says_what_is_missing():
    outcome = subprocess.run(
        ["sh", "tools/gpu.sh"],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "PATH": "/usr/bin:/bin",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 1
    assert "make gpu: no Python here can run it" in outcome.stderr
    assert f"{sys.executable}: JAX" in outcome.stderr and "sees no GPU" in outcome.stderr


@pytest.mark.parametrize(
    ("status", "timed", "ends", "says"),
    [
        (0, True, 0, ""),
        (3, False, 0, "7 minutes are over; the same command continues with the tests"),
        (1, False, 1, "what is wrong is not timed"),
    ],
)
def test_make_gpu_tests_first_and_times_nothing_that_is_wrong(tmp_path, status, timed, ends, says):
    # A Python that sees a GPU, as far as the script can tell.
    log, fake = tmp_path / "log", tmp_path / "python"
    fake.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\ncase "$1" in *gpu_tests.py) exit {status};; esac\n'
    )
    fake.chmod(0o755)
    outcome = subprocess.run(
        ["sh", "tools/gpu.sh", "--ops", "gru"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": str(fake), "MINUTES": "7", "RESULTS": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    ready, tests, *rest = log.read_text().splitlines()
    assert ready == "tools/gpu_ready.py"
    assert tests.startswith("tools/gpu_tests.py --seconds 4") and f"--results {tmp_path}" in tests
    assert len(rest) == timed and outcome.returncode == ends
    assert says in outcome.stdout + outcome.stderr
    for line in rest:
        assert line.startswith(f"-m benchmarks.kernels --results {tmp_path} --minutes ")
        assert line.endswith("--ops gru") and 6 < float(line.split()[5]) <= 7


def test_every_test_runs_once_before_any_runs_again():
    names = ["a[1]", "a[2]", "a[3]", "b", "c[1]", "c[2]"]
    assert gpu_tests.in_order(names) == ["a[1]", "b", "c[1]", "a[2]", "c[2]", "a[3]"]


def test_functions_then_what_users_call_run_before_all_else():
    kernels = ["tests/kernels/test_kernels_gpu.py::a[1]", "tests/kernels/test_kernels_gpu.py::a[2]"]
    users = ["tests/kernels/test_platforms.py::b[1]", "tests/kernels/test_platforms.py::b[2]"]
    functions = [
        "tests/kernels/test_mosaic_functions.py::c[1]",
        "tests/kernels/test_mosaic_functions.py::c[2]",
    ]
    assert gpu_tests.in_order([*kernels, *functions, *users]) == [*functions, *users, *kernels]
    for file in gpu_tests.FIRST:
        assert "@pytest.mark.gpu" in (ROOT / "tests/kernels" / file).read_text()


ABOUT = {"device": "Some GPU", "jax": "0.12", "code": "abc", "commit": "d", "date": "2026-11-22"}
SUITE = """
import os, pytest

@pytest.mark.parametrize("n", [1, 2])
def test_good(n):
    pass

def test_bad():
    assert os.environ.get("MENDED"), "wrong by 3"
"""


def suite(tmp_path, seconds=60.0, about=ABOUT):
    """A session of the tests above: what ran, and the plugin."""
    (tmp_path / "test_suite.py").write_text(SUITE)
    path = tmp_path / "tests.csv"
    session = gpu_tests.Session(lambda: (path, about), seconds)
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:warnings", f"--rootdir={tmp_path}"]
    session.code = pytest.main([*options, str(tmp_path)], plugins=[session])
    sys.modules.pop("test_suite", None)
    return session, gpu_tests.outcomes(path, about["code"], about["device"])


@pytest.mark.slow
def test_device_tests_continue_and_the_file_names_failures(tmp_path, monkeypatch):
    session, found = suite(tmp_path, seconds=-1.0)
    assert session.left == 3 and found == {}
    assert gpu_tests.status(session, session.code) == gpu_tests.OUT_OF_TIME
    session, found = suite(tmp_path)
    assert (session.left, session.failed) == (0, 1)
    assert gpu_tests.status(session, session.code) == 1
    assert found == {"test_suite.py::test_good[1]": "passed", "test_suite.py::test_bad": "failed",
                     "test_suite.py::test_good[2]": "passed"}  # fmt: skip
    assert "wrong by 3" in (tmp_path / "tests.csv").read_text()
    monkeypatch.setenv("MENDED", "1")
    session, found = suite(tmp_path)  # what passed is not run again
    assert (session.left, session.failed) == (0, 0) and set(found.values()) == {"passed"}
    assert gpu_tests.status(session, session.code) == 0
    changed = ABOUT | {"code": "other sources"}
    assert len(suite(tmp_path, about=changed)[1]) == 3


@pytest.mark.slow
def test_a_device_test_that_killed_its_process_counts_as_failed(tmp_path):
    name = "test_suite.py::test_good[1]"
    killed = gpu_tests.Session(lambda: (tmp_path / "tests.csv", ABOUT), 9.0)
    killed.pytest_sessionstart()
    killed.pytest_runtest_logstart(name)
    for _ in range(2):
        session, found = suite(tmp_path)
        assert found[name] == gpu_tests.DIED and session.failed == 2  # and the one that is bad


@pytest.mark.parametrize("code", [2, 3, 4])  # interrupted, broken inside, wrongly called
def test_a_pytest_that_ran_no_test_is_a_failure(code):
    session = gpu_tests.Session(lambda: (pathlib.Path("tests.csv"), ABOUT), 9.0)
    session.left = 7
    assert gpu_tests.status(session, code) == 1


@pytest.mark.slow
def test_the_device_tests_start_as_make_gpu_starts_them(tmp_path):
    # On a CPU all are skipped; that they get so far needs a JAX that nobody has used before.
    outcome = subprocess.run(
        [sys.executable, "tools/gpu_tests.py", "--results", str(tmp_path), "-k", "bits"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0 and "0 tests left" in outcome.stdout, outcome.stdout[-2000:]
    (path,) = tmp_path.glob("*-tests-cpu.csv")
    assert "test_on_a_gpu_two_calls_give_the_same_bits[gru],skipped" in path.read_text()


def test_results_name_the_commit_or_without_git_the_sources(monkeypatch):
    assert re.fullmatch(r"[0-9a-f]{10,}(-dirty)?|code-[0-9a-f]{12}", provenance.commit())

    def no_git(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert provenance.commit() == f"code-{provenance.code()}"


def test_a_table_of_compiled_kernels_holds_while_their_sources_are_the_same(tmp_path, monkeypatch):
    for source in provenance.COMPILED:
        assert (ROOT / source).exists()
    (tmp_path / "kernel").mkdir()
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "kernel/a.py").write_text("one")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setattr(provenance, "COMPILED", ("kernel",))
    assert provenance.compiled() is None
    table = tmp_path / "benchmarks/results/2026-01-01-compile.md"
    table.write_text(f"by jax, sources {provenance.code(provenance.COMPILED)}.")
    assert provenance.compiled() == table
    (tmp_path / "kernel/a.py").write_text("two")
    assert provenance.compiled() is None


@pytest.mark.slow
def test_the_device_tests_are_found_where_only_jax_is_installed():
    # What a bare environment lacks fails on import, as it does there.
    program = """
import importlib.abc, sys, pytest
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in "hydra omegaconf flax orbax matplotlib rich grain haiku equinox".split():
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
sys.exit(pytest.main(["-q", "-m", "gpu", "--collect-only"]))
"""
    outcome = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stdout[-2000:]
    for file in ("gpu", "gpu_backward"):
        assert f"tests/kernels/test_kernels_{file}.py::" in outcome.stdout
