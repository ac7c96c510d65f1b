"""Damaged, missing and odd files: every command ends in at most three lines, and loses nothing."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import (
    compare,
    evaluate,
    export_adapters,
    finetune,
    generate,
    plot,
    reproduce,
    train,
)
from experiments.adapt import adapter_files, peft_files
from experiments.data import files, huggingface, jsonl, parquet
from experiments.run import folders, metrics
from experiments.run.folders import RunError
from experiments.shell.explanations import explain
from experiments.studies import finetune_figure, mixers, state_tracking_figure
from experiments.sweep import run_sets
from experiments.text.prompts import read_prompts, stop_strings
from tests.experiments.programs import ending
from tests.experiments.run_folders import config, make_run
from tests.experiments.saved_run import save_run

ROOT = Path(__file__).resolve().parents[2]
DEEP = "[" * 100_000


def replaced(content):
    def damage(path):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def changed(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def missing(path):
    path.unlink()


def directory(path):
    path.unlink()
    path.mkdir()


def broken_link(path):
    path.unlink()
    path.symlink_to(path.parent / "gone")


FAULTS = {
    "missing": missing,
    "empty": replaced(""),
    "cut": changed(lambda raw: raw[: len(raw) * 2 // 3]),
    "BOM": changed(lambda raw: b"\xef\xbb\xbf" + raw),
    "CRLF": changed(lambda raw: raw.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")),
    "NUL": changed(lambda raw: raw[:20] + b"\0" + raw[20:]),
    "not UTF-8": changed(lambda raw: raw[:20] + b"\xff\xfe" + raw[20:]),
    "directory": directory,
    "broken link": broken_link,
    "deep": replaced(DEEP),
    "a list": replaced("[1, 2]"),
    "a number": replaced("7"),
    "binary": replaced(bytes(range(256))),
}
HARMLESS = {"BOM", "CRLF"}  # what editors and other systems make of a text
# Without a summary or an environment a run is one that goes on; cut off, YAML may still be YAML.
ALLOWED = {
    "config.yaml": HARMLESS | {"cut"},
    "summary.json": HARMLESS | {"missing", "directory", "broken link"},
    "env.json": HARMLESS | {"missing", "directory", "broken link"},
    "metrics.csv": HARMLESS | {"cut"},
}


def folder_bytes(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def two_runs(tmp_path):
    """A whole run, and one to be damaged."""
    summary = {"status": "finished", "judged_by": ["validation_bits_per_byte", "min"], "seconds": 1}
    for seed in (0, 1):
        make_run(
            tmp_path / f"seed{seed}",
            config(seed=seed),
            summary=summary,
            environment={"git_commit": "0" * 40},
        )
    return tmp_path


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ALLOWED)
def test_a_damaged_run_is_left_out_by_name_and_the_others_are_read(two_runs, name, fault):
    FAULTS[fault](two_runs / "seed1" / name)
    before = folder_bytes(two_runs)
    found, left_out = run_sets.read_all(str(two_runs))
    assert found[0].folder.name == "seed0"
    if fault in ALLOWED[name]:
        assert len(found) == 2
    else:
        # Without a config the folder is no run, and nobody asked for it; whether a link that leads
        # nowhere is a file is another question in every Python.
        counts = {"missing": (0,), "broken link": (0, 1)} if name == "config.yaml" else {}
        assert len(found) == 1 and len(left_out) in counts.get(fault, (1,))
        assert all("seed1" in line and line.count("\n") <= 2 for line in left_out), left_out
    assert folder_bytes(two_runs) == before


COMMANDS = [compare, plot, mixers, finetune_figure, state_tracking_figure]


@pytest.mark.parametrize("program", COMMANDS, ids=lambda program: program.__name__)
@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv"])
def test_a_command_on_a_damaged_run_ends_in_three_lines(two_runs, program, name):
    FAULTS["NUL"](two_runs / "seed1" / name)
    said = ending(program, two_runs, f"runs={two_runs / 'seed1'}")
    assert said.startswith("error: ") and said.count("\n") <= 2 and name in said


@pytest.mark.parametrize("program", [mixers, finetune_figure, state_tracking_figure])
def test_runs_of_another_kind_are_refused_by_what_they_lack(two_runs, program):
    said = ending(program, two_runs, f"runs={two_runs}")
    assert said.startswith("error: ") and said.count("\n") <= 2


@pytest.mark.parametrize(
    "program, key",
    [(generate, "run"), (evaluate, "run"), (export_adapters, "run"), (finetune, "from")],
)
@pytest.mark.parametrize("fault", ["missing", "empty", "NUL", "directory", "a list"])
def test_a_run_without_a_sound_config_is_refused(tmp_path, program, key, fault):
    folder = tmp_path / "run [1] é"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: {_target_: jaxpara.nn.decoder}\n")
    FAULTS[fault](folder / "config.yaml")
    said = ending(program, tmp_path, f"{key}='{folder}'")
    assert said.startswith("error: ") and said.count("\n") <= 2 and "run [1] é" in said
    assert [path.name for path in tmp_path.iterdir()] == ["run [1] é"]


@pytest.mark.parametrize(
    "text",
    [
        "!!bool abc",
        "!!int ''",
        "!!float ''",
        "!!timestamp abc",
        "!!binary 1",
        "!!python/name:os.fork",
    ],
)
def test_a_tag_of_yaml_that_does_not_fit_is_damage(tmp_path, text):
    (tmp_path / "config.yaml").write_text(f"a: {text}\n")
    with pytest.raises(RunError, match="config.yaml"):
        folders.load_config(tmp_path)


def test_yaml_that_stands_for_more_than_memory_holds_is_refused(tmp_path):
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    with pytest.raises(RunError, match="YAML aliases"):
        folders.load_config(tmp_path)
    for deep in ("a: " + "[" * 150 + "]" * 150, "- " * 150 + "x", "? " * 150):
        (tmp_path / "config.yaml").write_text(deep)
        with pytest.raises(RunError, match="nests more than 100 deep"):
            folders.load_config(tmp_path)
    (tmp_path / "config.yaml").write_text("a: " + "x" * folders.LARGEST_CONFIG)
    with pytest.raises(RunError, match="characters"):
        folders.load_config(tmp_path)


def test_what_a_run_lacks_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("steps: 3\n")
    assert "has no model" in ending(generate, tmp_path, f"run={tmp_path}")
    assert "has no model, data, evaluation" in ending(evaluate, tmp_path, f"run={tmp_path}")


def test_a_damaged_summary_counts_as_unfinished_and_a_damaged_environment_is_kept(tmp_path, capsys):
    (tmp_path / "summary.json").write_text('{"status": "finis')
    assert folders.status(tmp_path) is None and "counts as unfinished" in capsys.readouterr().out
    (tmp_path / "env.json").write_text("{")
    folders.close_run(tmp_path, {"status": "finished", "seconds": 2.0})
    assert (tmp_path / "env.damaged.json").read_text() == "{"
    assert json.loads((tmp_path / "env.json").read_text()) == {"seconds": 2.0}
    assert folders.status(tmp_path) == "finished"


# -- tables


@pytest.mark.parametrize(
    "raw, found",
    [
        (b"step,loss\r\n1,0.5\r\n", {"step": [1.0], "loss": [0.5]}),
        (b"\xef\xbb\xbfstep,loss\n1,\n", {"step": [1.0], "loss": [None]}),
        # a killed process left this of a row: 0.12 of 0.1234 must not count as a number
        (b"step,loss\n1,0.5\n2,0.12", {"step": [1.0], "loss": [0.5]}),
        (b"step,loss\n1,0.5\n2", {"step": [1.0], "loss": [0.5]}),
        (b"step,loss\n", {"step": [], "loss": []}),
        (b"step,lo", {}),
        (b"", {}),
        (b"step,loss\n1,nan\n", {"step": [1.0], "loss": [np.nan]}),
        (b"step,loss\n1,2,3\n", "line 2 has 3 cells, the header 2"),
        (b"step,loss\n1\n2,3\n", "line 2 has 1 cells, the header 2"),
        (b"step,loss\n1,0.5\n2,x\n", "line 3, column loss: 'x'"),
        (b"step,loss\n1,\x000.5\n", "line 2 has a NUL byte"),
        (b"step,l\xffss\n1,0.5\n", "byte 6 is not UTF-8"),
        (b"step,step\n1,2\n", "two columns have the same name"),
    ],
)
def test_tables_are_read_whole_or_refused_by_line(tmp_path, raw, found):
    (tmp_path / "metrics.csv").write_bytes(raw)
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            metrics.read(tmp_path / "metrics.csv")
    else:
        np.testing.assert_equal(metrics.read(tmp_path / "metrics.csv"), found)


# -- data and prompts


def test_a_mark_of_the_byte_order_is_not_text(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbfdef\r\n")
    assert files.read_text(path, encoding="utf-8") == "def\r\n"
    assert read_prompts(str(path), field="prompt") == ["def"]
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert list(jsonl.read(path, field="text").values()) == [b"a", b"b"]


@pytest.mark.parametrize("line", [DEEP, '{"a":' * 50_000, "9" * 5000, '{"text": "a"', "\x00"])
def test_json_beyond_measure_is_an_error_with_its_line(tmp_path, line):
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"text": "a", "prompt": "b"}}\n{line}\n')
    with pytest.raises(ValueError, match="line 2|NUL byte") as raised:
        jsonl.read(path, field="text")
    assert str(raised.value).count("\n") == 0 and len(str(raised.value)) < 500
    with pytest.raises(RunError, match="line 2"):
        read_prompts(str(path), field="prompt")
    with pytest.raises(RunError, match="is not a JSON list"):
        stop_strings(DEEP)


@pytest.mark.parametrize("cut", [0, 3, 100, -8, -1])
def test_cut_parquet_is_refused_by_name(tmp_path, cut):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(arrow.table({"text": ["a", "b"]}), path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="t.parquet cannot be read as Parquet"):
        parquet.read(path, field="text")


def test_a_stream_that_breaks_says_after_which_record():
    def records():
        yield {"text": "a"}
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")

    read = huggingface._readable(records(), "data set 'x'")
    assert next(read) == {"text": "a"}
    with pytest.raises(ValueError, match="after record 1 its files cannot be read .Compressed"):
        next(read)


# -- adapters


@pytest.mark.parametrize("fault", ["empty", "cut", "NUL", "deep", "a list", "binary"])
def test_malformed_adapter_configs_are_refused(tmp_path, fault):
    (tmp_path / peft_files.CONFIG).write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    (tmp_path / peft_files.TENSORS).write_bytes(b"")
    FAULTS[fault](tmp_path / peft_files.CONFIG)
    with pytest.raises(RunError, match="adapter_config.json"):
        peft_files.load(tmp_path, {})


@pytest.mark.parametrize("wrong", [{"r": "8"}, {"r": 0}, {"lora_alpha": None}])
def test_adapters_with_odd_numbers_are_refused(tmp_path, wrong):
    known = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **wrong}
    (tmp_path / peft_files.CONFIG).write_text(json.dumps(known))
    (tmp_path / peft_files.TENSORS).write_bytes(b"")
    with pytest.raises(RunError, match="numbers above 0"):
        peft_files.load(tmp_path, {})


@pytest.mark.parametrize(
    "raw", [b"", b"\0" * 8, b"\xff" * 64, (10**9).to_bytes(8, "little") + b"{}"]
)
def test_malformed_tensors_are_refused(tmp_path, raw):
    pytest.importorskip("safetensors")
    known = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (tmp_path / peft_files.CONFIG).write_text(json.dumps(known))
    (tmp_path / peft_files.TENSORS).write_bytes(raw)
    with pytest.raises(RunError, match="adapter_model.safetensors is damaged"):
        peft_files.load(tmp_path, {})


def test_damaged_adapters_of_a_run_are_refused(tmp_path):
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "_METADATA").write_text("{")
    with pytest.raises(RunError, match="digests.json is missing.*not written"):
        adapter_files.load(tmp_path)


# -- places


@pytest.mark.parametrize("kind", ["EACCES", "EROFS", "ENOSPC", "ENAMETOOLONG", "ENOTDIR", "ELOOP"])
def test_what_the_system_refuses_is_one_line_with_the_place(kind):
    number = getattr(errno, kind)
    said = explain(OSError(number, os.strerror(number), "/some/place"))
    assert said.startswith(f"/some/place: {os.strerror(number)}; ") and "\n" not in said


def test_a_folder_where_nothing_can_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in ("/proc/nowhere/run", tmp_path / "file" / "run", "x" * 300):
        said = ending(train, tmp_path, f"hydra.run.dir={place}")
        assert said.startswith("error: ") and "\n" not in said, said
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_ends_a_command_in_one_line(two_runs, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "plots/x.png")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    said = ending(plot, two_runs, f"runs={two_runs}")
    assert said.startswith("error: plots/x.png: No space left on device; make room, then repeat")
    assert "\n" not in said


def test_an_output_that_is_a_folder_is_refused(two_runs):
    (two_runs / "out.png").mkdir()
    said = ending(plot, two_runs, f"runs={two_runs}", f"output={two_runs / 'out.png'}")
    assert "Is a directory; give a file" in said


def test_reproduce_reads_damaged_summaries_as_none(tmp_path, monkeypatch):
    trial = reproduce.Trial("experiments.train", [], 1.0, [])
    monkeypatch.setattr(
        reproduce.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0)
    )
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "summary.json").write_text("{")
    assert reproduce.run_trial(trial, tmp_path / "x") == ({}, None)


def test_a_real_process_ends_with_one_and_no_traceback(tmp_path):
    save_run(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("model: [")
    command = [sys.executable, "-m", "experiments.generate", f"run={tmp_path / 'run'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert out.returncode == 1 and out.stdout == ""
    assert out.stderr.startswith("error: ") and out.stderr.count("\n") <= 3, out.stderr
