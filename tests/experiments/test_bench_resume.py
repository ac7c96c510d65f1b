"""A benchmark keeps what is timed: stopped or killed, the same command does the rest."""

import csv

import pytest

from experiments import bench
from experiments.contest import bench_figure, bench_rows
from experiments.contest.contest import REFERENCE, Row
from experiments.run import folders
from experiments.run.folders import RunError
from experiments.shell.overrides import replaced
from tests.experiments.programs import ending

SUITE = ["suite.shapes=[[4,1,2],[8,1,2]]", "suite.rivals=[]", "rounds=3", "budget_s=0.1"]
SUITE += [f"~suite.solvers.{name}" for name in ("newton", "quasi_newton", "jacobi", "auto")]
NAMES = [REFERENCE, "sequential", "sequential_reverse", "shooting"]


@pytest.fixture
def contests(monkeypatch):
    """Contests that take no time; which were asked for; and where to stop."""
    asked, stop_at = [], []

    def contest(problem, which, *, solvers, others, **_):
        at = (*problem.cotangent.shape, which)
        if len(asked) in stop_at:
            stop_at.clear()
            raise KeyboardInterrupt
        asked.append(at)
        numbers = dict(median_ms=1.0, low_ms=0.9, high_ms=1.1, rounds=3, compile_s=0.1)
        numbers |= dict(floor_ms=0.5, times_floor=2.0, value_error=0.0)
        return [
            Row(*at, name=name, verdict="ok", speed_up=1.0 + i, **numbers)
            for i, name in enumerate([REFERENCE, *solvers, *others])
        ]

    monkeypatch.setattr(bench, "contest", contest)
    monkeypatch.setattr(folders, "_git", lambda *arguments: "0" * 40)
    return asked, stop_at


def rows_in(folder):
    return [(row.time, row.which, row.name) for row in bench_rows.read(folder / "results.csv")]


def test_after_ctrl_c_the_same_command_does_the_rest(tmp_path, contests, capsys):
    asked, stop_at = contests
    stop_at.append(2)
    assert ending(bench, tmp_path, *SUITE) == 130
    shown = capsys.readouterr().out
    assert "1/4  T, B, D = (4, 1, 2), forward" in shown and "the same command continues" in shown
    [folder] = (tmp_path / "runs" / "bench").iterdir()
    assert len(rows_in(folder)) == 2 * len(NAMES) and not (folder / "summary.json").exists()
    assert ending(bench, tmp_path, *SUITE) is None
    assert [path.name for path in (tmp_path / "runs" / "bench").iterdir()] == [folder.name]
    assert len(asked) == 4 and len(set(asked)) == 4, "nothing is timed twice"
    assert [name for _, _, name in rows_in(folder)] == 4 * NAMES
    assert "2 of 4 are in" in capsys.readouterr().out
    for name in ("results.png", "results.md", "summary.json"):
        assert (folder / name).stat().st_size > 0
    # a third time there is nothing to do, and fresh=true does it all anew
    assert ending(bench, tmp_path, *SUITE) is None and len(asked) == 4
    place = f"hydra.run.dir={tmp_path / 'new'}"
    assert ending(bench, tmp_path, *SUITE, "fresh=true", place) is None and len(asked) == 8


def test_what_a_kill_cut_off_is_timed_again(tmp_path, contests):
    asked, _ = contests
    place = f"hydra.run.dir={tmp_path / 'run'}"
    assert ending(bench, tmp_path, *SUITE, place) is None
    table = tmp_path / "run" / "results.csv"
    whole = table.read_bytes()
    table.write_bytes(whole[: len(whole) * 5 // 8])  # in the middle of a line
    assert ending(bench, tmp_path, *SUITE, place) is None
    assert asked[4:] == asked[2:4] and table.read_bytes() == whole


def test_other_work_has_a_folder_of_its_own(tmp_path, contests, monkeypatch):
    asked, _ = contests
    place = f"hydra.run.dir={tmp_path / 'run'}"
    assert ending(bench, tmp_path, *SUITE, place) is None
    assert "already holds a run" in ending(bench, tmp_path, *replaced(SUITE, ["rounds=4"]), place)
    here = f"hydra.run.dir={tmp_path / 'other'}"
    assert ending(bench, tmp_path, *SUITE, "seed=1", here) is None and len(asked) == 8
    monkeypatch.setattr(folders, "_git", lambda *arguments: "1" * 40)  # other code
    last = f"hydra.run.dir={tmp_path / 'last'}"
    assert ending(bench, tmp_path, *SUITE, last) is None and len(asked) == 12


def test_a_damaged_table_is_refused_and_kept(tmp_path, contests):
    place = f"hydra.run.dir={tmp_path / 'run'}"
    assert ending(bench, tmp_path, *SUITE, place) is None
    table = tmp_path / "run" / "results.csv"
    table.write_text("a,b\n1,2\n")
    said = ending(bench, tmp_path, *SUITE, place)
    assert "results.csv is damaged (its columns are a, b): move it away" in said
    assert table.read_text() == "a,b\n1,2\n"


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [
        Row(
            8, 1, 2, "forward", "a", "ok", 1.5, 1.25, 2.0, 3, 0.5, 0.25, 6.0, 2.0, 7, 0, 1e-7, None
        ),
        Row(8, 1, 2, "forward", "b", "failed: a, comma"),
    ]
    bench_rows.append(tmp_path / "t.csv", rows[:1])
    bench_rows.append(tmp_path / "t.csv", rows[1:])
    assert bench_rows.read(tmp_path / "t.csv") == rows
    assert bench_rows.read(tmp_path / "none.csv") == []
    with (tmp_path / "t.csv").open("a") as file:
        csv.writer(file).writerow(["x"] * len(bench_rows.FIELDS))
    with pytest.raises(RunError, match="is damaged"):
        bench_rows.read(tmp_path / "t.csv")


def test_the_figure_shows_every_right_row_of_the_table(tmp_path):
    rows = [
        Row(t, 1, 2, "forward", name, verdict, speed_up=speed)
        for t in (4, 8)
        for name, verdict, speed in (
            (REFERENCE, "ok", 1.0),
            ("fast", "ok", 2.0 * t),
            ("wrong", "wrong values (1e-03)", None),
        )
    ]
    bench_rows.append(tmp_path / "t.csv", rows)
    axes = bench_figure.draw(tmp_path / "t.csv", title="x").axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["fast"] == [8.0, 16.0] and lines["wrong"] == []
    assert [text.get_text() for text in axes.get_xticklabels()] == [
        "4, 1, 2\nforward",
        "8, 1, 2\nforward",
    ]
