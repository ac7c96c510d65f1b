"""The text of a continuation while it is drawn: whole characters only, cut at a stop string."""

from collections.abc import Sequence

from experiments.data.tokens import Tokenizer

UNFINISHED = "\ufffd"  # what decoding makes of bytes that are no character, or not yet one
CONTEXT = 16  # last tokens of the prompt: how a token reads can depend on what stands before it


class Transcript:
    """Turns tokens into text piece by piece.

    What it gives out never has to be taken back: characters whose bytes are not all there wait
    for the rest, and so does what may turn out to be the beginning of a stop string. A stop
    string is looked for in the continuation alone and is not part of it.

    Args:
      tokenizer: decodes.
      prompt: tokens before the continuation.
      stop: strings that end it. The first to be complete does, so that the text does not depend
        on how many tokens come at a time; of several, the one that began first.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens = [int(token) for token in prompt]
        self.prompt = self._decode().rstrip(UNFINISHED)
        self._tokens = self._tokens[-CONTEXT:]
        self._begin = self._given = len(self._decode().rstrip(UNFINISHED))
        self._text = self._decode()
        self.stopped: str | None = None

    def _decode(self) -> str:
        return self._tokenizer.decode(self._tokens).decode(errors="replace")

    def _give(self, end: int) -> str:
        end = max(end, self._given)
        given, self._given = self._text[self._given : end], end
        return given

    def add(self, tokens: Sequence[int]) -> str:
        """Takes the next tokens.

        Args:
          tokens: any number; ignored once a stop string has appeared.

        Returns:
          The text that is certain now and was not before.
        """
        if self.stopped is not None:
            return ""
        self._tokens += [int(token) for token in tokens]
        self._text = self._decode()
        # Nothing that was given out can be part of a stop string, so the search continues there.
        places = ((self._text.find(s, self._given), s) for s in self._stop)
        found = [(at + len(s), at, s) for at, s in places if at >= 0]
        if found:
            _, at, self.stopped = min(found)
            return self._give(at)
        certain = self._text.rstrip(UNFINISHED)
        return self._give(len(certain) - self._waiting(certain))

    def _waiting(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        lengths = (n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n]))
        return max(lengths, default=0)

    def end(self) -> str:
        """No more tokens follow.

        Returns:
          What was still waiting; bytes that are no character as U+FFFD.
        """
        return "" if self.stopped is not None else self._give(len(self._text))

    @property
    def continuation(self) -> str:
        """What `add` and `end` have given out."""
        return self._text[self._begin : self._given]
