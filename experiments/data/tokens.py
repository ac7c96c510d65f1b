"""Text as numbers: bytes, or the tokens of a file of the `tokenizers` library."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Integer

from experiments.run.plain_files import LARGEST_TABLE, read_bytes


class Tokenizer(NamedTuple):
    """Text to token numbers and back.

    Attributes:
      vocab_size: token numbers are below it.
      encode: `bytes -> numbers`.
      decode: `numbers -> bytes`.
      separator: the numbers that end a document.
      encode_all: as `encode`, for many texts on all cores; None encodes one after the other.
      digest: of the file that it was read from.
      name: of that file, for errors.
    """

    vocab_size: int
    encode: Callable[[bytes], Integer[np.ndarray, " tokens"]]
    decode: Callable[[Sequence[int]], bytes]
    separator: tuple[int, ...]
    encode_all: Callable[[Iterable[bytes]], Iterable[Integer[np.ndarray, " tokens"]]] | None = None
    digest: str = "bytes"
    name: str = "bytes"


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
INSTEAD = (
    "give data.tokenizer=FILE.json as `python -m experiments.train_tokenizer` writes it, "
    "or null for bytes"
)
GROWTH = 2**16  # the most times that a tokenizer may lengthen a text
# Documents that the library encodes at a time, shared by all cores.
TOGETHER = 1000


def open_tokenizer(path: str | None) -> Tokenizer:
    """Reads a tokenizer.

    Args:
      path: a file that `tokenizers` wrote, for example by `experiments.train_tokenizer`;
        None is bytes.

    Returns:
      The tokenizer. Documents end with its token `<|endoftext|>` or, if it has none, with its
      encoding of a newline. Text that is not UTF-8 is read with U+FFFD in it. All of a text is
      encoded, always alike: truncation, padding and dropout of the file are left out.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is not a tokenizer, it has no token that ends a document, or the library
        `tokenizers` is missing. Its functions raise it for text that the tokenizer cannot encode.
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
    with _naming(f"{path} is not a file of the library tokenizers"):
        raw = read_bytes(Path(path), most=LARGEST_TABLE)
        model = tokenizers.Tokenizer.from_str(_whole(raw))
        # A document that contains the text <|endoftext|> does not end there.
        model.encode_special_tokens = True
        end = model.token_to_id(END_OF_TEXT)
        # Not the number of tokens: their numbers may have gaps.
        size = 1 + max(model.get_vocab().values(), default=-1)
        exact = _byte_level(model) if type(model.decoder).__name__ == "ByteLevel" else None

    def decode(ids: Sequence[int]) -> bytes:
        with _naming(f"{path} cannot decode its own tokens"):
            return model.decode([int(i) for i in ids], skip_special_tokens=False).encode()

    def encode_all(texts: Iterable[bytes]) -> Iterator[np.ndarray]:
        rest = (text.decode(errors="replace") for text in texts)
        while some := list(islice(rest, TOGETHER)):
            with _naming(f"{path} cannot encode the text"):
                found = model.encode_batch(some, add_special_tokens=False)
            for encoded in found:
                yield np.asarray(encoded.ids, np.int32)

    def encode(text: bytes) -> np.ndarray:
        return next(encode_all([text]))

    separator = (end,) if end is not None else tuple(encode(b"\n").tolist())
    if not separator:
        raise ValueError(
            f"{path} has no token {END_OF_TEXT} and none for a newline, so documents would not "
            f"end: add the token {END_OF_TEXT}, or {INSTEAD}"
        )
    digest = hashlib.blake2b(raw, digest_size=8).hexdigest()
    return Tokenizer(size, encode, exact or decode, separator, encode_all, digest, str(path))


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Makes one line of any error of the library, which raises bare Exception and panics."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic is not an Exception
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{what} ({told[:200]}): {INSTEAD}") from error


def _whole(raw: bytes) -> str:
    """Takes out of a tokenizer's file what would cut, lengthen or vary the tokens of a text."""
    values = json.loads(raw.decode())
    growth = prod(_growth(values.get(kind)) for kind in ("normalizer", "pre_tokenizer", "decoder"))
    if growth > GROWTH:
        raise ValueError(f"it makes text up to {growth} times as long")
    model = values["model"]
    if "dropout" in model:
        model = {**model, "dropout": None}
    return json.dumps({**values, "model": model, "truncation": None, "padding": None})


def _growth(node: Any) -> int:
    """Bounds by how much the replacements of a part of the file lengthen a text."""
    if isinstance(node, list):
        return prod(map(_growth, node))
    if not isinstance(node, dict):
        return 1
    own = 1
    if node.get("type") == "Replace" and node["content"]:
        # A regular expression, or no text, may also match between two characters.
        between = not node["pattern"].get("String")
        own = len(node["content"]) + between
    return own * prod(map(_growth, node.values()))


def _byte_level(model: Any) -> Callable[[Sequence[int]], bytes]:
    """Makes a decoder to exact bytes, even if tokens end inside a character."""
    plain = [b for b in range(256) if chr(b).isprintable() and b not in (0x20, 0xAD)]
    # The library writes bytes as characters: themselves if printable, others from 256 on.
    others = [b for b in range(256) if b not in plain]
    byte_of = {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}
    added = model.get_added_tokens_decoder()
    # As the library does: a token with other characters stands for itself.
    table = {
        number: bytes(byte_of[c] for c in token)
        if number not in added and byte_of.keys() >= set(token)
        else token.encode()
        for token, number in model.get_vocab().items()
    }

    def decode(ids: Sequence[int]) -> bytes:
        return b"".join(table.get(int(i), b"") for i in ids)  # numbers may have gaps

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


def check_lossless(documents: Sequence[bytes], tokens: Tokens, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer that does not give a text back, whose bits per byte mean nothing.

    Args:
      documents: their contents.
      tokens: of `tokenize`.
      tokenizer: made them.

    Raises:
      ValueError: shows what a part of the text becomes.
    """
    gap = len(tokenizer.separator)
    for document, first, after in zip(documents, tokens.starts, tokens.starts[1:], strict=False):
        found = tokenizer.decode(tokens.ids[first : after - gap].tolist())
        if found not in (document, b" " + document):  # some put a space in front of every text
            pairs = enumerate(zip(document, found, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(document), len(found)))
            lost, made = (
                repr(text[max(at - 10, 0) : at + 20].decode(errors="replace"))
                for text in (document, found)
            )
            advice = "Make the text UTF-8, or " if b"\xef\xbf\xbd" in found else ""
            raise ValueError(
                f"{tokenizer.name} does not give the held-out text back: {lost} becomes {made}, "
                f"so its bits per byte would leave out what is lost.\n{advice}{INSTEAD}"
            )
