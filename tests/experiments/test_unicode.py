"""Text where the system has only ASCII: files are UTF-8, and nothing ends a command."""

import io
import os
import subprocess
import sys
from pathlib import Path

from experiments.run import unicode
from tests.experiments.run_folders import config, make_run

ROOT = Path(__file__).resolve().parents[2]
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def in_ascii(folder, *words):
    known = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**known, **ASCII, "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


def test_runs_of_any_name_are_compared_where_the_system_knows_only_ascii(tmp_path):
    for number, name in enumerate(("é", "日")):
        make_run(tmp_path / "é" / f"{name}{number}", config(name=f"{name} \ud800", seed=number))
    given = ("runs=é", "output=t.md", "columns=[name]")
    said = in_ascii(tmp_path, "-m", "experiments.compare", *given)
    assert "é0" in said.decode() and b"? ?" in said  # a folder's name is its bytes
    table = (tmp_path / "t.md").read_text(encoding="utf-8")
    assert "| é0 | é ? |" in table and "| 日1 | 日 ? |" in table
    in_ascii(tmp_path, "-m", "experiments.plot", "runs=é", "group_by=name", "output=x.png")
    assert "é" in (tmp_path / "x.csv").read_text(encoding="utf-8")


def test_a_model_may_write_what_the_terminal_does_not_have(tmp_path):
    program = """
import sys
from experiments.shell.commandline import command
def main():
    sys.stdout.write("a\\u00e9\\udcc3\\udca9\\ud800\\u65e5b\\n")
    print("\\u00e9", file=sys.stderr)
command(main)()
"""
    assert in_ascii(tmp_path, "-c", program) == "a?é??b\n".encode()


def test_the_streams_of_a_terminal_in_utf_8_show_everything(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="utf-8"))
    unicode.show_all()
    print("é日 \udcff\ud800", flush=True)
    assert shown.getvalue() == "é日 ".encode() + b"\xff?\n"
