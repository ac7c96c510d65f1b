"""The text of a continuation while it is drawn: whole characters only, cut at a stop string."""

from collections.abc import Sequence

from experiments.data.tokens import Tokenizer

UNFINISHED = "\ufffd"  # decoding gives it for bytes that are not a character, or not yet
CONTEXT = 16  # last tokens of the prompt: the text of a token can depend on those before it


class Transcript:
    """Turns tokens into text piece by piece.

    Returned text is never taken back: characters with missing bytes are held until they are
    complete, and so is a possible beginning of a stop string. A stop string is searched for only in
    the continuation, and is not part of it.

    Args:
      tokenizer: decodes.
      prompt: tokens before the continuation.
      stop: strings that end it. The first complete one does, so that the text does not depend on
        how many tokens come at a time; of several, the one that began first.
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
          The text that has become certain.
        """
        if self.stopped is not None:
            return ""
        self._tokens += [int(token) for token in tokens]
        self._text = self._decode()
        # Returned text cannot be part of a stop string, so the search continues after it.
        places = ((self._text.find(s, self._given), s) for s in self._stop)
        found = [(at + len(s), at, s) for at, s in places if at >= 0]
        if found:
            _, at, self.stopped = min(found)
            return self._give(at)
        certain = self._text.rstrip(UNFINISHED)
        return self._give(len(certain) - self._waiting(certain))

    def _waiting(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        lengths = (n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n]))
        return max(lengths, default=0)

    def end(self) -> str:
        """Ends the text: no more tokens follow.

        Returns:
          The text that was held; bytes that are not a character show as U+FFFD.
        """
        return "" if self.stopped is not None else self._give(len(self._text))

    @property
    def continuation(self) -> str:
        """The text that `add` and `end` have returned."""
        return self._text[self._begin : self._given]
