"""Text as numbers: bytes, or the tokens of a file of the `tokenizers` library."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Integer


class Tokenizer(NamedTuple):
    """Text to token numbers and back.

    Attributes:
      vocab_size: token numbers are below it.
      encode: `bytes -> numbers`.
      decode: `numbers -> bytes`.
      separator: the numbers that end a document.
      encode_all: as `encode`, for many texts on all cores; None encodes one after the other.
      digest: of the file that it was read from.
    """

    vocab_size: int
    encode: Callable[[bytes], Integer[np.ndarray, " tokens"]]
    decode: Callable[[Sequence[int]], bytes]
    separator: tuple[int, ...]
    encode_all: Callable[[Iterable[bytes]], Iterable[Integer[np.ndarray, " tokens"]]] | None = None
    digest: str = "bytes"


class Tokens(NamedTuple):
    """Documents one after the other, each followed by the separator.

    Attributes:
      ids: token numbers of all of them.
      starts: where each document begins, and the length of `ids`.
      end: where the last document ends, before its separator.
    """

    ids: Integer[np.ndarray, " tokens"]
    starts: Int[np.ndarray, " documents_plus_one"]
    end: int


BYTES = Tokenizer(
    vocab_size=256,
    encode=lambda text: np.frombuffer(text, np.uint8),
    decode=bytes,
    separator=(ord("\n"),),
)

END_OF_TEXT = "<|endoftext|>"
# Documents that the library encodes at a time, shared by all cores.
TOGETHER = 1000


def open_tokenizer(path: str | None) -> Tokenizer:
    """Reads a tokenizer.

    Args:
      path: a file that `tokenizers` wrote, for example by `experiments.train_tokenizer`;
        None is bytes.

    Returns:
      The tokenizer. Documents end with its token `<|endoftext|>` or, if it has none, with its
      encoding of a newline. Text that is not UTF-8 is read with U+FFFD in it.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is not a tokenizer, or the library `tokenizers` is missing.
    """
    if path is None:
        return BYTES
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"data.tokenizer={path!r} is not a file: train one with "
            "`python -m experiments.train_tokenizer`, or leave it null for bytes"
        )
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            f"data.tokenizer={path!r} needs the library tokenizers: "
            "pip install '.[tokenizers]', or leave data.tokenizer null for bytes"
        ) from error
    try:
        model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"{path} is not a file of the library tokenizers ({error}): "
            "give data.tokenizer=FILE.json as `python -m experiments.train_tokenizer` writes it"
        ) from error

    if type(model.decoder).__name__ == "ByteLevel":
        decode = _byte_level(model)
    else:

        def decode(ids: Sequence[int]) -> bytes:
            return model.decode([int(i) for i in ids], skip_special_tokens=False).encode()

    # A document that contains the text <|endoftext|> does not end there.
    model.encode_special_tokens = True

    def encode_all(texts: Iterable[bytes]) -> Iterator[np.ndarray]:
        rest = (text.decode(errors="replace") for text in texts)
        while some := list(islice(rest, TOGETHER)):
            for encoded in model.encode_batch(some, add_special_tokens=False):
                yield np.asarray(encoded.ids, np.int32)

    def encode(text: bytes) -> np.ndarray:
        return next(encode_all([text]))

    end = model.token_to_id(END_OF_TEXT)
    separator = (end,) if end is not None else tuple(encode(b"\n").tolist())
    # Not the number of tokens: their numbers may have gaps.
    size = 1 + max(model.get_vocab().values(), default=-1)
    digest = hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()
    return Tokenizer(size, encode, decode, separator, encode_all, digest)


def _byte_level(model: Any) -> Callable[[Sequence[int]], bytes]:
    """Makes a decoder to exact bytes, even if tokens end inside a character."""
    plain = [b for b in range(256) if chr(b).isprintable() and b not in (0x20, 0xAD)]
    # The library writes bytes as characters: themselves if printable, others from 256 on.
    others = [b for b in range(256) if b not in plain]
    byte_of = {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}
    special = {number: str(token) for number, token in model.get_added_tokens_decoder().items()}
    table = {
        number: bytes(byte_of[c] for c in token) if number not in special else token.encode()
        for token, number in model.get_vocab().items()
    }

    def decode(ids: Sequence[int]) -> bytes:
        return b"".join(table[int(i)] for i in ids)

    return decode


def as_stored(
    ids: Integer[np.ndarray, " tokens"] | Sequence[int], tokenizer: Tokenizer
) -> Integer[np.ndarray, " tokens"]:
    """Converts token numbers to the smallest unsigned type that holds the vocabulary.

    Args:
      ids: from the tokenizer.
      tokenizer: gives the size of the vocabulary.

    Returns:
      The same numbers.

    Raises:
      ValueError: a number is not below the size of the vocabulary.
    """
    found = np.asarray(ids, None if len(ids) else np.int64)
    wrong = found[(found < 0) | (found >= tokenizer.vocab_size)]
    if len(wrong):
        raise ValueError(
            f"the tokenizer gives the token {wrong[0]}, but its vocabulary has "
            f"{tokenizer.vocab_size}: give a file whose tokens are numbered below its size"
        )
    return found.astype(np.min_scalar_type(tokenizer.vocab_size - 1), copy=False)


def tokenize(documents: Iterable[bytes], tokenizer: Tokenizer) -> Tokens:
    """Encodes documents and joins them.

    Args:
      documents: their contents.
      tokenizer: encodes each and gives the separator.

    Returns:
      The tokens, in the smallest unsigned type that holds the vocabulary.

    Raises:
      ValueError: the tokenizer gives a number that is not below its size.
    """
    end = as_stored(tokenizer.separator, tokenizer)
    parts = []
    encode_all = tokenizer.encode_all or partial(map, tokenizer.encode)
    for ids in encode_all(documents):
        parts += [as_stored(ids, tokenizer), end]
    lengths = [len(a) + len(b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    ids = np.concatenate(parts) if parts else end[:0]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Tokens(ids, starts, max(len(ids) - len(end), 0))
