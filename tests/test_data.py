"""Data: the split leaks nothing, windows are where they should be, rulers agree with others."""

import gzip
import lzma
import math
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from experiments.data import baselines, stdlib, windows
from experiments.data.corpus import split_by_file

FILES = {f"package/file_{i}.py": f"def f_{i}(x):\n    return x + {i}\n".encode() for i in range(40)}


def make_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def split(files, fraction=0.25, seed=0):
    return split_by_file(files, validation_fraction=fraction, seed=seed, source="here")


def test_split_is_by_file_complete_and_without_leak():
    corpus = split({**FILES, "again.py": FILES["package/file_3.py"], "empty.py": b""})
    train = set(corpus.train.tobytes().split(b"\ndef "))
    held_out = set(corpus.validation.tobytes().split(b"\ndef "))
    assert not train & held_out
    contents = [
        FILES.get(n, FILES["package/file_3.py"])
        for n in (*corpus.train_files, *corpus.validation_files)
    ]
    assert sorted(contents) == sorted(FILES.values())
    assert len(corpus.validation_files) == 10
    expected = b"\n".join(contents[len(corpus.train_files) :])
    assert corpus.validation.tobytes() == expected


def test_split_depends_on_the_seed_alone():
    backwards = dict(reversed(FILES.items()))
    assert split(FILES).validation_files == split(backwards).validation_files
    assert split(FILES, seed=1).validation_files != split(FILES).validation_files


def test_split_refuses_what_it_cannot_split():
    with pytest.raises(ValueError, match=r"here: 3 files of which 1 distinct.*data\.root"):
        split({"a.py": b"x", "b.py": b"x", "c.py": b""})
    with pytest.raises(ValueError, match=r"validation_fraction=1\.5 must lie strictly"):
        split(FILES, fraction=1.5)


def test_a_tiny_corpus_still_has_both_sides():
    corpus = split({"a.py": b"x", "b.py": b"y"}, fraction=0.01)
    assert len(corpus.train_files) == len(corpus.validation_files) == 1


def test_folder_is_read_without_tests_and_third_parties(tmp_path):
    excluded = {f"{folder}/deep/x.py": b"no" for folder in stdlib.EXCLUDED_FOLDERS}
    make_tree(tmp_path, {**FILES, **excluded, "lib/notes.txt": b"no", "test.py": b"a file, kept"})
    assert stdlib.python_files(tmp_path) == {"test.py": b"a file, kept", **FILES}


def test_standard_library_of_this_python_is_held_out_by_file():
    corpus = stdlib.load()
    root = Path(sysconfig.get_paths()["stdlib"])
    read = {name: (root / name).read_bytes() for name in corpus.validation_files}
    assert corpus.validation.tobytes() == b"\n".join(read.values())
    train = {(root / name).read_bytes() for name in corpus.train_files}
    assert not train & set(read.values())
    assert 0.03 < len(read) / (len(read) + len(train)) < 0.07
    assert stdlib.load().validation_files == corpus.validation_files


def test_missing_text_is_an_error_that_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \*\.py file in .*data\.root=FOLDER"):
        stdlib.load(root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"data\.root='.*missing' is not a folder"):
        stdlib.load(root=str(tmp_path / "missing"))


TEXT = np.frombuffer(np.random.default_rng(0).bytes(5000), np.uint8)


def test_batches_are_a_function_of_seed_and_step():
    def cut(seed, step):
        return windows.sample_batch(TEXT, seed=seed, step=step, batch_size=4, length=16)

    np.testing.assert_array_equal(cut(0, 7), cut(0, 7))
    assert (cut(0, 7) != cut(0, 8)).any() and (cut(0, 7) != cut(1, 7)).any()


def test_batches_are_windows_of_the_text_and_reach_both_ends():
    text = np.arange(40, dtype=np.uint8)
    batch = windows.sample_batch(text, seed=0, step=0, batch_size=2000, length=8)
    np.testing.assert_array_equal(np.diff(batch.astype(int), axis=1), 1)
    assert set(batch[:, 0]) == set(range(40 - 8))


def test_evaluation_windows_are_evenly_spaced_from_the_first_byte_to_the_last():
    text = np.arange(250, dtype=np.uint8)
    cut = windows.evenly_spaced(text, count=8, length=16)
    assert cut.shape == (8, 17)
    np.testing.assert_array_equal(np.diff(cut.astype(int), axis=1), 1)
    assert cut[0, 0] == 0 and cut[-1, -1] == 249
    gaps = np.diff(cut[:, 0].astype(int))
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(length=5000), r"5000 \+ 1 bytes does not fit into 5000 bytes.*at most 4999"),
        (dict(length=0), r"length=0 bytes to predict: give at least 1"),
    ],
)
def test_windows_that_do_not_fit_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        windows.sample_batch(TEXT, seed=0, step=0, batch_size=1, **bad)
    with pytest.raises(ValueError, match=message):
        windows.evenly_spaced(TEXT, count=3, **bad)


def test_no_evaluation_window_is_refused():
    with pytest.raises(ValueError, match="count=0 windows"):
        windows.evenly_spaced(TEXT, count=0, length=4)


def test_baselines_equal_independent_computing():
    raw = b"".join(FILES.values())
    table = baselines.baselines(np.frombuffer(raw, np.uint8))
    entropy = sum(-n / len(raw) * math.log2(n / len(raw)) for n in Counter(raw).values())
    assert table["unigram"] == pytest.approx(entropy, rel=1e-12)
    assert table["gzip -9"] == 8 * len(gzip.compress(raw, 9)) / len(raw)
    packer = lzma.LZMACompressor(lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)
    packed = packer.compress(raw) + packer.flush()
    assert table["xz -9e"] == 8 * len(packed) / len(raw)
    assert lzma.decompress(packed) == raw


def test_a_python_without_lzma_has_no_xz_figure_and_goes_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "lzma", None)
    table = baselines.baselines(TEXT)
    assert table["xz -9e"] is None and table["gzip -9"] is not None
