"""Batches: packed without loss, dealt without overlap, fetched ahead, and taken up where they were.

Every source of data is held to the same laws, with and without fetching ahead.
"""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from experiments.data import huggingface, jsonl, packing, parquet, splits, stdlib, text, windows
from experiments.data.corpus import from_documents
from experiments.data.tokens import BYTES, tokenize
from experiments.run.folders import RunError

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Lengths from 1 byte to many rows; a byte that no other document has tells them apart.
DOCUMENTS = [bytes([65 + i]) * (1 + 7 * i) for i in range(24)]
SHAPE = dict(seed=5, batch_size=4, length=8)


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """The library `datasets` keeps its cache to this run and asks nobody."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
    patch.setenv("HF_HUB_OFFLINE", "1")
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same documents as text files, JSON Lines and Parquet."""
    import pyarrow
    import pyarrow.parquet

    root = tmp_path_factory.mktemp("documents")
    texts = [document.decode() for document in DOCUMENTS]
    (root / "text").mkdir()
    for i, content in enumerate(texts):
        (root / f"text/{i:02d}.txt").write_text(content)
    lines = "".join(json.dumps({"body": content}) + "\n" for content in texts)
    (root / "all.jsonl").write_text(lines)
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), root / "all.parquet")
    return root


def load(name, folder, prefetch):
    if name == "stdlib":
        for file in (folder / "text").glob("*.txt"):
            file.with_suffix(".py").write_bytes(file.read_bytes())
        return stdlib.load(root=str(folder / "text"), prefetch=prefetch)
    if name == "text":
        return text.load(path=str(folder / "text"), prefetch=prefetch)
    if name == "jsonl":
        return jsonl.load(path=str(folder / "all.jsonl"), field="body", prefetch=prefetch)
    if name == "parquet":
        return parquet.load(path=str(folder / "all.parquet"), field="body", prefetch=prefetch)
    return huggingface.load(
        path="json",
        data_files=str(folder / "all.jsonl"),
        field="body",
        validation_fraction=0.2,
        block=3,
        prefetch=prefetch,
    )


def take(batches, count):
    return [next(batches) for _ in range(count)]


def equal(first, second):
    return all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
        for a, b in zip(first, second, strict=True)
    )


SOURCES = pytest.mark.parametrize("name", ["stdlib", "text", "jsonl", "parquet", "huggingface"])


@SOURCES
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_position_that_was_saved_gives_the_batches_that_followed(name, folder, prefetch):
    data = load(name, folder, prefetch)
    batches = data.batches(**SHAPE)
    # Positions at the start, within a block and between two blocks of the stream.
    for before in (0, 1, 2, 5):
        take(batches, before)
        state = json.loads(json.dumps(batches.get_state()))
        time.sleep(0.01)  # what is fetched ahead in the meantime is not part of the position
        assert batches.get_state() == state
        followed = take(batches, 8)
        anew = load(name, folder, prefetch).batches(**SHAPE)
        anew.set_state(state)
        assert anew.get_state() == state
        assert equal(take(anew, 8), followed)
        batches.set_state(state)
        assert equal(take(batches, 8), followed)
        anew.close()
    batches.close()


ANEW = """
import json, sys
from experiments.data import huggingface, jsonl
path, states = sys.argv[1], json.loads(sys.argv[2])
for state, data in zip(states, (
    jsonl.load(path=path, field="body"),
    huggingface.load(path="json", data_files=path, field="body", validation_fraction=0.2, block=3),
)):
    batches = data.batches(seed=5, batch_size=4, length=8)
    batches.set_state(state)
    print(json.dumps([next(batches)["tokens"].tolist() for _ in range(6)]))
    batches.close()
"""


@pytest.mark.slow
def test_another_process_takes_up_a_position(folder):
    runs = [load(name, folder, 2).batches(**SHAPE) for name in ("jsonl", "huggingface")]
    for batches in runs:
        take(batches, 4)
    states = json.dumps([batches.get_state() for batches in runs])
    out = subprocess.run(
        [sys.executable, "-c", ANEW, str(folder / "all.jsonl"), states],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    for batches, line in zip(runs, out.stdout.splitlines(), strict=True):
        assert [batch["tokens"].tolist() for batch in take(batches, 6)] == json.loads(line)
        batches.close()


@SOURCES
def test_fetching_ahead_changes_no_batch(name, folder):
    plain, fetched = (load(name, folder, prefetch).batches(**SHAPE) for prefetch in (0, 3))
    assert equal(take(plain, 12), take(fetched, 12))
    assert plain.get_state() == fetched.get_state()
    fetched.close()


@SOURCES
def test_batches_have_the_agreed_form_and_follow_the_seed(name, folder):
    data = load(name, folder, 0)
    batch = next(data.batches(**SHAPE))
    assert batch["tokens"].shape == (4, 9) and batch["tokens"].dtype == np.int32
    held_out = data.held_out(count=3, length=8)
    assert held_out["tokens"].shape == (3, 9) and held_out.keys() == batch.keys()
    if name != "stdlib":
        assert batch["reset"].shape == (4, 8) and batch["reset"].dtype == bool
    other = take(data.batches(**(SHAPE | {"seed": 6})), 6)
    assert not equal(take(data.batches(**SHAPE), 6), other)


@SOURCES
def test_nothing_held_out_is_trained_on(name, folder):
    data = load(name, folder, 0)
    held_out = set(data.validation.tolist()) - {ord("\n")}
    # Six epochs; random windows need longer to have been everywhere.
    batches = take(data.batches(**SHAPE), 4000 if name == "stdlib" else 400)
    seen = set(np.concatenate([batch["tokens"].ravel() for batch in batches]).tolist())
    assert held_out and not held_out & seen
    everything = {document[0] for document in DOCUMENTS}
    assert seen == (everything - held_out) | {ord("\n")}


PACKED = pytest.mark.parametrize("length", [1, 8, 100, 1000])


@PACKED
def test_an_epoch_of_packed_rows_predicts_every_token_once_and_marks_every_document(length):
    tokens = tokenize(DOCUMENTS, BYTES)
    rows = packing.row_count(tokens, length)
    batch = packing.PACKED.batches(tokens, seed=0, batch_size=rows, length=length)
    for epoch in (0, 1):
        cut = batch(epoch)
        predicted = Counter(cut["tokens"][:, 1:].ravel().tolist())
        there = Counter(tokens.ids.tolist())
        # The last row is filled from the beginning of the epoch.
        again = predicted - there
        assert not there - predicted and again.total() == rows * length - len(tokens.ids) < length
        starts = cut["tokens"][:, :-1][cut["reset"]]
        assert set(starts.tolist()) == {document[0] for document in DOCUMENTS}
        # A row that continues a document at its first token is not marked there.
        before = np.roll(cut["tokens"][:, :-1], 1, axis=1)[:, 1:]
        np.testing.assert_array_equal(cut["reset"][:, 1:], before == ord("\n"))
    assert not np.array_equal(batch(0)["tokens"], batch(1)["tokens"])


def test_rows_of_a_tape_are_its_tokens_in_order():
    tokens = tokenize([b"abc", b"de"], BYTES)
    tape = packing.lay(tokens, np.array([1, 0]))
    cut = packing.cut_rows(tokens, tape, np.array([0, 1]), length=4)
    assert [bytes(row.tolist()) for row in cut["tokens"]] == [b"de\nab", b"bc\nde"]
    expected = [[True, False, False, True], [False, False, False, True]]
    np.testing.assert_array_equal(cut["reset"], expected)


def test_held_out_windows_of_packed_documents_mark_their_beginnings():
    tokens = tokenize([b"abc", b"de"], BYTES)
    cut = packing.PACKED.held_out(tokens, count=2, length=4)
    assert [bytes(row.tolist()) for row in cut["tokens"]] == [b"abc\nd", b"bc\nde"]
    np.testing.assert_array_equal(cut["reset"], [[True, False, False, False], [False] * 3 + [True]])


def memory(sampler, prefetch=0):
    named = {str(i): document for i, document in enumerate(DOCUMENTS)}
    return from_documents(
        named,
        source="here",
        split=splits.by_content,
        validation_fraction=0.2,
        seed=0,
        sampler=sampler,
        tokenizer=None,
        prefetch=prefetch,
    )


@pytest.mark.parametrize("sampler", [windows.RANDOM, packing.PACKED], ids=["windows", "packed"])
@pytest.mark.parametrize("count", [2, 4])
def test_the_shards_of_a_batch_are_the_batch(sampler, count):
    data = memory(sampler)
    whole = data.batches(**SHAPE)
    shards = [data.batches(**SHAPE, shard_index=i, shard_count=count) for i in range(count)]
    for _ in range(5):
        parts = [next(shard) for shard in shards]
        for name, rows in next(whole).items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), rows)
    # A position of one shard is that of any number of them.
    whole.set_state(shards[0].get_state())
    assert whole.get_state() == shards[-1].get_state()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_shards_of_a_stream_share_no_document_and_cover_all(folder, count):
    data = load("huggingface", folder, 0)
    seen = []
    for i in range(count):
        batches = data.batches(**SHAPE, shard_index=i, shard_count=count)
        cut = np.concatenate([batch["tokens"].ravel() for batch in take(batches, 90)])
        seen.append(set(cut.tolist()) - {ord("\n")})
    everything = {document[0] for document in DOCUMENTS} - set(data.validation.tolist())
    assert set().union(*seen) == everything
    assert sum(map(len, seen)) == len(everything)


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(shard_count=3), "batch_size=4 rows cannot be shared by 3 .* such as 6"),
        (dict(shard_index=2, shard_count=2), "shard_index=2 of shard_count=2: give an index"),
        (dict(length=10_000), r"10000 \+ 1 tokens does not fit"),
    ],
)
def test_shards_and_windows_that_do_not_fit_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        memory(packing.PACKED).batches(**(SHAPE | bad))


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(seed=6), "seed was 5 and is 6. Restore it"),
        (dict(length=9), "length was 8 and is 9"),
        (dict(batch_size=2), "batch_size was 4 and is 2"),
    ],
)
@pytest.mark.parametrize("name", ["jsonl", "huggingface"])
def test_a_position_is_refused_where_it_would_mean_other_batches(name, changed, message, folder):
    data = load(name, folder, 0)
    state = data.batches(**SHAPE).get_state()
    with pytest.raises(RunError, match=message):
        data.batches(**(SHAPE | changed)).set_state(state)


def test_a_position_is_refused_where_the_text_has_changed(folder, tmp_path):
    state = load("text", folder, 0).batches(**SHAPE).get_state()
    for file in (folder / "text").glob("*.txt"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    same = text.load(path=str(tmp_path), prefetch=0)
    same.batches(**SHAPE).set_state(state)
    (tmp_path / "one_more.txt").write_text("of another file\n" * 9)
    more = text.load(path=str(tmp_path), prefetch=0)
    with pytest.raises(RunError, match=r"training text was '\w+' and is '\w+'"):
        more.batches(**SHAPE).set_state(state)
