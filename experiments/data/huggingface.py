"""Hugging Face data sets, streamed from the Hub or from files that `datasets` reads.

Documents are held out by a hash of their content, so exact copies are on one side without
reading to the end. The library saves the exact position in a stream, but not that of its shuffle
buffer, which is therefore not used.
"""

import contextlib
import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.batches import ahead, only_for
from experiments.data.corpus import Data, digest, judged_by, shard_rows
from experiments.data.files import check_string, check_unpacked
from experiments.data.packing import PACKED
from experiments.data.splits import check_fraction, share
from experiments.data.streaming import StreamBatches
from experiments.data.tokens import open_tokenizer
from experiments.run import litter

MIB = 2**20
WHOLE, PIECES = 2**30, 256
# Kinds of files whose records are in them; others, such as hdf5, may name files elsewhere.
SELF_CONTAINED = ("text", "json", "parquet", "csv", "arrow")


class Records:
    """Documents of a data set that restarts at its end, with Grain's protocol.

    Args:
      make: opens the data set at its beginning.
      text: `(record, its number) -> document`, empty for records that are left out.
      where: names the data set in errors.
    """

    def __init__(self, make: Callable[[], Any], text: Callable[[Any, int], bytes], where: str):
        self._make, self._text, self._where = make, text, where
        self.set_state({"pass": 0, "record": 0, "stream": None})

    def __next__(self) -> bytes:
        while (record := next(self._records, None)) is not None:
            self._record += 1
            document = self._text(record, self._record)
            if document:
                self._given += 1
                return document
        if self._whole and not self._given:
            raise ValueError(
                f"{self._where}: none of the {self._record} records can be trained on: all are "
                "empty or held out. Give another data.field, or a smaller data.validation_fraction"
            )
        self.set_state({"pass": self._pass + 1, "record": 0, "stream": None})
        return next(self)

    def get_state(self) -> dict[str, Any]:
        """The position after the last document."""
        stream = self._data.state_dict() if self._record else None
        return {"pass": self._pass, "record": self._record, "stream": stream}

    def set_state(self, state: dict[str, Any], /) -> None:
        """Moves to a position from `get_state`."""
        self._pass, self._record = state["pass"], state["record"]
        self._whole, self._given = self._record == 0, 0
        self._data = self._make()
        if state["stream"] is not None:
            self._data.load_state_dict(state["stream"])
        self._records = _readable(self._data, self._where)


def load(
    *,
    path: str,
    name: str | None = None,
    data_files: Any = None,
    split: str = "train",
    field: str = "text",
    validation_split: str | None = None,
    validation_fraction: float = 0.05,
    validation_bytes: int = 1_000_000,
    seed: int = 0,
    block: int = 64,
    tokenizer: str | None = None,
    prefetch: int = 2,
) -> Data:
    """Streams a data set.

    Args:
      path: its name on the Hub, a folder, or a kind of file ("json", "parquet", "text").
      name: of its configuration, if it has several.
      data_files: which of its files to read; None: all. Required for a kind of file.
      split: to train on.
      field: name of the field that holds the text.
      validation_split: to evaluate on; None holds out documents of `split`.
      validation_fraction: share of the documents that are held out, each by its content.
      validation_bytes: of held-out text to evaluate on; read at the start.
      seed: of the choice of held-out documents.
      block: steps whose rows are shuffled together; the first batch waits for them.
      tokenizer: a file of the library tokenizers; None is bytes.
      prefetch: batches made ahead.

    Returns:
      The data. Each process reads its own records, so batches depend on their number.

    Raises:
      ValueError: no such data set, split or field, a folder whose card names files outside of it,
        or the library `datasets` is missing.
      FileNotFoundError: no such tokenizer.
    """
    check_fraction(validation_fraction)
    encoder = open_tokenizer(tokenizer)
    where = f"data set {path!r}" if name is None else f"data set {path!r} ({name})"

    def open_split(which: str) -> Any:
        return _open(path, name, data_files, which, where)

    def text(record: Any, number: int) -> bytes:
        if field not in record:
            raise ValueError(
                f"{where}: no field {field!r}; the fields are: {', '.join(record)}. "
                "Give data.field=NAME"
            )
        return check_string(record[field], field=field, where=f"{where}, record {number}")

    def judged_split() -> Iterator[Any]:
        return _readable(open_split(validation_split or split), where)

    def apart(document: bytes) -> bool:
        return validation_split is not None or share(document, seed) < validation_fraction

    judged = _gather(
        (text(r, n) for n, r in enumerate(judged_split(), start=1)),
        wanted=apart,
        size=validation_bytes,
    )
    if not judged:
        raise ValueError(
            f"{where}: split {validation_split or split!r} gives no document to evaluate on: "
            "give a larger data.validation_fraction, or data.validation_split=NAME"
        )

    def to_train_on(record: Any, number: int) -> bytes:
        document = text(record, number)
        held = document in judged if validation_split is not None else apart(document)
        return b"" if held else document

    validation, held_out, ratio = judged_by(list(judged), encoder, PACKED)

    def batches(*, seed, batch_size, length, shard_index=0, shard_count=1):
        rows = shard_rows(batch_size, shard_index, shard_count)

        def make() -> Any:
            whole = open_split(split)
            if shard_count == 1:
                return whole
            from datasets.distributed import split_dataset_by_node

            return split_dataset_by_node(whole, rank=shard_index, world_size=shard_count)

        stream = StreamBatches(
            Records(make, to_train_on, where),
            encoder,
            seed=seed,
            rows=rows.stop - rows.start,
            length=length,
            block=block,
        )
        about = {
            "stream": f"{where}, {split}, {field}",
            "files": digest_of_files(local_files(path, data_files)),
            "held-out text": digest(validation),
            "tokenizer": encoder.digest,
            "block": block,
            "seed": seed,
            "batch_size": batch_size,
            "length": length,
            "shards": f"{shard_index} of {shard_count}",
        }
        return only_for(ahead(stream, prefetch=prefetch), about)

    def documents() -> Iterator[bytes]:
        records = enumerate(_readable(open_split(split), where), start=1)
        found = (to_train_on(r, n) for n, r in records)
        return (document for document in found if document)

    return Data(
        source=where,
        batches=batches,
        held_out=held_out,
        validation=validation,
        bytes_per_token=ratio,
        train_bytes=None,
        tokenizer=encoder,
        documents=documents,
    )


def local_files(path: str, data_files: Any) -> list[Path]:
    """Lists the files on this machine that a data set is read from.

    Args:
      path: as for `load`.
      data_files: as for `load`.

    Returns:
      The files, sorted; without files on the Hub or elsewhere.
    """
    root = Path(os.path.expanduser(path))
    if isinstance(data_files, Mapping):
        data_files = list(data_files.values())
    if isinstance(data_files, str | Path) or data_files is None:
        data_files = [data_files]
    found: set[Path] = set()
    for name in data_files:
        if isinstance(name, Sequence) and not isinstance(name, str):
            found |= set(local_files(path, name))
        elif name is None:
            found |= set(root.rglob("*")) if root.is_dir() else set()
        elif "://" not in str(name):
            place = str(root / str(name)) if root.is_dir() else os.path.expanduser(str(name))
            found |= {Path(place), *map(Path, glob.glob(place, recursive=True))}
    return sorted(file for file in litter.without(found) if file.is_file())


def digest_of_files(files: Sequence[Path]) -> str | None:
    """Computes a short digest of files.

    Args:
      files: in order. A file larger than `WHOLE` is represented by its size and `PIECES` evenly
        spaced mebibytes.

    Returns:
      Hexadecimal digits, independent of the folder; None without files.
    """
    found = hashlib.blake2b(digest_size=8)
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.name} {size} ".encode())
        last = max(size - MIB, 0)
        starts = range(0, size, MIB) if size <= WHOLE else np.linspace(0, last, PIECES).astype(int)
        with file.open("rb") as text:
            for start in starts:
                text.seek(start)
                found.update(text.read(MIB))
    return found.hexdigest() if files else None


def _open(path: str, name: str | None, data_files: Any, split: str, where: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "data=huggingface needs the library datasets: pip install '.[datasets]'"
        ) from error
    folder = Path(os.path.expanduser(path)).is_dir()
    if folder or local_files(path, data_files):
        with _opening(where, split, datasets):
            described = datasets.load_dataset_builder(path, name=name, data_files=data_files)
        if folder:
            _check_inside(described, path, data_files, where)
        for file in _files_of(described):
            if "://" not in file:
                check_unpacked(Path(file))
    with _opening(where, split, datasets):
        return datasets.load_dataset(
            path, name=name, data_files=data_files, split=split, streaming=True
        )


@contextlib.contextmanager
def _opening(where: str, split: str, datasets: Any) -> Iterator[None]:
    """Makes one line of an error of the library."""
    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{where}, split {split!r}, cannot be opened ({str(error).strip().splitlines()[0]}): "
            "give data.path, data.name and data.split as its page on the Hub shows them, or "
            "data.path=json data.data_files=FILES for files of your own"
        ) from error


def _files_of(described: Any) -> list[str]:
    return [str(one) for some in (described.config.data_files or {}).values() for one in some]


def _check_inside(described: Any, path: str, data_files: Any, where: str) -> None:
    """Refuses a folder whose card, or whose kind of file, leads to other files than its own."""
    root = Path(os.path.expanduser(path)).resolve()
    given = {str(one) for one in local_files(path, data_files)} if data_files else set()
    for file in _files_of(described):
        inside = "://" not in file and Path(file).resolve().is_relative_to(root)
        if not (inside or data_files and ("://" in file or file in given)):
            raise ValueError(
                f"{where}: its card names {file}, which is not in that folder: "
                "take it out of README.md, or name the files with data.data_files"
            )
    kind = type(described).__module__.rpartition(".")[2]
    if kind not in SELF_CONTAINED:
        raise ValueError(
            f"{where}: its files are of the kind {kind}, which may refer to other files: "
            f"give a folder of {', '.join(SELF_CONTAINED)}"
        )


def _readable(records: Any, where: str) -> Iterator[Any]:
    """Yields the records; an error of the library becomes one line."""
    rest, number = iter(records), 0
    while True:
        try:
            record = next(rest)
        except StopIteration:
            return
        except Exception as error:  # of any of the libraries that read files
            told = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{where}: after record {number} its files cannot be read ({told[:200]}): "
                "repair that file, or name the others with data.data_files"
            ) from error
        number += 1
        yield record


def _gather(
    documents: Iterator[bytes], *, wanted: Callable[[bytes], bool], size: int
) -> dict[bytes, None]:
    """Takes distinct documents, in order, up to a number of bytes."""
    found: dict[bytes, None] = {}
    have = 0
    for document in documents:
        if document and document not in found and wanted(document):
            found[document] = None
            have += len(document)
            if have >= size:
                break
    return found
