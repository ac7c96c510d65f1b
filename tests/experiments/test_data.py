"""Data: splits leak nothing, batches are where they should be, rulers agree with others."""

import gzip
import lzma
import math
import os
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from experiments.data import baselines, splits, stdlib, windows
from experiments.data.corpus import from_documents

FILES = {f"package/file_{i}.py": f"def f_{i}(x):\n    return x + {i}\n".encode() for i in range(40)}


def make_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


SPLITS = pytest.mark.parametrize(
    "split", [splits.shuffled, splits.by_content, splits.by_name], ids=lambda f: f.__name__
)


def data_of(documents, *, sampler=windows.RANDOM, split=splits.shuffled, fraction=0.25, **changes):
    settings = dict(source="here", seed=0, tokenizer=None, prefetch=0) | changes
    return from_documents(
        documents, split=split, validation_fraction=fraction, sampler=sampler, **settings
    )


@SPLITS
def test_split_is_by_document_complete_and_without_leak(split):
    twice = {**FILES, "again.py": FILES["package/file_3.py"], "empty.py": b""}
    sides = split(twice, 0.25, 0)
    train, held_out = ([twice[name] for name in side] for side in sides)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(FILES.values())


@SPLITS
def test_split_depends_on_the_seed_alone(split):
    backwards = dict(reversed(FILES.items()))
    assert split(FILES, 0.25, 0) == split(backwards, 0.25, 0)
    assert split(FILES, 0.25, 1).validation != split(FILES, 0.25, 0).validation


@SPLITS
def test_split_holds_out_the_fraction(split):
    many = {f"{i}.py": f"x = {i}".encode() for i in range(2000)}
    assert len(split(many, 0.25, 0).validation) == pytest.approx(500, rel=0.15)
    assert len(split(FILES, 0.25, 0).validation) in range(4, 17)


@SPLITS
def test_split_refuses_what_it_cannot_split(split):
    with pytest.raises(ValueError, match=r"here: 3 documents, 1 of them distinct.*piece_size"):
        data_of({"a.py": b"x", "b.py": b"x", "c.py": b""}, split=split)
    with pytest.raises(ValueError, match=r"validation_fraction=1\.5 must be strictly"):
        data_of(FILES, split=split, fraction=1.5)


@SPLITS
@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_a_tiny_corpus_still_has_both_sides(split, fraction):
    sides = split({"a.py": b"x", "b.py": b"y"}, fraction, 0)
    assert len(sides.train) == len(sides.validation) == 1


@pytest.mark.parametrize("split", [splits.by_content, splits.by_name])
def test_adding_documents_moves_none_of_the_old_ones(split):
    more = {**FILES, **{f"more/{i}.py": f"y = {i}".encode() for i in range(40)}}
    before, after = split(FILES, 0.25, 0), split(more, 0.25, 0)
    assert set(before.train) <= set(after.train)
    assert set(before.validation) <= set(after.validation)


def test_split_by_name_holds_out_the_same_files_of_another_version():
    other = {name: content + b"# newer\n" for name, content in FILES.items()}
    assert splits.by_name(FILES, 0.25, 0) == splits.by_name(other, 0.25, 0)
    assert splits.by_content(FILES, 0.25, 0) != splits.by_content(other, 0.25, 0)


def test_held_out_bytes_are_the_held_out_documents():
    data = data_of(FILES)
    sides = splits.shuffled(FILES, 0.25, 0)
    assert data.validation.tobytes() == b"\n".join(FILES[name] for name in sides.validation)
    assert data.bytes_per_token == 1
    assert data.train_bytes == len(b"\n".join(FILES[name] for name in sides.train))
    assert list(data.documents()) == [FILES[name] for name in sides.train]


def test_folder_is_read_without_tests_and_third_parties(tmp_path):
    excluded = {f"{folder}/deep/x.py": b"no" for folder in stdlib.EXCLUDED_FOLDERS}
    make_tree(tmp_path, {**FILES, **excluded, "lib/notes.txt": b"no", "test.py": b"a file, kept"})
    assert stdlib.python_files(tmp_path) == {"test.py": b"a file, kept", **FILES}


def test_only_files_are_read_of_a_folder(tmp_path):
    root = make_tree(tmp_path, {"a.py": b"x = 1\n"})
    os.mkfifo(root / "pipe.py")
    (root / "device.py").symlink_to("/dev/zero")
    (root / "folder.py").mkdir()
    assert stdlib.python_files(root) == {"a.py": b"x = 1\n"}


def test_a_part_of_the_library_shares_no_content(tmp_path):
    shared, twice = b"in both parts\n", b"twice in one part\n"
    rest = {**FILES, "lib/copied.py": shared, "lib/tests/x.py": b"a test of the rest"}
    own = {f"test/{i}.py": b"t%d\n" % i for i in range(8)} | {"test/tests/deep.py": b"deep\n"}
    own |= {"test/copied.py": shared, "test/one.py": twice, "test/two.py": twice}
    make_tree(tmp_path, {**rest, **own, "test/site-packages/x.py": b"no"})
    options = {"root": str(tmp_path), "validation_fraction": 0.25, "prefetch": 0}
    base = stdlib.load(**options, without=["test"])
    adapt = stdlib.load(**options, only=["test"])
    assert base.source.endswith("without test") and adapt.source.endswith("its test")
    read = {name: sorted(data.documents()) for name, data in {"b": base, "a": adapt}.items()}
    judged = {"b": base.validation.tobytes(), "a": adapt.validation.tobytes()}
    expected = {*(text for path, text in own.items() if text != shared)}
    assert {*read["a"], *(line + b"\n" for line in judged["a"].split(b"\n") if line)} == expected
    assert not set(read["a"]) & set(read["b"])
    assert all(text not in judged["b"] for text in expected) and shared not in judged["a"]
    with pytest.raises(FileNotFoundError, match="'idle', which some Pythons leave out"):
        stdlib.load(**options, only=["test", "idle"])


def test_standard_library_of_this_python_is_held_out_by_file():
    data = stdlib.load(prefetch=0)
    root = Path(sysconfig.get_paths()["stdlib"])
    files = stdlib.python_files(root)
    sides = splits.shuffled(files, 0.05, 0)
    assert data.validation.tobytes() == b"\n".join(files[name] for name in sides.validation)
    assert 0.03 < len(sides.validation) / len(sides.validation + sides.train) < 0.07
    # The order of the training windows is that of every run since the first.
    train = np.frombuffer(b"\n".join(files[name] for name in sides.train), np.uint8)
    batches = data.batches(seed=3, batch_size=4, length=64)
    for step in range(3):
        expected = windows.sample_batch(train, seed=3, step=step, batch_size=4, length=64)
        np.testing.assert_array_equal(next(batches)["tokens"], expected)


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
        (dict(length=5000), r"5000 \+ 1 tokens does not fit into 5000 tokens.*at most 4999"),
        (dict(length=0), r"length=0 tokens to predict: give at least 1"),
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


def test_a_python_without_lzma_has_no_xz_figure_and_continues(monkeypatch):
    monkeypatch.setitem(sys.modules, "lzma", None)
    table = baselines.baselines(TEXT)
    assert table["xz -9e"] is None and table["gzip -9"] is not None
