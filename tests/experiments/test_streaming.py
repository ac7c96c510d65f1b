"""Streams: cut without a gap, fetched ahead within bounds, stopped when nobody wants them."""

import threading
import time
from collections import Counter

import pytest

from experiments.data.batches import ahead, by_step
from experiments.data.streaming import StreamBatches
from experiments.data.tokens import BYTES

DOCUMENTS = [bytes([65 + i]) * (1 + 7 * i) for i in range(24)]


class Counted:
    """Endless documents whose position is a number."""

    def __init__(self, documents=DOCUMENTS):
        self.documents, self.at = documents, 0

    def __next__(self):
        self.at += 1
        return self.documents[(self.at - 1) % len(self.documents)]

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("length, block", [(1, 1), (8, 3), (50, 2), (400, 1)])
def test_a_stream_is_cut_without_a_gap_across_blocks(length, block):
    rows, blocks = 2, 7
    stream = StreamBatches(Counted(), BYTES, seed=0, rows=rows, length=length, block=block)
    targets = Counter()
    for _ in range(blocks * block):
        targets.update(next(stream)["tokens"][:, 1:].ravel().tolist())
    tape = b"".join(document + b"\n" for document in DOCUMENTS) * 20
    expected = Counter(tape[1 : blocks * block * rows * length + 1])
    assert targets == expected


def test_rows_of_a_stream_are_shuffled_within_their_block_and_marked():
    stream = StreamBatches(Counted(), BYTES, seed=1, rows=8, length=8, block=4)
    tape = b"".join(document + b"\n" for document in DOCUMENTS) * 3
    cut = [next(stream) for _ in range(4)]
    rows = [bytes(row.tolist()) for batch in cut for row in batch["tokens"]]
    in_order = [tape[i : i + 9] for i in range(0, 32 * 8, 8)]
    assert sorted(rows) == sorted(in_order) and rows != in_order
    begins = {0} | {i + 1 for i, byte in enumerate(tape) if byte == ord("\n")}
    marks = {row: [8 * i + t in begins for t in range(8)] for i, row in enumerate(in_order)}
    resets = [mark.tolist() for batch in cut for mark in batch["reset"]]
    assert resets.count(marks[rows[0]]) >= 1
    for row, reset in zip(rows, resets, strict=True):
        if rows.count(row) == 1:
            assert reset == marks[row]


def take(batches, count):
    return [next(batches) for _ in range(count)]


def failing_at(bad):
    def batch(step):
        if step == bad:
            raise ValueError(f"line {step} is broken")
        return step

    return batch


class Steps:
    def __init__(self, batch):
        self.batch, self.at = batch, 0

    def __next__(self):
        self.at += 1
        return self.batch(self.at - 1)

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


FETCHERS = {
    "by_step": by_step,
    "ahead": lambda batch, prefetch: ahead(Steps(batch), prefetch=prefetch),
}


@pytest.mark.parametrize("fetch", FETCHERS.values(), ids=FETCHERS)
@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_an_error_comes_after_the_batches_before_it(fetch, prefetch):
    batches = fetch(failing_at(3), prefetch=prefetch)
    assert take(batches, 3) == [0, 1, 2]
    with pytest.raises(ValueError, match="line 3 is broken"):
        next(batches)
    batches.close()


@pytest.mark.parametrize("fetch", FETCHERS.values(), ids=FETCHERS)
def test_fetching_ahead_is_bounded_and_its_thread_ends(fetch):
    made = []

    def batch(step):
        made.append(step)
        return step

    others = threading.active_count()
    batches = fetch(batch, prefetch=2)
    assert next(batches) == 0
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    # One returned, two waiting and at most one in the making.
    assert 3 <= len(made) <= 4 and threading.active_count() == others + 1
    batches.close()
    while threading.active_count() > others and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == others


class Slow(Counted):
    def __next__(self):
        time.sleep(0.01)
        return super().__next__()


def test_closing_a_stream_does_not_wait_for_its_block():
    stream = StreamBatches(Slow(), BYTES, seed=0, rows=8, length=1000, block=100)
    batches = ahead(stream, prefetch=1)
    batches.start_prefetch()
    time.sleep(0.05)
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 2  # the block needs nine thousand documents
    with pytest.raises(RuntimeError, match="these batches are closed: make new ones"):
        next(stream)


@pytest.mark.parametrize("fetch", FETCHERS.values(), ids=FETCHERS)
def test_a_negative_prefetch_is_refused(fetch):
    with pytest.raises(ValueError, match="prefetch=-1 batches: give 0"):
        fetch(failing_at(0), prefetch=-1)
