"""Figures: words are shown as they are, and a figure that fails costs nothing else."""

import json
import re
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.text import Text

import experiments
from experiments import compare, plot
from experiments.run import drawing, figures, trainer
from experiments.run.folders import RunError
from experiments.studies import figure_files, finetune_figure, mixers, state_tracking_figure
from tests.experiments.programs import ending
from tests.experiments.run_folders import config, make_run

NAMES = ["a$x^$", "$\\frac{$", "\ud800 lone", "\x1b[31m red", "a\tb", "$5 and $6"]
ROW = {"step": 1, "tokens": 10, "train_bits_per_byte": 2.0, "validation_bits_per_byte": 8.0}


def run_named(folder, name):
    return make_run(
        folder, config(name=name), [ROW], summary={"name": name, "baselines": {name: 1.0}}
    )


@pytest.mark.parametrize("suffix", figure_files.SUFFIXES)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_no_formula(name, suffix, tmp_path):
    figure = drawing.Figure(layout="constrained")
    axes = figure.subplots()
    axes.plot([1, 2], [1e-9, 1], label=name)
    axes.set_yscale("log")
    axes.set_title(name)
    axes.set_xlabel(name)
    axes.set_xticks([1, 2], [name, "b"])
    axes.legend(title=name)
    figure.suptitle(name)
    figure.savefig(tmp_path / f"x{suffix}")
    assert axes.get_title() == drawing.plain(name)
    numbers = [label.get_text() for label in axes.get_yticklabels()]
    assert any("10^{" in label for label in numbers), "powers of ten are formulas"
    assert all(label.get_parse_math() for label in axes.get_yticklabels())


def test_what_has_no_picture_is_replaced():
    assert drawing.plain("a\ud800\x1bé日\n$") == "a\ufffd\ufffdé日\n$"


def test_every_figure_is_of_that_kind():
    for path in Path(experiments.__file__).parent.rglob("*.py"):
        if path != Path(drawing.__file__):
            others = re.findall(r"matplotlib\.figure|pyplot", path.read_text(encoding="utf-8"))
            assert not others, f"{path}: use experiments.run.drawing.Figure"


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_any_name_is_drawn(name, tmp_path):
    [path] = figures.draw_run(run_named(tmp_path / "run", name))
    assert matplotlib.image.imread(path).std() > 0


def test_runs_of_any_names_are_plotted(tmp_path):
    for number, name in enumerate(("a$x^$", "b$")):
        run_named(tmp_path / str(number), name)
    output = tmp_path / "x.png"
    said = ending(plot, tmp_path, f"runs={tmp_path}", "group_by=name", f"output={output}")
    assert said is None and output.is_file()


def test_a_run_whose_summary_cannot_be_written_is_not_done(tmp_path, capsys):
    folder = run_named(tmp_path / "run", "a")
    (folder / "summary.json").unlink()
    (folder / "summary.json").mkdir()
    summary = {"name": "a", "status": "finished"}
    with pytest.raises(RunError, match=r"has no summary\.json of this run"):
        with trainer._ending(folder, summary, (), lambda: 1.0):
            pass
    assert "could not be written" in capsys.readouterr().out
    with pytest.raises(ZeroDivisionError), trainer._ending(folder, summary, (), lambda: 1.0):
        raise ZeroDivisionError  # an earlier error is the one that counts


def test_a_figure_that_fails_does_not_spoil_the_end_of_a_run(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no picture\nof this")

    monkeypatch.setattr(Text, "draw", fail)
    folder = run_named(tmp_path / "run", "a")
    (folder / "summary.json").unlink()
    assert trainer._close(folder, {"name": "a", "status": "finished", "seconds": 1.0})
    said = capsys.readouterr().out
    assert said == f"the figures of {folder} could not be drawn (no picture)\n"
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    "program, output, lost",
    [
        (plot, "run/metrics.png", "run/metrics.csv"),
        (plot, "run/notes.PDF", "run/notes.csv"),
        (compare, "run/metrics.csv", "run/metrics.csv"),
        (compare, "README.md", "README.md"),
        (compare, "running.csv", "running.csv"),
    ],
)
def test_a_table_of_another_kind_is_not_written_over(tmp_path, program, output, lost):
    folder = run_named(tmp_path / "run", "a")
    (folder / "notes.csv").symlink_to(folder / "metrics.csv")
    (tmp_path / "README.md").write_text("mine\n\n| run | what I think |\n")
    (tmp_path / "running.csv").write_text("runner,time\n")
    before = (tmp_path / lost).read_bytes()
    said = ending(program, tmp_path, f"runs={folder}", f"output={output}")
    assert said == (
        f"error: output={output} would write over {lost}, which is another kind of file;\n"
        "give a new name"
    )
    assert (tmp_path / lost).read_bytes() == before and not (tmp_path / "run/metrics.png").exists()
    for _ in range(2):  # the second time over its own
        assert ending(program, tmp_path, f"runs={folder}", f"output=x{output[-4:]}") is None


@pytest.mark.parametrize("suffix", figure_files.SUFFIXES)
def test_a_picture_beside_a_figure_of_ours_is_not_written_over(tmp_path, suffix):
    folder, output = run_named(tmp_path / "run", "a"), tmp_path / f"x{suffix}"
    given = (f"runs={folder}", f"output={output.name}")
    assert ending(plot, tmp_path, f"runs={folder}", "output=x.png") is None
    for content in ("mine", ""):
        output.write_text(content)
        assert f"x{suffix} is there, and no earlier figure of this" in ending(
            plot, tmp_path, *given
        )
        assert output.read_text() == content
    output.unlink()
    for _ in range(2):  # the second time over its own
        assert ending(plot, tmp_path, *given) is None and output.stat().st_size > 1000


@pytest.mark.parametrize(
    "name, line", [("x.csv", "group,runs_of_mine"), ("c.csv", "run,loss"), ("c.csv", "run,finals")]
)
def test_a_table_that_begins_alike_is_not_written_over(tmp_path, name, line):
    folder = run_named(tmp_path / "run", "a")
    (tmp_path / name).write_text(f"{line}\n1,2\n")
    program, output = (plot, "x.png") if name == "x.csv" else (compare, name)
    said = ending(program, tmp_path, f"runs={folder}", f"output={output}")
    assert f"would write over {name}" in said
    assert (tmp_path / name).read_text() == f"{line}\n1,2\n"


def test_a_comparison_replaces_one_of_results(tmp_path):
    folder = run_named(tmp_path / "run", "a")
    for columns in ("[final]", "null", "[name]", "[name]"):
        said = ending(compare, tmp_path, f"runs={folder}", "output=x.csv", f"columns={columns}")
        assert said is None


@pytest.mark.parametrize("output", ["run/loss.png", "thesis.pdf"])
def test_a_picture_that_is_no_figures_is_not_written_over(tmp_path, output):
    folder = run_named(tmp_path / "run", "a")
    (tmp_path / output).write_text("mine")
    said = ending(plot, tmp_path, f"runs={folder}", f"output={output}")
    assert f"{output} is there, and no earlier figure of this command" in said
    assert (tmp_path / output).read_text() == "mine"


@pytest.mark.parametrize("module", [finetune_figure, mixers, state_tracking_figure])
def test_tables_of_studies_replace_only_their_own(tmp_path, module):
    output = tmp_path / "x.png"
    figure_files.write(drawing.Figure(), output, module.COLUMNS, [], markdown="mine")
    assert figure_files.check_output(output, module.COLUMNS) == output
    with pytest.raises(RunError, match=r"write over .*x\.md"):
        figure_files.check_output(output, module.COLUMNS, markdown=True)
    output.with_suffix(".csv").write_text("step,loss\n")
    with pytest.raises(RunError, match=r"write over .*x\.csv"):
        figure_files.check_output(output, module.COLUMNS)
