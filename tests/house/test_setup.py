"""tools/python.sh picks a Python that can make an environment, and says what is missing."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def fake(folder, name, *, runs=True, new=True, venv=True):
    """An interpreter as the script sees it: one that runs, is 3.11 or newer, has venv, or not."""
    folder.mkdir(parents=True, exist_ok=True)
    script = f"""#!/bin/sh
    {"" if runs else "exit 127"}
    case "$2" in
      *"(3, 11)"*) exit {0 if new else 1} ;;
      *ensurepip*) exit {0 if venv else 1} ;;
      *print*) echo 3.12 ;;
    esac
    """
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)
    return str(folder / name)


def pick(tmp_path, *versions, path=(), python=None):
    env = {
        "PATH": os.pathsep.join([*map(str, path), "/nowhere"]),
        "HOME": str(tmp_path),
        "PYENV_ROOT": str(tmp_path / "pyenv"),
    }
    if python is not None:
        env["PYTHON"] = python
    return subprocess.run(
        ["/bin/sh", str(ROOT / "tools/python.sh"), *versions],
        env=env,
        capture_output=True,
        text=True,
    )


def test_without_a_python3_the_newest_that_runs_is_picked_not_a_failing_shim(tmp_path):
    fake(tmp_path / "a", "python3.13", runs=False)  # what pyenv leaves for unselected versions
    fake(tmp_path / "a", "python3.11")
    best = fake(tmp_path / "b", "python3.12")
    out = pick(tmp_path, path=[tmp_path / "a", tmp_path / "b"])
    assert (out.returncode, out.stdout.strip()) == (0, best)


def test_pyenv_versions_are_found_without_being_selected(tmp_path):
    fake(tmp_path / "a", "python3.12", runs=False)
    real = fake(tmp_path / "pyenv/versions/3.12.1/bin", "python3.12")
    assert pick(tmp_path, path=[tmp_path / "a"]).stdout.strip() == real


def test_a_plain_python3_serves_when_it_is_new_enough(tmp_path):
    fake(tmp_path / "a", "python3", new=False)
    assert pick(tmp_path, path=[tmp_path / "a"]).returncode == 1
    only = fake(tmp_path / "b", "python3")
    assert pick(tmp_path, path=[tmp_path / "b"]).stdout.strip() == only


def test_the_users_own_python3_comes_before_newer_ones(tmp_path):
    fake(tmp_path / "a", "python3.13")
    own = fake(tmp_path / "b", "python3")
    assert pick(tmp_path, path=[tmp_path / "a", tmp_path / "b"]).stdout.strip() == own


def test_asked_versions_are_the_only_ones_considered(tmp_path):
    fake(tmp_path / "a", "python3.12")
    out = pick(tmp_path, "3.11", path=[tmp_path / "a"])
    assert out.returncode == 1 and "none of these Pythons is here: 3.11" in out.stderr


def test_PYTHON_overrides_by_name_or_path_and_is_an_error_when_unusable(tmp_path):
    fake(tmp_path / "a", "python3.13")
    named = fake(tmp_path / "a", "python3.11")
    assert pick(tmp_path, path=[tmp_path / "a"], python="python3.11").stdout.strip() == named
    assert pick(tmp_path, path=[tmp_path / "a"], python=named).stdout.strip() == named
    out = pick(tmp_path, path=[tmp_path / "a"], python="python2")
    assert out.returncode == 1 and "PYTHON=python2" in out.stderr and "3.11" in out.stderr


def test_a_missing_venv_is_answered_with_what_to_install(tmp_path):
    bare = fake(tmp_path / "a", "python3.12", venv=False)
    out = pick(tmp_path, path=[tmp_path / "a"])
    assert out.returncode == 1 and out.stdout == ""
    assert bare in out.stderr and "apt install python3-venv" in out.stderr
    whole = fake(tmp_path / "a", "python3.11")  # an older one with venv is better than none
    assert pick(tmp_path, path=[tmp_path / "a"]).stdout.strip() == whole


def test_nothing_at_all_is_answered_with_what_to_install(tmp_path):
    out = pick(tmp_path)
    assert out.returncode == 1 and "no Python 3.11 or newer" in out.stderr
    assert "PYTHON=/path/to" in out.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="the Makefile needs a POSIX shell")
def test_make_alone_lists_the_commands():
    out = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    for command in ("run", "test", "check", "bench", "notebooks", "gpu", "clean", "help"):
        assert f"make {command} " in out.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="the Makefile needs a POSIX shell")
def test_make_refuses_a_setting_that_it_would_not_pass_on():
    def made(*arguments):
        return subprocess.run(
            ["make", "-n", "-C", str(ROOT), *arguments], capture_output=True, text=True
        )

    said = made("run", "steps=20")
    assert said.returncode == 2
    assert 'make does not pass on steps; type make run ARGS="steps=20"' in said.stderr
    given = made("run", "ARGS=steps=20 mixer=attention", "VENV=v", "PYTHON=p")
    assert (
        "v/bin/python -m experiments.train experiment=lm steps=20 mixer=attention" in given.stdout
    )


def test_tests_that_are_not_there_are_named():
    command = [sys.executable, "-m", "pytest", "-n", "2", "tests/house/test_hous.py::x"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode != 0 and "there is no tests/house/test_hous.py" in out.stderr + out.stdout
