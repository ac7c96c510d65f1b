"""Text files: each file is a document."""

from experiments.data.corpus import Data, Sampler, from_documents
from experiments.data.files import find_files, read_text
from experiments.data.packing import PACKED
from experiments.data.splits import by_content

ENDINGS = (".txt", ".text", ".md")


def pieces(text: str, size: int) -> list[str]:
    """Cuts a text at line ends.

    Args:
      text: to cut.
      size: the least number of characters of a piece, except for the last one.

    Returns:
      The pieces; joined they are the text.
    """
    found, begin = [], 0
    while begin < len(text):
        end = text.find("\n", begin + size - 1) + 1 or len(text)
        found.append(text[begin:end])
        begin = end
    return found


def load(
    *,
    path: str,
    encoding: str = "utf-8",
    piece_size: int | None = None,
    validation_fraction: float = 0.05,
    seed: int = 0,
    sampler: Sampler = PACKED,
    tokenizer: str | None = None,
    prefetch: int = 2,
) -> Data:
    """Loads text files into memory.

    Args:
      path: a file, a folder (its *.txt, *.text and *.md at any depth) or a glob.
      encoding: of all files; the model sees UTF-8.
      piece_size: None takes a file as one document; a number cuts longer files at line ends
        into documents of about that many characters, so that one large file can be split.
      validation_fraction: share of the documents held out, by a hash of their content.
      seed: of the split.
      sampler: how batches are cut, `packing.PACKED` or `windows.RANDOM`.
      tokenizer: a file of the library tokenizers; None is bytes.
      prefetch: batches made ahead.

    Returns:
      The data.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file is not text, or there are too few documents to split.
    """
    if piece_size is not None and piece_size < 1:
        raise ValueError(f"data.piece_size={piece_size} characters: give at least 1, or null")
    documents = {}
    files = find_files(path, endings=ENDINGS)
    for file in files:
        text = read_text(file, encoding=encoding)
        parts = [text] if piece_size is None else pieces(text, piece_size)
        for number, part in enumerate(parts):
            name = f"{file}:{number:09d}" if len(parts) > 1 else str(file)
            documents[name] = part.encode()
    if not any(documents.values()):
        raise ValueError(f"data.path={path!r}: {len(files)} files, all empty: give others")
    return from_documents(
        documents,
        source=f"text files at {path}",
        split=by_content,
        validation_fraction=validation_fraction,
        seed=seed,
        sampler=sampler,
        tokenizer=tokenizer,
        prefetch=prefetch,
    )
