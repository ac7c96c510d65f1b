"""Trains a byte-level tokenizer: `python -m experiments.train_tokenizer vocab_size=4096`."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments.data.tokens import END_OF_TEXT, open_tokenizer
from experiments.run import outputs
from experiments.run.folders import RunError
from experiments.shell.commandline import command, guarded


def up_to(documents: Iterable[bytes], size: int) -> Iterator[str]:
    """Yields the first documents, up to a number of bytes, as text.

    Args:
      documents: in any order.
      size: bytes after which no further document is taken.

    Returns:
      Their text; bytes that are not UTF-8 show as U+FFFD.
    """
    have = 0
    for document in documents:
        yield document.decode(errors="replace")
        have += len(document)
        if have >= size:
            return


def train(documents: Iterable[bytes], *, vocab_size: int, size: int, output: Path) -> int:
    """Trains byte pair encoding over bytes [bpe]: any text can be encoded and decoded.

    Args:
      documents: to learn from: the training documents, not the held-out ones.
      vocab_size: tokens, of which 256 are bytes and one ends a document.
      size: the most bytes to learn from.
      output: the file to write, a new one.

    Returns:
      The number of tokens: `vocab_size`, or fewer if the text has no more pairs.

    Raises:
      RunError: the vocabulary is too small, the library `tokenizers` is missing, or the file is
        there or cannot be written.
    """
    if vocab_size <= 256:
        raise RunError(
            f"vocab_size={vocab_size}: 256 bytes and one end of text need at least 257; "
            "for bytes alone leave data.tokenizer null"
        )
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise RunError(
            "this command needs the library tokenizers: pip install '.[tokenizers]'"
        ) from error
    if output.is_dir():
        raise RunError(f"output={output} is a folder: give a file, such as {output}/tokenizer.json")
    outputs.new(output)
    output.parent.mkdir(parents=True, exist_ok=True)  # before minutes are spent
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(up_to(documents, size), trainer)
    try:
        with tempfile.TemporaryDirectory(dir=output.parent) as place:
            tokenizer.save(f"{place}/{output.name}")
            outputs.new(output)  # others may have been faster
            os.replace(f"{place}/{output.name}", output)
    except RunError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise RunError(f"output={output} cannot be written ({error}): give another file") from error
    return tokenizer.get_vocab_size()


def job(cfg: DictConfig) -> None:
    """Trains a tokenizer and prints its bytes per token.

    Args:
      cfg: composed by Hydra, see conf/train_tokenizer.yaml.

    Raises:
      RunError: the user must change something; says what.
    """
    data = instantiate(cfg.data)
    output = Path(cfg.output)
    size = train(data.documents(), vocab_size=cfg.vocab_size, size=cfg.size, output=output)
    held_out = data.validation.tobytes()
    tokens = len(open_tokenizer(str(output)).encode(held_out))
    print(
        f"{output}: {size} tokens; {len(held_out) / tokens:.2f} bytes per token on "
        f"{len(held_out):,} held-out bytes, {data.source}\n"
        f"train with it: python -m experiments.train data.tokenizer={output} "
        f"model.vocab_size={size}"
    )


@command
@hydra.main(version_base="1.3", config_path="conf", config_name="train_tokenizer")
def main(cfg: DictConfig) -> None:
    """Hydra's entry."""
    guarded(lambda: job(cfg), cfg)


if __name__ == "__main__":
    main()
