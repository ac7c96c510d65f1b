"""What a run's folder may make a program do: build shipped objects, and read its own files.

A folder may come from anybody, and its `config.yaml` names constructors and files. Only
constructors that the shipped configs name and the public ones of jaxpara and optax are called, and
only files inside the folder are read. Everything else must be given on the command line:
`trust=their.package`, `trust=PATH`, or the setting itself again (`data.path=PATH`). Nothing in a
folder grants trust.
"""

import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.run import folders, names
from experiments.run.checks import check_settings
from experiments.run.folder_arguments import FILES, TRUST, quote_value
from experiments.run.folders import RunError
from experiments.run.plain_files import OTHER, is_plain, printable

# Kinds of files, as `path` of a data set whose files are in `data_files`.
KINDS = ("json", "parquet", "text")
# Parts of a config that read files; nothing else in a run's config names one.
READING = ("data", "task")

_PACKAGES: ContextVar[tuple[str, ...]] = ContextVar("packages", default=())
_PATHS: ContextVar[tuple[str, ...]] = ContextVar("paths", default=())
# Both, as `trust=` names them.
_TYPED: ContextVar[tuple[str, ...]] = ContextVar("typed", default=())


# Folders of runs whose configs were opened.
_OPENED: ContextVar[tuple[Path, ...]] = ContextVar("opened", default=())


@contextmanager
def from_command_line(cfg: DictConfig) -> Iterator[None]:
    """Trusts what the command line names, while a program runs.

    Args:
      cfg: composed by Hydra, only from the command line and the user's own configs. `trust` is a
        package (a bare word), a path (it has a slash), or a list of them. Files and data sets in
        other settings count as paths, whatever they are called.
    """
    values = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(values, dict)
    trusted = _texts(values.get(TRUST))
    packages = [one for one in trusted if names.PACKAGE.fullmatch(one)]
    others = [one for one in trusted if one not in packages] + _texts(values.get("from"))
    data = values.get("data")  # without a source: the place of that of a run
    others += _texts([data.get(key) for key in FILES] if isinstance(data, dict) else [])
    opened, typed = _OPENED.set(()), _TYPED.set(tuple(trusted))
    try:
        with granted([*others, *(path for _, path in paths(values, ""))], packages=packages):
            yield
    finally:
        _OPENED.reset(opened)
        _TYPED.reset(typed)


@contextmanager
def granted(given: Sequence[str], *, packages: Sequence[str] = ()) -> Iterator[None]:
    """Trusts paths and packages inside the block.

    Args:
      given: files, folders, globs, names of data sets; none of them is a package.
      packages: whose functions and classes may be called.
    """
    tokens = _PATHS.set((*_PATHS.get(), *given)), _PACKAGES.set((*_PACKAGES.get(), *packages))
    try:
        yield
    finally:
        _PATHS.reset(tokens[0])
        _PACKAGES.reset(tokens[1])


def _texts(value: Any) -> list[str]:
    """Returns every text in plain or OmegaConf's values."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [text for one in value for text in _texts(one)]
    return [] if value is None else [str(value)]


def open_config(folder: Path) -> DictConfig:
    """Reads the config of a run to build from.

    Args:
      folder: from `folders.find_run`.

    Returns:
      The config: every constructor in it may be called, and its tokenizer is the folder's own copy
      if there is one.

    Raises:
      RunError: it names a constructor that is not trusted, or a file outside the folder in a part
        that needs none, a setting breaks the rules of `limits`, a link in the folder leads out of
        it, or Python would import its files.
    """
    check_place(folder)
    cfg = folders.load_config(folder)
    _OPENED.set((*_OPENED.get(), folder))
    refused = [
        (key, name)
        for key, name in names.targets(OmegaConf.to_container(cfg, resolve=False), "")
        if not _is_allowed(name)
    ]
    gone = list(dict.fromkeys(name for _, name in refused if names.is_gone(name)))
    for key, name in refused:
        if name in gone:
            raise RunError(_of_another_version(folder, gone))
        place = folder / folders.CONFIG
        if not (isinstance(name, str) and name):
            raise RunError(
                f"{place} is damaged: {key} is {name!r}, where the name of a constructor was: "
                "put back a copy of it, or give another run"
            )
        asked = f"{printable(key)}={printable(name)}"
        raise RunError(f"{place} asks for {asked}, which {_refusal(name)}")
    check_settings(cfg, "train", place=folder / folders.CONFIG)
    copy = folder / folders.TOKENIZER
    # Where data or a task is built, its caller checks the paths: arguments may replace them.
    others = [str(key) for key in cfg if key not in READING]
    check_paths(OmegaConf.masked_copy(cfg, others), folder)
    for group in (cfg.get("data"), OmegaConf.select(cfg, "task.data")):
        if isinstance(group, DictConfig) and group.get("tokenizer") and copy.is_file():
            group.tokenizer = str(copy)
    return cfg


def check_paths(cfg: DictConfig, folder: Path, *, key: str = "") -> None:
    """Refuses files and data sets outside a run's folder that the user did not name.

    Args:
      cfg: from `open_config`, or a part of it.
      folder: of the run.
      key: of the part.

    Raises:
      RunError: names the setting and what to repeat.
    """
    for name, value in paths(OmegaConf.to_container(cfg, resolve=False), key):
        # A task repeats settings of other groups.
        check_path(value, folder, key=name.removeprefix("task."))


def check_path(value: str, folder: Path, *, key: str) -> None:
    """Refuses a file or data set outside a run's folder that the user did not name.

    Args:
      value: the path, glob, or name of a data set.
      folder: of the run.
      key: of the setting.

    Raises:
      RunError: says what to repeat.
    """
    if not _is_ours(value, folder):
        raise RunError(
            f"{folder / folders.CONFIG} asks to read {printable(f'{key}={value}')}, "
            "which is not in that folder.\n"
            f"If you mean it to be read, repeat the command with {_and_also(_as_path(value))}"
        )


def _and_also(one: str) -> str:
    """Formats the argument that trusts one package or path more than the command line does."""
    return printable(argument(dict.fromkeys([*_TYPED.get(), one])))


def argument(trusted: Iterable[str]) -> str:
    """Formats the argument that trusts packages and paths.

    Args:
      trusted: packages, and paths with a slash, as from `outside`.

    Returns:
      `trust=PATH` or `trust=[PACKAGE,PATH]`, quoted for a shell.
    """
    quoted = [one if names.PACKAGE.fullmatch(one) else quote_value(one) for one in trusted]
    value = quoted[0] if len(quoted) == 1 else f"[{','.join(quoted)}]"
    return shlex.quote(f"{TRUST}={value}")


def outside(folder: Path, *, but: Sequence[str] = ()) -> list[str]:
    """Lists what a run calls and reads outside its own folder when it continues.

    Args:
      folder: of a run.
      but: arguments that will not be read.

    Returns:
      Packages, paths and names of data sets to give as `trust=`; empty for most runs.
    """
    try:
        values = OmegaConf.to_container(folders.load_config(folder), resolve=False)
    except (RunError, OSError):
        return []
    copied = (folder / folders.TOKENIZER).is_file()
    called = [name for _, name in names.targets(values, "") if isinstance(name, str)]
    theirs = [name for name in called if not _is_known(name) and names.PACKAGE.fullmatch(name)]
    found = dict.fromkeys(name.partition(".")[0] for name in theirs)
    for key, value in paths(values, ""):
        last = key.split(".")[-1]
        own = last == "tokenizer" and copied
        if not (own or last in but or _is_inside(value, folder)):
            found[_as_path(value)] = None
    return list(found)


def check_place(folder: Path, *, written: bool = False) -> None:
    """Refuses a folder to build from: Python would import its files, or as `check_links` says.

    Args:
      folder: of a run.
      written: whether it is written to as well.

    Raises:
      RunError: says what to do instead.
    """
    whole = folder.resolve()
    for entry in sys.path:
        if Path(entry or ".").resolve().is_relative_to(whole):
            raise RunError(
                f"Python imports from {Path(entry or '.').resolve()}, which is in the run's folder "
                f"{folder}: its files would be run as code. Start the program from another folder"
            )
    check_links(folder, written=written)


def check_links(folder: Path, *, written: bool = False) -> None:
    """Refuses a folder whose links lead out, or with devices; it is read or written to after this.

    Args:
      folder: of a run; it may be missing.
      written: whether it is written to, which no trust allows through a link.

    Raises:
      RunError: says what to do instead.
    """
    for place, inner, files in os.walk(folder):
        for path in (Path(place) / name for name in (*inner, *files)):
            shown = printable(str(path))
            if path.exists() and not is_plain(path):
                raise RunError(f"{shown} is {OTHER}: take it out of the run's folder")
            allowed = _is_inside if written else _is_ours
            if path.is_symlink() and not allowed(str(path), folder):
                there = printable(os.path.realpath(path))  # a link to itself gives its own name
                raise RunError(
                    f"{shown} is a link to {there}, which is not in the run's folder: replace it "
                    f"by what it points to{'' if written else f', or give {_and_also(there)}'}"
                )


def paths(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yields every file or data set that a config would read.

    Args:
      node: plain values.
      key: of the node.

    Yields:
      The key of a path, and the path.
    """
    if isinstance(node, list):
        for number, child in enumerate(node):
            yield from paths(child, f"{key}[{number}]")
    if not isinstance(node, dict):
        return
    here = f"{key}." if key else ""
    for name in FILES if "_target_" in node and node["_target_"] not in names.GETTERS else ():
        if name == "base" and isinstance(node.get(name), int | float):
            continue  # of rotary angles
        for text in _texts(node.get(name)):
            if not (name == "path" and node.get("data_files") and text in KINDS):
                yield f"{here}{name}", text
    for name, child in node.items():
        yield from paths(child, f"{here}{name}")


def _is_allowed(name: Any) -> bool:
    if not isinstance(name, str) or names.PACKAGE.fullmatch(name) is None:
        return False
    return _is_known(name) or names.is_made_in(name, _PACKAGES.get())


def _is_known(name: str) -> bool:
    return name in names.shipped() or names.is_public(name)


def _refusal(name: str) -> str:
    """Says why a constructor is not called, and what to type."""
    covers = [one for one in _PACKAGES.get() if name.startswith(f"{one}.")]
    if not covers:
        return (
            "is neither shipped nor a public name of jaxpara or optax, and a run's folder may be "
            "anybody's.\nIf you know that code and mean to run it, repeat the command with "
            f"{_and_also(name.partition('.')[0] or 'their.package')}"
        )
    if names.locate(name) is None:
        return (
            f"Python does not find, although {TRUST}={covers[0]} is given:\n"
            "install that package, or start the command where `python -m` can import it"
        )
    return (
        f"is not defined in {covers[0]}, and {TRUST}={covers[0]} covers only what is:\n"
        "write the name in the config as the module that defines it has it, and trust that one"
    )


def _of_another_version(folder: Path, gone: Sequence[str]) -> str:
    """Says what to do with a run whose constructors have been renamed.

    Args:
      folder: of the run.
      gone: the names in its config that do not exist.

    Returns:
      Three lines.
    """
    commit = folders.commit_of(folder)
    back = f"; `git checkout {commit}` brings that version back" if commit else ""
    there = {name: " or ".join(names.present_names(name)) for name in gone[:8]}
    pairs = ", ".join(f"{name} -> {now or '?'}" for name, now in there.items())
    todo = f"To use it here, write the current names into its {folders.CONFIG}: {pairs}"
    if not any(there.values()):
        todo = "No current name is similar: use that version, or train the run again"
    return (
        f"{folder / folders.CONFIG} names {gone[0]}, which is not in this version of jaxpara.\n"
        f"The run is of another version{back}.\n{todo}"
    )


def _as_path(value: str) -> str:
    """Formats a value so that `trust=` takes it for a path."""
    return value if os.sep in value or "://" in value else f".{os.sep}{value}"


def _is_inside(value: str, folder: Path) -> bool:
    """Whether a path, a folder or a glob stays inside a folder."""
    if "://" in value or "\0" in value:
        return False
    try:
        whole = Path(os.path.expanduser(value)).resolve()
    except (RuntimeError, OSError):  # a link to itself, or an unknown home folder
        return False
    return whole.is_relative_to(Path(os.path.expanduser(folder)).resolve())


def is_of_a_run(file: Path) -> bool:
    """Whether a file lies in the folder of a run that was opened.

    Args:
      file: that is to be read.
    """
    return any(_is_inside(str(file), folder) for folder in _OPENED.get())


def _is_ours(value: str, folder: Path) -> bool:
    if _is_inside(value, folder):
        return True
    for one in _PATHS.get():
        if value == one or _as_path(value) == one:
            return True
        looks_like_a_path = os.sep in one or one.startswith((".", "~"))
        if looks_like_a_path and "://" not in value + one and _is_inside(value, Path(one)):
            return True
    return False
