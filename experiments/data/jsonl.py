"""JSON Lines: each line is an object, and one of its fields is a document."""

import json
from pathlib import Path

from experiments.data.corpus import Data, Sampler, from_documents
from experiments.data.files import check_string, find_files, read_text
from experiments.data.packing import PACKED
from experiments.data.splits import by_content

ENDINGS = (".jsonl", ".ndjson")


def read(file: Path, *, field: str) -> dict[str, bytes]:
    """Reads the documents of one file.

    Args:
      file: of UTF-8 text; empty lines are skipped.
      field: name of the field that holds the text; null is an empty document.

    Returns:
      Content by `file:line`.

    Raises:
      ValueError: a line is not an object with that field; gives file, line and what to do.
    """
    documents = {}
    # Only "\n" ends a record: splitlines would also cut at characters that JSON does not escape.
    for number, line in enumerate(read_text(file, encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # also huge numbers and deep nesting
            place = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise ValueError(
                f"{where}: not JSON ({getattr(error, 'msg', error)}{place}). A file of JSON Lines "
                "has one complete object on each line: repair or remove the line"
            ) from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{where}: {type(record).__name__} where an object such as "
                f'{{"{field}": "..."}} was expected'
            )
        if field not in record:
            there = ", ".join(map(str, record)) or "none"
            raise ValueError(
                f"{where}: no field {field!r}; the fields are: {there}. Give data.field=NAME"
            )
        documents[f"{file}:{number:09d}"] = check_string(record[field], field=field, where=where)
    return documents


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
    """Loads JSON Lines into memory.

    Args:
      path: a file, a folder (its *.jsonl and *.ndjson at any depth) or a glob.
      field: name of the field that holds the text.
      validation_fraction: share of the documents held out, by a hash of their content.
      seed: of the split.
      sampler: how batches are cut, `packing.PACKED` or `windows.RANDOM`.
      tokenizer: a file of the library tokenizers; None is bytes.
      prefetch: batches made ahead.

    Returns:
      The data.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line cannot be read, or there are too few documents to split.
    """
    documents: dict[str, bytes] = {}
    for file in find_files(path, endings=ENDINGS):
        documents |= read(file, field=field)
    return from_documents(
        documents,
        source=f"JSON Lines at {path}",
        split=by_content,
        validation_fraction=validation_fraction,
        seed=seed,
        sampler=sampler,
        tokenizer=tokenizer,
        prefetch=prefetch,
    )
