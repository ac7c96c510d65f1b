"""Between the shell and Hydra: checks settings, shortens errors, keeps prompts as typed."""

import contextlib
import contextvars
import functools
import logging
import os
import re
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.run import records, trust, unicode
from experiments.run.checks import check_settings, check_text
from experiments.run.folder_arguments import quoted
from experiments.run.stopping import noting
from experiments.shell.deletions import check_deletions
from experiments.shell.explanations import FULL_ERROR, explain
from experiments.shell.near_misses import check_additions
from experiments.shell.overrides import check_arguments, check_repeated, misread, of_a_flag

_short = contextvars.ContextVar("short", default=False)  # whether errors end as lines


def quote_text(arguments: Sequence[str], *, keys: Sequence[str]) -> list[str]:
    """Quotes free text for Hydra, whose grammar would otherwise strip and parse it.

    `prompt=def f(x): ` reaches the program with its brackets and its last space.
    Text that is one string in Hydra's quotes is left alone; `"a", "b"` is not.

    Args:
      arguments: of the command line, without the program.
      keys: the overrides that hold free text.

    Returns:
      The arguments for Hydra.
    """
    found = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        already = re.fullmatch(r"""(['"])(\\.|(?!\1)[^\\])*\1""", value, re.DOTALL)
        if equals and key.lstrip("+") in keys and not already:
            argument = f"{key}={quoted(value)}"
        found.append(argument)
    return found


def guarded(program: Callable[[], Any], cfg: DictConfig | None = None) -> Any:
    """Checks the settings of a program and runs it; a refused one leaves no folder.

    Args:
      program: the body of `main`.
      cfg: its config, which is checked before anything is built; paths on its command line are
        trusted.

    Returns:
      What the program returns.

    Raises:
      SystemExit: with the text and exit code 1, below `launch`. Elsewhere, and in a sweep, whose
        other jobs continue, the error itself is raised.
    """
    known = HydraConfig.initialized()
    sweeps = known and HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        if cfg is not None and not sweeps:  # the jobs of a sweep check theirs, see `once`
            check(cfg)
        with contextlib.nullcontext() if cfg is None else trust.from_command_line(cfg):
            return program()
    except BaseException as error:
        if known and not sweeps:
            records.discard(Path(HydraConfig.get().runtime.output_dir))
        text = explain(error, cfg) if isinstance(error, Exception) else None
        if text is None or sweeps or not _short.get():
            raise
        flush()
        raise SystemExit(f"error: {text}") from None


def check(cfg: DictConfig) -> None:
    """Refuses settings that break the rules of the table of `limits`, or are deleted or missing.

    Args:
      cfg: composed by Hydra, whose record holds the command and its overrides.

    Raises:
      RunError: what was given, what was expected, what to type.
    """
    known = HydraConfig.get()
    if known.mode != RunMode.MULTIRUN:  # which checks its own before it begins
        check_text("hydra.run.dir", known.run.dir)
    overrides, command = list(known.overrides.task), str(known.job.config_name)
    check_deletions(overrides, cfg, command)
    check_settings(cfg, command)
    check_additions(overrides, cfg, hydra=known)


def flush() -> None:
    """Writes out what was printed, so that an error stands behind it; stdout may be closed.

    Raises:
      OSError: it is full, or its reader has gone.
    """
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()


def end_if_unread(error: Exception) -> None:
    """Ends a program whose reader, such as `head`, has closed.

    Args:
      error: that came of it, or of another pipe, such as that of a logger.

    Raises:
      SystemExit: with the shell's code for it, 141.
    """
    if isinstance(error, BrokenPipeError) and _is_unread():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def _is_unread() -> bool:
    polled = select.poll()
    try:
        polled.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError, ValueError):  # it is no file, or closed
        return False
    return any(event & select.POLLERR for _, event in polled.poll(0))


def launch(main: Callable[[], Any]) -> Any:
    """Calls a program that Hydra decorates; an error of Hydra also ends it with a few lines.

    Args:
      main: decorated by `hydra.main`.

    Returns:
      The value that it returns.

    Raises:
      SystemExit: with the text and exit code 1.
    """
    unicode.show_all()
    before = os.environ.get(FULL_ERROR)
    # With it Hydra raises errors, and `explain` shortens them.
    os.environ[FULL_ERROR] = "1"
    token = _short.set(before != "1")
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it also raises what it logs
    logging.raiseExceptions = False  # a closed or full stdout is met by whatever prints next
    try:
        with noting():
            check_arguments(sys.argv[1:])
            return main()
    except Exception as error:
        end_if_unread(error)
        text = of_a_flag(error) or explain(error)
        if isinstance(error, ValueError | HydraException | OmegaConfBaseException):
            text = misread(sys.argv[1:]) or text  # Hydra does not say which argument it was
        if text is None or before == "1":
            raise
        flush()
        raise SystemExit(f"error: {text}") from None
    finally:
        _short.reset(token)
        os.environ.pop(FULL_ERROR)
        if before is not None:
            os.environ[FULL_ERROR] = before


def command(main: Callable[[], Any]) -> Callable[[], Any]:
    """Makes a command's `main`: Hydra's, without tracebacks for errors that users can cause.

    Args:
      main: decorated by `hydra.main`.

    Returns:
      A function that ends with the exit codes shells expect: 130 after Ctrl-C. It refuses a key
      that is given twice.
    """

    def checked() -> Any:
        check_repeated(sys.argv[1:])
        return main()

    @functools.wraps(main)
    def run() -> Any:
        try:
            return launch(checked)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None

    return run
