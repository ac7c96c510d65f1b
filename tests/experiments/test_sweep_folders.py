"""Folders of a sweep's jobs: one for each, inside the sweep's, and locked while a job runs."""

import contextlib
import os
import re
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from experiments.run import claim, folders, records
from experiments.sweep import first_start, outcomes, sweep_folders
from tests.experiments.programs import everything, statuses, sweep

HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held(folder):
    """Another process trains in a folder; yields how to end it."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folder / claim.LOCK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "held\n"
        yield lambda: other.communicate()
        other.kill()


@pytest.fixture
def begun(tmp_path):
    """The folder of a sweep's first job, which has begun; the second has not."""
    assert sweep(tmp_path, "-m", "act=stop,finish", "hydra.sweep.dir=s") == 130
    [folder] = tmp_path.glob("s/act-stop-*")
    (tmp_path / "mended").touch()
    (folder / "error.txt").write_text("of the other process")
    return folder


def test_a_job_that_another_process_runs_is_in_use_and_left_alone(tmp_path, begun, capfd):
    with held(begun):
        before = everything(begun)
        assert sweep(tmp_path, "-m", "act=stop,finish", "hydra.sweep.dir=s") == 1
        after = everything(begun)
        after[begun / claim.LOCK] = before[begun / claim.LOCK]  # trying it is no writing
        assert after == before
    shown = capfd.readouterr()
    assert statuses(shown.out) == {"act=stop": "in use", "act=finish": "finished"}
    assert "is in use, and only one process" in shown.err and "Traceback" not in shown.err
    assert "1 of 2 jobs are in use: wait" in shown.out and "repeat the command" not in shown.out
    assert sweep(tmp_path, "-m", "act=stop,finish", "hydra.sweep.dir=s") == 0
    shown = capfd.readouterr().out
    assert statuses(shown) == {"act=stop": "finished", "act=finish": "finished before"}


@pytest.mark.parametrize("ending", ["finished", "no ending"])
def test_a_job_that_another_process_has_ended_meanwhile_is_shown_so(
    tmp_path, begun, capfd, monkeypatch, ending
):
    read = outcomes.jobs
    with held(begun) as end:

        def ended():
            (begun / "error.txt").unlink()
            if ending == "finished":
                summary = {"status": "finished", "judged_by": ["loss", "min"], "loss": 1.0}
                folders.write_json(begun / folders.SUMMARY, summary)
            end()
            return read()

        monkeypatch.setattr(outcomes, "jobs", ended)
        code = sweep(tmp_path, "-m", "act=stop,finish", "hydra.sweep.dir=s")
    assert code == (ending != "finished")
    shown = capfd.readouterr().out
    assert statuses(shown) == {"act=stop": ending, "act=finish": "finished"}
    assert ("repeat the command" in shown) == (ending != "finished")


def test_a_refused_job_takes_its_lock_away(tmp_path):
    assert sweep(tmp_path, "-m", "steps=0,1", "hydra.sweep.dir=s") == 1
    names = {path.name.partition("-")[0] for path in (tmp_path / "s").iterdir()}
    assert names == {"steps", "multirun.yaml"}


@pytest.mark.parametrize(
    "subdir",
    ["", ".", "./", "same", "..", "../esc${hydra.job.num}", "a/../../${hydra.job.num}"]
    + ["/tmp/${hydra.job.num}", "${name}", "${act}", "x", "${hydra.job.num}/.."],
)
def test_jobs_that_would_share_a_folder_or_leave_the_sweeps_are_refused(tmp_path, capfd, subdir):
    given = f"hydra.sweep.subdir={subdir}"
    assert sweep(tmp_path, "-m", "x=1,2", "hydra.sweep.dir=s", given) == 1
    said = capfd.readouterr().err
    assert "error: hydra.sweep.subdir=" in said and "type for example" in said
    assert said.count("\n") <= 3 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "subdir, expected",
    [
        ("${hydra.job.num}", {"0", "1"}),
        ("jobs/${hydra.job.num}/run", {"jobs/0/run", "jobs/1/run"}),
        ("x-${x}", {"x-1", "x-2"}),
        ("${hydra.job.override_dirname}", {"x=1", "x=2"}),
        ("${hydra:job.num}", {"0", "1"}),
        ("${name}", {"n1", "n2"}),
    ],
)
def test_jobs_in_folders_of_their_own_names(tmp_path, capfd, subdir, expected):
    given = ("-m", "x=1,2", "hydra.sweep.dir=s", f"hydra.sweep.subdir={subdir}")
    named = ["name=n${x}"] if "name}" in subdir and "dir" not in subdir else []
    assert sweep(tmp_path, *given, *named) == 0
    found = {path.parent for path in (tmp_path / "s").rglob("visits")}
    assert {str(path.relative_to(tmp_path / "s")) for path in found} == expected


@pytest.mark.parametrize(
    "subdir, swept",
    [("fixed", "+optim=adamw,slow_scales"), ("s${x}", "+data.x=1,2"), ("s${xs}", "x=1,2")],
)
def test_a_folder_that_names_none_of_what_varies_is_refused(tmp_path, capfd, subdir, swept):
    given = ("-m", swept, "hydra.sweep.dir=s", f"hydra.sweep.subdir={subdir}", "+xs=1")
    assert sweep(tmp_path, *given) == 1
    assert "another one for each job" in capfd.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize(
    "other",
    ["x=5,6", "x=1,2 steps=9", "x=1,2 name=other", "x=1,2 +more=3", "x=1,2 +y={a: 1}"],
)
def test_a_job_in_the_folder_of_another_run_is_refused_and_writes_nothing(
    tmp_path, capfd, ended, other
):
    numbered = ("hydra.sweep.dir=s", "hydra.sweep.subdir=${hydra.job.num}")
    act = [] if ended else ["act=fail"]
    assert sweep(tmp_path, "-m", "x=1,2", *act, *numbered) == (not ended)
    runs = [tmp_path / "s" / number for number in "01"]
    before = [everything(folder) for folder in runs]
    capfd.readouterr()
    assert sweep(tmp_path, "-m", *other.split(maxsplit=1), *act, *numbered) == 1
    shown = capfd.readouterr()
    assert list(statuses(shown.out).values()) == ["refused"] * 2
    assert "holds a run with" in shown.err and "give another hydra.sweep.dir" in shown.err
    for folder, then in zip(runs, before, strict=True):
        now = everything(folder)
        now[folder / claim.LOCK] = then[folder / claim.LOCK]  # trying it is no writing
        assert now == then
    assert sweep(tmp_path, "-m", "x=1,2", *act, *numbered) == (not ended)  # its own settings


@pytest.mark.parametrize(
    "then, now, said",
    [
        ({"of": None}, {"of": {"a": 1}}, "of=None, and this job has of=something else"),
        ({"of": None}, {"of": None, "b": 1}, "b=something else, and this job has b=1"),
        ({"some": [1, 2]}, {"some": [2, 1]}, "some[0]=1, and this job has some[0]=2"),
        ({"some": [1]}, {"some": [1, 2]}, "some[1]=something else"),
        (
            {"transform": {"a": {}, "b": {}}},
            {"transform": {"b": {}, "a": {}}},
            "transform in the order a > b, and this job has b > a",
        ),
        (
            {"task": {"transform": {"members": {"a": {}, "b": {}}}}},
            {"task": {"transform": {"members": {"b": {}, "a": {}}}}},
            "task.transform.members in the order a > b, and this job has b > a",
        ),
        ({"a": 1}, {"a": True}, "a=1, and this job has a=True"),
        ({"a": 1}, {"a": 1.0}, "a=1, and this job has a=1.0"),
        ({"a": "${b}", "b": 1}, {"a": "${b}", "b": 2}, "a=1, and this job has a=2"),
        ({"a": "${oc.env:HOME}"}, {"a": "x"}, f"a={os.environ['HOME']}, and this job has a=x"),
        ({"a": "${nope}"}, {"a": 1}, "a=${nope}, and this job has a=1"),
    ],
)
def test_whatever_differs_is_another_job(tmp_path, then, now, said):
    (tmp_path / folders.CONFIG).touch()
    (tmp_path / records.FOLDER).mkdir()
    first_start.write(tmp_path, settings({**then, "resume": False}))
    first_start.check_same(settings({**then, "resume": True}), tmp_path)
    for named in (False, True) if "${nope}" not in said else (False,):
        with pytest.raises(folders.RunError, match=re.escape(said)):
            first_start.check_same(settings(now), tmp_path, named=named)


def settings(values):
    return first_start.settings_of(OmegaConf.create(values))


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\n", b"# x\na: [", b"# x\n- 1\n", b"", b"# x\nabc\n", None]
)
def test_a_damaged_record_of_a_job_is_said_and_the_sweep_goes_on(tmp_path, capfd, content):
    here = ("hydra.sweep.dir=s", "hydra.sweep.subdir=${hydra.job.num}")
    assert sweep(tmp_path, "-m", "x=1", *here) == 0
    path = tmp_path / "s/0/.hydra/job.yaml"
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    assert sweep(tmp_path, "-m", "x=1,2", *here) == 1
    assert list(statuses(capfd.readouterr().out).values())[-2:] == ["refused", "finished"]


def test_the_order_of_additions_and_what_checks_make_of_a_number_are_no_difference(tmp_path):
    (tmp_path / folders.CONFIG).touch()
    (tmp_path / records.FOLDER).mkdir()
    first_start.write(tmp_path, settings({"grid": {"a": 1, "b": 2}}))
    first_start.check_same(settings({"grid": {"b": 2, "a": 1}}), tmp_path)
    for _ in range(2):
        assert sweep(tmp_path, "-m", "x=1,2", "name=2024", "hydra.sweep.dir=s") == 0


def test_a_sweep_from_before_there_were_records_goes_on_in_its_own_folders(tmp_path):
    given = ("-m", "x=1,2", "hydra.sweep.dir=s")
    assert sweep(tmp_path, *given) == 0
    for path in tmp_path.rglob("job.yaml"):
        path.unlink()
    assert sweep(tmp_path, *given) == 0


@pytest.mark.parametrize("name", ["a\nb", "a\udcffb"])
def test_a_working_directory_of_any_name_is_known_again(tmp_path, capfd, name):
    (tmp_path / name).mkdir()
    for _ in range(2):
        assert sweep(tmp_path / name, "-m", "x=1", f"hydra.sweep.dir={tmp_path / 's'}") == 0
    assert "relative paths" not in capfd.readouterr().out


@pytest.mark.parametrize("many", [False, True])
def test_transforms_in_another_order_have_folders_of_their_own(many):
    names = []
    for chain in ({"a": 1, "b": 2}, {"b": 2, "a": 1}):
        config = {"transform": chain, **({"x": "y" * 200} if many else {})}
        names.append(sweep_folders.digest(sweep_folders.ordered(config)))
    assert names[0] != names[1]
    one = {"transform": {"a": 1}}
    assert sweep_folders.ordered(one) == one  # as before


def test_a_run_that_no_sweep_has_started_is_left_alone(tmp_path, capfd):
    here = ("hydra.sweep.dir=s", "hydra.sweep.subdir=${hydra.job.num}")
    assert sweep(tmp_path, "-m", "x=1", *here) == 0
    (tmp_path / "s/0/.hydra/job.yaml").unlink()
    before = everything(tmp_path / "s/0")
    assert sweep(tmp_path, "-m", "x=1", *here) == 1
    assert "holds a run that no sweep has started" in capfd.readouterr().err
    after = everything(tmp_path / "s/0")
    assert after | {tmp_path / "s/0" / claim.LOCK: 0} == before | {tmp_path / "s/0" / claim.LOCK: 0}


def test_a_finished_job_of_another_working_directory_says_where_it_was(tmp_path, capfd):
    there = (tmp_path / "one", tmp_path / "two")
    for place in there:
        place.mkdir()
        assert sweep(place, "-m", "x=1", f"hydra.sweep.dir={tmp_path / 's'}") == 0
    assert f"was trained in {there[0]}: relative paths led elsewhere" in capfd.readouterr().out


@pytest.mark.parametrize("figure", ['"text"', "[1]", "1" + "0" * 400, "{}"])
def test_a_damaged_figure_ends_no_sweep(tmp_path, capfd, figure):
    assert sweep(tmp_path, "-m", "x=1,2", "hydra.sweep.dir=s") == 0
    first = sorted(tmp_path.glob("s/x-*"))[0]
    text = f'{{"status": "finished", "judged_by": ["loss", "min"], "loss": {figure}}}'
    (first / folders.SUMMARY).write_text(text)
    sweep(tmp_path, "-m", "x=1,2", "hydra.sweep.dir=s")
    shown = capfd.readouterr().out
    assert "is damaged: " in shown and len(statuses(shown)) == 2


def test_of_jobs_that_share_a_folder_all_but_the_first_are_refused(tmp_path, capfd):
    # What varies is in the name, which is the same for both nevertheless.
    shared = ("hydra.sweep.dir=s", "hydra.sweep.subdir='f${oc.select:none_${x},same}'")
    assert sweep(tmp_path, "-m", "x=1,2", "act=fail", *shared) == 1
    shown = capfd.readouterr()
    assert sorted(statuses(shown.out).values()) == ["failed", "refused"]


@pytest.mark.parametrize("left_out, ok", [("seed", True), ("x", False)])
def test_a_name_of_all_overrides_leaves_out_none_that_varies(tmp_path, capfd, left_out, ok):
    named = "hydra.sweep.subdir=${hydra.job.override_dirname}"
    excluded = f"hydra.job.config.override_dirname.exclude_keys=[{left_out}]"
    assert sweep(tmp_path, "-m", "x=1,2", "hydra.sweep.dir=s", named, excluded) == (not ok)
    assert ok or "another one for each job" in capfd.readouterr().err


def test_a_value_does_not_lead_a_job_out_of_the_sweep(tmp_path, capfd):
    given = ("-m", "+up=../a,b", "hydra.sweep.dir=s", "hydra.sweep.subdir=${up}")
    assert sweep(tmp_path, *given) == 1
    shown = capfd.readouterr()
    assert statuses(shown.out) == {"+up=../a": "refused", "+up=b": "finished"}
    assert "hydra.sweep.subdir leads to" in shown.err and not (tmp_path / "a").exists()


def test_a_runs_own_folder_is_no_place_for_a_sweep(tmp_path, capfd):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / folders.CONFIG).write_text("name: x\n")
    assert sweep(tmp_path, "-m", "x=1,2", "hydra.sweep.dir=run") == 1
    said = capfd.readouterr().err
    assert "error: hydra.sweep.dir=run is the folder of a run" in said and said.count("\n") <= 3
    assert [path.name for path in tmp_path.rglob("*")] == ["run", folders.CONFIG]


def test_settings_that_do_not_resolve_are_left_to_the_job(tmp_path):
    cfg = OmegaConf.create({"name": "x", "size": "${nope}"})
    assert not sweep_folders.is_named(tmp_path / "x", cfg)
    cfg.size = 3
    name = f"x-{sweep_folders.digest({'name': 'x', 'size': 3})}"
    assert sweep_folders.is_named(tmp_path / name, cfg)
    assert not sweep_folders.is_named(tmp_path / "x-000000", cfg)
