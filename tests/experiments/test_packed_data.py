"""Compressed data: what unpacks beyond all measure is refused before it fills the memory."""

import gzip
from contextvars import ContextVar

import pytest

from experiments.data import files, huggingface, parquet
from experiments.run import trust


def test_parquet_that_unpacks_beyond_all_measure_is_refused(tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path = tmp_path / "bomb.parquet"
    table = arrow.table({"text": ["x" * 1_000_000] * 40})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=True)
    assert path.stat().st_size < 20_000
    assert sum(map(len, parquet.read(path, field="text").values())) == 40_000_000
    monkeypatch.setattr(files, "SURELY_FITS", 10_000_000)
    with pytest.raises(ValueError, match="unpacks to .* MiB or more: leave it out"):
        parquet.read(path, field="text")
    monkeypatch.setattr(files, "machine_bytes", lambda: 20_000_000)
    monkeypatch.setattr(files, "SURELY_FITS", 2**40)
    with pytest.raises(ValueError, match="unpacks to"):
        parquet.read(path, field="text")


@pytest.mark.parametrize("kind", ["dictionary", "prefixes"])
def test_parquet_that_repeats_a_large_value_is_refused_before_it_is_copied(
    tmp_path, monkeypatch, kind
):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    large = "x" * 1_000_000
    values = [large] * 128 if kind == "dictionary" else [f"{large}{i:03d}" for i in range(128)]
    how: dict = {"use_dictionary": True, "dictionary_pagesize_limit": 2**30}
    if kind == "prefixes":
        how = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    path = tmp_path / "bomb.parquet"
    pyarrow.parquet.write_table(arrow.table({"text": values}), path, compression="zstd", **how)
    assert path.stat().st_size < 5000
    allocated, before = [], arrow.total_allocated_bytes()
    real = parquet.check_string

    def watched(value, **where):
        allocated.append(arrow.total_allocated_bytes() - before)
        return real(value, **where)

    monkeypatch.setattr(parquet, "check_string", watched)
    monkeypatch.setattr(files, "SURELY_FITS", 10_000_000)
    with pytest.raises(ValueError, match="bomb.parquet of .* unpacks to .* MiB or more: leave"):
        parquet.read(path, field="text")
    assert 0 < len(allocated) < 12 and max(allocated) < 40_000_000


@pytest.mark.parametrize(
    "name, path, data_files",
    [
        ("x.jsonl.gz", "{folder}", None),
        ("x.jsonl.gz", "json", "{folder}/*"),
        ("x.dat", "json", "{folder}/x.dat"),  # whatever it is called
    ],
)
def test_compressed_files_of_a_runs_folder_are_refused(
    tmp_path, monkeypatch, name, path, data_files
):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = tmp_path / "run"
    tmp_path = run / "data"
    tmp_path.mkdir(parents=True)
    (run / "config.yaml").write_text("data: null")
    trust.open_config(run)
    lines = b"".join(b'{"text": "document %d"}\n' % i for i in range(99))
    (tmp_path / name).write_bytes(gzip.compress(lines))
    given = {
        "path": path.format(folder=tmp_path),
        "data_files": data_files and data_files.format(folder=tmp_path),
    }
    with pytest.raises(ValueError, match=rf"{name} is compressed, .*: unpack it \(gunzip"):
        huggingface.load(**given)
    monkeypatch.setattr(trust, "_OPENED", ContextVar("none", default=()))  # a user's own data
    if data_files is None:
        assert huggingface.load(**given, validation_fraction=0.5).validation.size
