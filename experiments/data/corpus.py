"""Data for a language model: documents by name in, batches and held-out windows out.

Every source of data ends here. A source is a function that reads documents. Split,
tokenizer, order of the batches and prefetching are the same for all.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import UInt8

from experiments.data.batches import by_step, only_for
from experiments.data.splits import Split
from experiments.data.tokens import Tokenizer, Tokens, check_lossless, open_tokenizer, tokenize
from experiments.run.task import Batches

Batch = dict[str, np.ndarray]


class MakeBatches(Protocol):
    """Makes the batches of one process; see `Data`."""

    def __call__(
        self,
        *,
        seed: int,
        batch_size: int,
        length: int,
        shard_index: int = 0,
        shard_count: int = 1,
    ) -> Batches: ...


class Data(NamedTuple):
    """The training and held-out text of a language model.

    Attributes:
      source: one line that says where the text comes from.
      batches: `(seed, batch_size, length, shard_index=0, shard_count=1) -> Batches` of
        `{"tokens": int32 [batch, length + 1]}` and, where documents are packed,
        `"reset": bool [batch, length]`, true where a document begins. `batch_size` counts
        the rows of all shards together; each process gets its own part of them.
      held_out: `(count, length) -> batch`: evenly spaced windows, in the same form.
      validation: the held-out bytes.
      bytes_per_token: of those bytes; bits per byte are bits per token divided by it.
      train_bytes: of the training text; None for a stream, where it is unknown.
      tokenizer: text to tokens and back, and the size of the vocabulary.
      documents: `() -> iterator` once over the training documents.
    """

    source: str
    batches: MakeBatches
    held_out: Callable[..., Batch]
    validation: UInt8[np.ndarray, " bytes"]
    bytes_per_token: float
    train_bytes: int | None
    tokenizer: Tokenizer
    documents: Callable[[], Iterator[bytes]]


class Sampler(NamedTuple):
    """How tokens become batches.

    Attributes:
      batches: `(tokens, *, seed, batch_size, length) -> (step -> batch)`, the inner function
        being pure.
      held_out: `(tokens, *, count, length) -> batch`.
    """

    batches: Callable[..., Callable[[int], Batch]]
    held_out: Callable[..., Batch]


def from_documents(
    documents: Mapping[str, bytes],
    *,
    source: str,
    split: Split,
    validation_fraction: float,
    seed: int,
    sampler: Sampler,
    tokenizer: str | None,
    prefetch: int,
) -> Data:
    """Splits documents, encodes them and cuts batches.

    Args:
      documents: content by name.
      source: one line that says where the text comes from.
      split: what is held out, one of `experiments.data.splits`.
      validation_fraction: share of the documents that is held out.
      seed: of the split, separate from the seed of the run: runs with different seeds are
        evaluated on the same bytes.
      sampler: how batches are cut, `windows.RANDOM` or `packing.PACKED`.
      tokenizer: a file of the library tokenizers; None is bytes.
      prefetch: batches made ahead; 0 makes each on request.

    Returns:
      The data.

    Raises:
      ValueError: the documents cannot be split, or the tokenizer cannot be read.
      FileNotFoundError: no such tokenizer.
    """
    encoder = open_tokenizer(tokenizer)
    try:
        sides = split(documents, validation_fraction, seed)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    train = tokenize((documents[name] for name in sides.train), encoder)
    validation, held_out, ratio = judged_by(
        [documents[name] for name in sides.validation], encoder, sampler
    )

    def batches(*, seed, batch_size, length, shard_index=0, shard_count=1):
        rows = shard_rows(batch_size, shard_index, shard_count)
        cut = sampler.batches(train, seed=seed, batch_size=batch_size, length=length)
        own = by_step(
            lambda step: {name: rows_of_all[rows] for name, rows_of_all in cut(step).items()},
            prefetch=prefetch,
        )
        # The same position in other text or rows would mean other batches, and figures on other
        # held-out text would not belong to the same curve.
        about = {
            "tokenizer": encoder.digest,
            "training text": digest(train.ids, train.starts),
            "held-out text": digest(validation),
            "seed": seed,
            "batch_size": batch_size,
            "length": length,
        }
        return only_for(own, about)

    return Data(
        source=source,
        batches=batches,
        held_out=held_out,
        validation=validation,
        bytes_per_token=ratio,
        train_bytes=sum(len(documents[name]) + 1 for name in sides.train) - 1,
        tokenizer=encoder,
        documents=lambda: (documents[name] for name in sides.train),
    )


def digest(*arrays: np.ndarray) -> str:
    """Computes a short digest of arrays.

    Args:
      *arrays: in order.

    Returns:
      Hexadecimal digits.
    """
    found = hashlib.blake2b(digest_size=8)
    for array in arrays:
        found.update(f"{array.dtype} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array))
    return found.hexdigest()


def judged_by(
    documents: list[bytes], tokenizer: Tokenizer, sampler: Sampler
) -> tuple[UInt8[np.ndarray, " bytes"], Callable[..., Batch], float]:
    """Prepares the held-out documents for `Data`.

    Args:
      documents: held out.
      tokenizer: encodes them.
      sampler: cuts them.

    Returns:
      The bytes, a newline between two documents; the function that cuts windows; and
      bytes for each token.

    Raises:
      ValueError: the tokenizer does not give the text back.
    """
    tokens: Tokens = tokenize(documents, tokenizer)
    check_lossless(documents, tokens, tokenizer)
    text = np.frombuffer(b"\n".join(documents), np.uint8)

    def held_out(*, count: int, length: int) -> Batch:
        return sampler.held_out(tokens, count=count, length=length)

    return text, held_out, len(text) / max(tokens.end, 1)


def shard_rows(batch_size: int, shard_index: int, shard_count: int) -> slice:
    """Selects the rows of a batch that one process reads.

    Args:
      batch_size: rows of all processes.
      shard_index: number of the process.
      shard_count: how many there are.

    Returns:
      Its rows; the slices of all processes are the batch.

    Raises:
      ValueError: the processes do not divide the batch, or there is no such process.
    """
    if shard_count < 1 or not 0 <= shard_index < shard_count:
        raise ValueError(
            f"shard_index={shard_index} of shard_count={shard_count}: "
            "give an index from 0 to the count minus one"
        )
    if batch_size < 1 or batch_size % shard_count:
        more = shard_count * max(1, -(-batch_size // shard_count))
        raise ValueError(
            f"batch_size={batch_size} rows cannot be shared by {shard_count} processes: "
            f"give a multiple of {shard_count}, such as {more}"
        )
    own = batch_size // shard_count
    return slice(shard_index * own, (shard_index + 1) * own)
