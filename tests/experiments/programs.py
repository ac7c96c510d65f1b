"""Commands run in this process, where starting one of their own would cost seconds."""

import os
import sys


def ending(program, folder, *arguments):
    """What a program's `main`, called in a folder, ends with: None, a code or a message."""
    before, place = sys.argv, os.getcwd()
    sys.argv = [f"{program.__name__}.py", *map(str, arguments)]
    os.chdir(folder)
    try:
        program.main()
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
        os.chdir(place)
    return None


def call(program, folder, *arguments):
    """The exit code of a program; the message that it ends with is on stderr."""
    code = ending(program, folder, *arguments)
    if isinstance(code, str):
        print(code, file=sys.stderr)
        return 1
    return code or 0
