"""Parquet: each row is a record, and one of its columns is a document."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.data import files
from experiments.data.corpus import Data, Sampler, from_documents
from experiments.data.files import check_size, check_string, find_files
from experiments.data.packing import PACKED
from experiments.data.splits import by_content

ENDINGS = (".parquet",)
ROWS = 128  # read at a time, so that a file that unpacks without end is noticed


def read(file: Path, *, field: str) -> dict[str, bytes]:
    """Reads the documents of one file.

    Args:
      file: to read.
      field: the column that holds the text; null is an empty document.

    Returns:
      Content by `file:row`.

    Raises:
      ValueError: the file is not Parquet, it has no such column, or pyarrow is missing; says what
        to do.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            "data=parquet needs the library pyarrow: pip install '.[parquet]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if field not in names:
                raise ValueError(
                    f"{file}: no column {field!r}; the columns are: {', '.join(names)}. "
                    "Give data.field=NAME"
                )
            if names.count(field) > 1:
                raise ValueError(f"{file}: {names.count(field)} columns are called {field!r}")
            claimed = _claimed(table.metadata, field)
            check_size(file, sum(claimed))
            documents, have = {}, 0
            for batch in _batches(table, field, claimed):
                check_size(file, have + batch.nbytes)
                for value in batch.column(0).to_pylist():
                    row = len(documents) + 1
                    text = check_string(value, field=field, where=f"{file}, row {row}")
                    documents[f"{file}:{row:09d}"] = text
                    have += len(text)
            return documents
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as Parquet ({str(error).strip().splitlines()[0]}): "
            "copy it again if it is truncated, or leave it out with a glob"
        ) from error


def _claimed(metadata: Any, field: str) -> list[int]:
    """Reads from the file how many bytes a column unpacks to in each group of rows."""
    sizes = []
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        columns = map(group.column, range(group.num_columns))
        mine = (one for one in columns if one.path_in_schema.split(".")[0] == field)
        sizes.append(sum(one.total_uncompressed_size for one in mine))
    return sizes


def _batches(table: Any, field: str, claimed: list[int]) -> Iterator[Any]:
    """Yields rows, few at a time where each may be large: a value that the file holds once, as in
    a dictionary, may stand in all of them, and each of them gets a copy."""
    for group, size in enumerate(claimed):
        rows = max(1, min(ROWS, files.SURELY_FITS // max(size, 1)))
        yield from table.iter_batches(batch_size=rows, row_groups=[group], columns=[field])


def load(
    *,
    path: str,
    field: str = "text",
    validation_fraction: float = 0.05,
    seed: int = 0,
    sampler: Sampler = PACKED,
    tokenizer: str | None = None,
    prefetch: int = 2,
) -> Data:
    """Loads Parquet files into memory.

    Args:
      path: a file, a folder (its *.parquet at any depth) or a glob.
      field: the column that holds the text.
      validation_fraction: share of the documents held out, by a hash of their content.
      seed: of the split.
      sampler: how batches are cut, `packing.PACKED` or `windows.RANDOM`.
      tokenizer: a file of the library tokenizers; None is bytes.
      prefetch: batches made ahead.

    Returns:
      The data.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file cannot be read, or there are too few documents to split.
    """
    documents: dict[str, bytes] = {}
    for file in find_files(path, endings=ENDINGS):
        documents |= read(file, field=field)
    return from_documents(
        documents,
        source=f"Parquet at {path}",
        split=by_content,
        validation_fraction=validation_fraction,
        seed=seed,
        sampler=sampler,
        tokenizer=tokenizer,
        prefetch=prefetch,
    )
