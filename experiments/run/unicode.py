"""Text outside of this process: files are UTF-8, and what cannot be shown is replaced."""

import codecs
import sys

# Names an error handler: a byte of a file's name that is not text stays that byte, and any other
# character that cannot be encoded becomes `?`.
SHOWN = "jaxpara.shown"


def _shown(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    one = UnicodeEncodeError(
        error.encoding, error.object, error.start, error.start + 1, error.reason
    )
    try:
        return codecs.lookup_error("surrogateescape")(one)
    except UnicodeError:
        return codecs.lookup_error("replace")(one)


codecs.register_error(SHOWN, _shown)


def show_all() -> None:
    """Lets print never fail on a character that the terminal does not have."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not everything that stands in for them has it
            stream.reconfigure(errors=SHOWN)
