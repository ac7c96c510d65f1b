"""The table of a sweep: each start shows its own jobs, and the files of others stay."""

import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments.run import folders, records
from experiments.sweep import outcomes
from tests.experiments import sweep_program
from tests.experiments.programs import everything, statuses, sweep

ROOT = Path(__file__).resolve().parents[2]


def test_a_refused_job_is_in_the_table_whatever_the_next_one_does_in_its_folder(tmp_path, capfd):
    OmegaConf.register_new_resolver("odd", lambda x: x % 2, replace=True)
    here = ("hydra.sweep.dir=s", "hydra.sweep.subdir='odd-${odd:${x}}'")
    assert sweep(tmp_path, "-m", "x=1,3", *here) == 1
    assert statuses(capfd.readouterr().out) == {"x=1": "finished", "x=3": "refused"}
    assert sweep(tmp_path, "-m", "x=3,1", *here) == 1
    assert statuses(capfd.readouterr().out) == {"x=3": "refused", "x=1": "finished before"}


def test_two_sweeps_in_one_folder_show_each_its_own_jobs(tmp_path, capfd):
    here = ["hydra.sweep.dir=s", "hydra.sweep.subdir=${act}-${x}"]
    other = subprocess.Popen(
        [sys.executable, sweep_program.__file__, "-m", "act=sleep,finish", "x=7", *here],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "s" / "sleep-7" / "visits").exists():
            assert other.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        assert sweep(tmp_path, "-m", "x=1,2", *here) == 0
        assert statuses(capfd.readouterr().out) == {"x=1": "finished", "x=2": "finished"}
        other.send_signal(signal.SIGINT)
        assert statuses(other.communicate(timeout=60)[0]) == {"act=sleep x=7": "no ending"}
    finally:
        other.kill()


@pytest.mark.parametrize("theirs", ["error.txt", "metrics.csv"])
def test_the_files_of_others_in_a_jobs_folder_stay(tmp_path, capfd, theirs):
    folder = tmp_path / "s" / "x1"
    (folder / records.FOLDER).mkdir(parents=True)
    for path in (folder / theirs, folder / records.FOLDER / "config.yaml"):
        path.write_text("mine")
    before = everything(folder)
    assert sweep(tmp_path, "-m", "x=1,2", "hydra.sweep.dir=s", "hydra.sweep.subdir=x${x}") == 1
    shown = capfd.readouterr()
    assert statuses(shown.out) == {"x=1": "refused", "x=2": "finished"}
    assert f"holds {theirs} but no config.yaml" in shown.err
    assert everything(folder) == before


def test_a_job_whose_record_cannot_be_written_is_in_the_table(tmp_path, capfd):
    assert sweep(tmp_path, "-m", "x=1,2", "hydra.sweep.dir=s") == 0
    [folder] = tmp_path.glob("s/x-1-*")
    shutil.rmtree(folder / records.FOLDER)
    (folder / records.FOLDER).touch()
    (folder / "error.txt").mkdir()  # a folder where the traceback would go
    capfd.readouterr()
    assert sweep(tmp_path, "-m", "x=1,2", "hydra.sweep.dir=s") == 0
    assert set(statuses(capfd.readouterr().out).values()) == {"finished before"}
    (folder / folders.SUMMARY).unlink()
    assert sweep(tmp_path, "-m", "x=1,2", "hydra.sweep.dir=s", "act=finish") == 0


def test_an_error_that_cannot_be_written_down_is_shown(tmp_path, capfd):
    assert sweep(tmp_path, "-m", "act=bug,finish", "hydra.sweep.dir=s") == 1
    [folder] = tmp_path.glob("s/act-bug-*")
    (folder / "error.txt").unlink()
    (folder / "error.txt").mkdir()
    capfd.readouterr()
    assert sweep(tmp_path, "-m", "act=bug,finish", "hydra.sweep.dir=s") == 1
    shown = capfd.readouterr()
    assert statuses(shown.out) == {"act=bug": "failed", "act=finish": "finished before"}
    assert "ZeroDivisionError: a bug" in shown.err and "Traceback" in shown.err


@pytest.mark.parametrize(("place", "code"), [("/dev/full", 1)])
def test_a_sweep_whose_table_cannot_be_printed_ends_with_a_line(tmp_path, place, code):
    with open(place, "w") as full:
        end = subprocess.run(
            [sys.executable, sweep_program.__file__, "-m", "x=1,2"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert end.returncode == code and "Traceback" not in end.stderr
    assert "No space left on device" in end.stderr


def test_a_sweep_has_one_folder_whatever_varies(tmp_path, capfd):
    for varying, acts in (("name=a,b", "act=finish"), ("name=n_${act}", "act=finish,fail")):
        code = sweep(tmp_path, "-m", acts, varying)
        shown = capfd.readouterr().out
        expected = ["finished", "failed" if "fail" in acts else "finished"]
        assert list(statuses(shown).values()) == expected and code == int("failed" in expected)
        [line] = re.findall("compare runs=(.*)", shown)
        assert "2 jobs" in shown and len(list((tmp_path / line).glob("*/config.yaml"))) == 2
    assert len(list(tmp_path.rglob("multirun.yaml"))) == 2
    assert not list(tmp_path.rglob(outcomes.NOTES))


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("s/${x}", "x"),
        ("s/${act}/${x}", "x"),
        ("s/${oc.select:x}", "x"),
        ("s/${hydra.job.num}", "a job's own number or name"),
        ("s/${hydra:job.num}", "a job's own number or name"),
        ("s/${job_folder:}", "a job's own number or name"),
        ("s/${hydra.job.override_dirname}", "a job's own number or name"),
    ],
)
def test_a_folder_of_the_sweep_that_varies_is_refused(tmp_path, capfd, place, what):
    given = ("-m", "x=1,2", f"hydra.sweep.dir={place}", "hydra.sweep.subdir=${hydra.job.num}")
    assert sweep(tmp_path, *given) == 1
    assert f"expected one folder for all jobs, and {what} varies" in capfd.readouterr().err
    assert not list(tmp_path.rglob("config.yaml"))


def test_no_job_is_run_through_a_link(tmp_path, capfd):
    (tmp_path / "else").mkdir()
    (tmp_path / "multirun").mkdir()
    assert sweep(tmp_path, "-m", "name=a,b") == 0
    [job] = tmp_path.glob("multirun/*/name/name-b-*")
    shutil.rmtree(job)
    job.symlink_to(tmp_path / "else")
    assert sweep(tmp_path, "-m", "name=a,b") == 1
    assert "is a link to" in capfd.readouterr().err and not list((tmp_path / "else").iterdir())


def test_the_next_commands_can_be_pasted_into_a_shell(tmp_path, capfd):
    given = ("hydra.sweep.dir='s $HOME [1]'", "hydra.sweep.subdir=${hydra.job.num}")
    assert sweep(tmp_path, "-m", "x=1,2", *given) == 0
    [line] = [one for one in capfd.readouterr().out.splitlines() if "compare" in one]
    assert shlex.split(line)[-1] == "runs=s $HOME [1]"


def test_a_file_that_may_not_be_read_refuses_that_job_alone(tmp_path, capfd, monkeypatch):
    assert sweep(tmp_path, "-m", "x=1,2", "hydra.sweep.dir=s") == 0
    [folder] = tmp_path.glob("s/x-1-*")
    read = folders.read_summary

    def closed(place):
        if place == folder:
            raise PermissionError(errno.EACCES, "Permission denied", f"{place}/summary.json")
        return read(place)

    monkeypatch.setattr(folders, "read_summary", closed)
    capfd.readouterr()
    assert sweep(tmp_path, "-m", "x=1,2", "hydra.sweep.dir=s") == 1
    shown = capfd.readouterr()
    assert statuses(shown.out) == {"x=1": "refused", "x=2": "finished before"}
    assert "summary.json: Permission denied" in shown.out
    assert not list(tmp_path.rglob(outcomes.NOTES))


def test_a_job_whose_folder_cannot_be_made_ends_the_sweep_and_says_so(tmp_path, capfd):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "x2").touch()
    given = ("hydra.sweep.dir=s", "hydra.sweep.subdir=x${x}")
    assert "x2" in sweep(tmp_path, "-m", "x=1,2,3", *given)
    shown = capfd.readouterr().out
    assert statuses(shown) == {"x=1": "finished"}
    assert "the sweep has ended early: further jobs were not begun" in shown


@pytest.mark.parametrize("given", [("-m", "x=1,2", "act=finish,fail"), ("steps=0",)])
def test_an_error_is_a_line_with_stdout_closed_too(tmp_path, given):
    end = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, sweep_program.__file__, *given],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert end.returncode == 1 and "Traceback (" not in end.stderr and "error: " in end.stderr
    assert len(list(tmp_path.rglob("error.txt"))) == 2 * ("-m" in given)


def test_a_sweep_without_its_callback_is_refused(tmp_path, capfd):
    assert "hydra.callbacks.sweep must stay" in sweep(
        tmp_path, "-m", "x=1,2", "hydra.callbacks.sweep=null"
    )


@pytest.mark.parametrize("start", ["..", "../../keep", "/tmp/keep", "a5", "null", "''"])
def test_the_name_of_a_start_is_no_setting(tmp_path, capfd, start):
    kept = tmp_path / "s" / "keep" / "important"
    kept.parent.mkdir(parents=True)
    kept.touch()
    given = ("-m", "x=1,2", "hydra.sweep.dir=s", f"hydra.callbacks.sweep.notes={start}")
    assert sweep(tmp_path, *given) == 1
    assert "is drawn for each start of a sweep" in capfd.readouterr().err and kept.exists()
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["keep"]


def test_a_job_among_the_notes_is_refused(tmp_path, capfd):
    for inner in ("abc/", ""):
        given = ("hydra.sweep.dir=s", f"hydra.sweep.subdir=.jobs/{inner}${{hydra.job.num}}")
        assert sweep(tmp_path, "-m", "x=1,2", *given) == 1
        shown = capfd.readouterr()
        assert list(statuses(shown.out).values()) == ["refused"] * 2
        assert "and not in its .jobs" in shown.err
        assert not list(tmp_path.rglob("visits"))


def test_what_is_in_the_way_of_the_notes_is_named(tmp_path, capfd):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / outcomes.NOTES).touch()
    assert sweep(tmp_path, "-m", "x=1,2", "hydra.sweep.dir=s") == 1
    assert "s/.jobs is in the way" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "s").iterdir()] == [outcomes.NOTES]


def test_a_broken_pipe_of_a_jobs_own_is_its_failure(tmp_path, capfd):
    assert sweep(tmp_path, "-m", "act=pipe,finish") == 1
    assert statuses(capfd.readouterr().out) == {"act=pipe": "failed", "act=finish": "finished"}
    assert len(list(tmp_path.rglob("error.txt"))) == 1


def test_jobs_may_change_into_their_folders(tmp_path, capfd):
    assert sweep(tmp_path, "-m", "x=1,2", "hydra.job.chdir=true") == 0
    assert set(statuses(capfd.readouterr().out).values()) == {"finished"}
    assert not list(tmp_path.rglob(outcomes.NOTES))


def test_a_folder_named_by_its_settings_holds_them_whatever_an_older_record_says(tmp_path, capfd):
    given = ("-m", "x=1", "name='n-${x}'", "hydra.sweep.dir=s")
    assert sweep(tmp_path, *given) == 0
    [path] = tmp_path.glob("s/*/.hydra/job.yaml")
    path.write_text(path.read_text().replace("name: n-1", "name: n-${x}"))
    capfd.readouterr()
    assert sweep(tmp_path, *given) == 0
    assert list(statuses(capfd.readouterr().out).values()) == ["finished before"]


def test_a_file_in_the_place_of_a_jobs_record_refuses_that_job_alone(tmp_path, capfd):
    theirs = tmp_path / "s" / "x1" / records.FOLDER
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    assert sweep(tmp_path, "-m", "x=1,2", "hydra.sweep.dir=s", "hydra.sweep.subdir=x${x}") == 1
    assert statuses(capfd.readouterr().out) == {"x=1": "refused", "x=2": "finished"}
    assert theirs.read_text() == "mine"
