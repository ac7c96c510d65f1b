"""A new run's folder: what may be in it, and what a refused command takes away."""

import re

import pytest
from omegaconf import OmegaConf

from experiments import compare, evaluate, generate, plot, train
from experiments.run import claim, folders, opening, outputs, records
from experiments.run.folders import RunError
from tests.experiments.programs import ending, statuses, sweep

CFG = OmegaConf.create({"name": "x", "steps": 3})


def everything(folder):
    """All paths below a folder, with the contents of files."""
    return {path: path.read_text() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("name", opening.WRITTEN)
@pytest.mark.parametrize("is_folder", [True, False])
def test_files_that_a_run_writes_are_refused_where_no_run_is(tmp_path, name, is_folder):
    (tmp_path / "notes.txt").write_text("mine")
    if is_folder:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("step,x\n0,1\n")
    before = everything(tmp_path)
    with pytest.raises(RunError, match=re.escape(f"{tmp_path} holds {name} but no config")) as said:
        with opening.opened(tmp_path, CFG):
            pass
    assert (
        "give another folder (hydra.run.dir=" in str(said.value) and str(said.value).count("\n") < 3
    )
    with pytest.raises(RunError, match="but no config.yaml"):
        opening.open_run(tmp_path, CFG)
    assert everything(tmp_path) == before


def test_a_link_to_nothing_counts_too(tmp_path):
    (tmp_path / "metrics.csv").symlink_to(tmp_path / "gone")
    with pytest.raises(RunError, match="holds metrics.csv"):
        opening.check_new(tmp_path, CFG)


def test_other_files_and_what_a_killed_start_leaves_are_no_obstacle(tmp_path):
    tokenizer = tmp_path / "tok.json"
    tokenizer.write_text("{}")
    cfg = OmegaConf.merge(CFG, {"data": {"tokenizer": str(tokenizer)}})
    run = tmp_path / "run"
    (run / records.FOLDER).mkdir(parents=True)
    for name in (claim.LOCK, claim.HOLDER, "config.yaml.part", "notes.txt", "results.csv"):
        (run / name).write_text("{}")
    (run / folders.TOKENIZER).write_text("{}")  # written before the config
    with opening.opened(run, cfg):
        assert folders.load_config(run).steps == 3
        assert (run / "notes.txt").read_text() == "{}"
    (run / folders.CONFIG).unlink()
    (run / folders.ENVIRONMENT).unlink()
    (run / folders.TOKENIZER).write_text("another")
    with pytest.raises(RunError, match="holds tokenizer.json but no config.yaml"):
        opening.check_new(run, cfg)


@pytest.mark.parametrize("name", outputs.KEPT)
def test_no_run_begins_among_what_another_keeps(tmp_path, name):
    with opening.opened(tmp_path / "run", CFG):
        pass
    with pytest.raises(RunError, match=f"is among the {re.escape(name)} of the run"):
        opening.check_new(tmp_path / "run" / name / "8" / "new", CFG)
    (tmp_path / "link").symlink_to(tmp_path / "run" / name)
    with pytest.raises(RunError, match=f"is among the {re.escape(name)} of the run"):
        opening.check_new(tmp_path / "link" / "new", CFG)
    with pytest.raises(RunError, match=f"is among the {re.escape(name)} of the run"):
        outputs.new(tmp_path / "run" / name / "x.json")
    before = everything(tmp_path)
    assert sweep(tmp_path, "-m", "x=1,2", f"hydra.sweep.dir=run/{name}/8") == 1
    assert everything(tmp_path) == before
    opening.check_new(tmp_path / "run" / "mine" / name, CFG)
    (tmp_path / "run" / folders.ENVIRONMENT).unlink()  # somebody's config, of no run
    opening.check_new(tmp_path / "run" / name / "new", CFG)


@pytest.mark.parametrize(
    "program, given",
    [(train, "steps=0"), (evaluate, "run=no"), (generate, "run=no"), (plot, "runs=no")]
    + [(compare, "runs=no")],
)
def test_a_refused_command_leaves_a_record_that_was_there(tmp_path, program, given):
    record = tmp_path / records.FOLDER
    record.mkdir()
    for name in records.FILES:
        (record / name).write_text("lr: 0.1\n")
    before = everything(tmp_path)
    place = ["hydra.run.dir=."] if program is train else []
    assert ending(program, tmp_path, given, *place)
    assert everything(tmp_path) == before
    for name in records.FILES:
        (record / name).unlink()
    assert ending(program, tmp_path, given, *place)
    assert list(tmp_path.iterdir()) == [record], "an empty one is somebody's too"


def test_a_refused_command_takes_away_the_record_that_it_wrote(tmp_path):
    given = ("act=fail", "hydra.run.dir=new/deep", "hydra.output_subdir=.hydra", "steps=0")
    assert "steps=0" in sweep(tmp_path, *given)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_job_leaves_a_record_that_was_there(tmp_path, capfd):
    record = tmp_path / "s" / "0" / records.FOLDER
    record.mkdir(parents=True)
    (record / "config.yaml").write_text("a: 1\n")
    given = ("hydra.sweep.dir=s", "hydra.sweep.subdir=${hydra.job.num}")
    assert sweep(tmp_path, "-m", "steps=0,-1", *given) == 1
    assert (record / "config.yaml").read_text() == "a: 1\n"
    assert not (tmp_path / "s" / "1").exists()
    assert list(statuses(capfd.readouterr().out).values()) == ["refused"] * 2
