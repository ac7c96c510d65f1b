"""Damaged tables of a run that continues: what can be read is kept."""

import pytest

from experiments.run import metrics
from experiments.run.resuming import cut_table

ROWS = b"step,x\r\n1,0.5\r\n2,0.25\r\n3,0.125\r\n"
TABLES = {
    "not UTF-8": (ROWS.replace(b"\n2", b"\n\xb1"), 3, "1,0.5|3,0.125"),
    "a letter as step": (ROWS.replace(b"\n2", b"\nx"), 3, "1,0.5|3,0.125"),
    "no step": (ROWS.replace(b"\n2", b"\n"), 3, "1,0.5|3,0.125"),
    "a step without end": (ROWS.replace(b"\n2", b"\ninf"), 3, "1,0.5|3,0.125"),
    "NUL": (ROWS.replace(b"0.25", b"\0.25"), 3, "1,0.5|3,0.125"),
    "a letter as value": (ROWS.replace(b"0.25", b"0,25"), 3, "1,0.5|3,0.125"),
    "a long cell": (ROWS.replace(b"0.25", b"9" * 200_000), 3, "1,0.5|3,0.125"),
    "a stray quote": (ROWS.replace(b"0.5", b'"0.5'), 2, "2,0.25"),
    "a short row": (ROWS.replace(b",0.25", b""), 3, "1,0.5|3,0.125"),
    "header": (b"r" + ROWS[1:], 3, None),
    "header with NUL": (b"\0" + ROWS[1:], 3, None),
    "header twice": (ROWS.replace(b"x", b"step"), 3, None),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_damaged_table_is_kept_beside_its_readable_rows(tmp_path, capsys, name):
    content, last, kept = TABLES[name]
    table = tmp_path / "metrics.csv"
    table.write_bytes(content)
    cut_table(table, last=last)
    said = capsys.readouterr().err
    assert f"{table} is damaged (line " in said and said.count("\n") == 1
    assert (tmp_path / "metrics.damaged.csv").read_bytes() == content
    if kept is None:
        assert not table.exists(), "its next row begins a new one"
    else:
        assert table.read_text().split() == ["step,x", *kept.split("|")]


@pytest.mark.parametrize("before", [b"", b"\n\n", b"\xef\xbb\xbf", b"\r\r\n"])
@pytest.mark.parametrize("end", [b"", b"4", b'4,"'])
def test_a_table_with_odd_ends_is_not_damaged(tmp_path, capsys, before, end):
    table = tmp_path / "metrics.csv"
    table.write_bytes(before + ROWS + end)
    cut_table(table, last=2)
    assert table.read_text().split() == ["step,x", "1,0.5", "2,0.25"]
    assert capsys.readouterr().err == "" and len(list(tmp_path.iterdir())) == 1


def test_an_empty_table_begins_anew(tmp_path):
    (tmp_path / "metrics.csv").write_bytes(b"")
    cut_table(tmp_path / "metrics.csv", last=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ruin", [lambda t: t.write_text(""), lambda t: t.unlink()])
def test_a_table_that_is_emptied_meanwhile_begins_anew(tmp_path, capsys, ruin):
    table = tmp_path / "metrics.csv"
    metrics.start(table, ("step", "loss"))
    metrics.append(table, {"step": 1, "loss": 0.5})
    ruin(table)
    metrics.append(table, {"loss": 0.25, "step": 2})
    metrics.append(table, {"step": 3})
    assert metrics.read(table) == {"step": [2, 3], "loss": [0.25, None]}
    assert capsys.readouterr().err.count("was emptied or taken away meanwhile") == 1
