"""Refuses `hydra.run.dir` where no folder of one run is made, before Hydra makes it."""

import contextlib
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from experiments.run.folders import RunError

KEY = "hydra.run.dir"
OF_A_SWEEP = ("hydra.sweep.", "hydra.sweeper.", "hydra.launcher.")


class OneRun(Callback):
    """For commands with a folder for each run: `hydra.callbacks.one_run` in the config."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses what only a sweep reads."""
        del kwargs
        _check_no_sweep(config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses one run's folder in a sweep, whose jobs have their own."""
        del kwargs
        value = _given(config)
        with ended(HydraConfig.instance()):
            if value is not None:
                raise RunError(
                    f"resume=FOLDER and {KEY}={value} are for one run, and this is a sweep.\n"
                    "A sweep continues where it stopped if its own command is repeated;\n"
                    "to continue one run, leave out -m, sweep= and lists of values"
                )


class NoFolder(Callback):
    """For commands without a folder of their own: `hydra.callbacks.no_folder` in the config."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses a folder, which would stay empty, and what only a sweep reads."""
        _check_no_sweep(config)
        self.on_multirun_start(config, **kwargs)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses a folder for one run."""
        del kwargs
        value = _given(config)
        with ended(HydraConfig.instance()):
            if value not in (None, "."):
                raise RunError(
                    f"{KEY}={value}: this command makes no folder; leave it out.\n"
                    "Settings with which a file is named are shown by --help"
                )


def _overrides(config: DictConfig) -> list[str]:
    given = OmegaConf.to_container(config.hydra.overrides, resolve=False)
    assert isinstance(given, dict)
    whole = [one for one in given["task"] if one.lstrip("+").startswith("hydra=")]  # a mapping
    return [*given["hydra"], *whole]


def _settings(config: DictConfig) -> Iterator[tuple[str, str, Any]]:
    """What the command line gives Hydra: the override, and each key in it with its value."""
    for override in _overrides(config):
        key, _, value = override.lstrip("+").partition("=")
        if value.lstrip().startswith("{"):  # others may be paths, of which nothing is to be parsed
            value = OverridesParser.create().parse_override(override).value()
        yield from ((override, *one) for one in leaves(key.replace("/", "."), value))


def leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Lists the settings of a value by their keys: those of a mapping, or itself.

    Args:
      key: of the value.
      value: as Hydra reads it.

    Yields:
      A key and its value.
    """
    if isinstance(value, dict) and value:
        for name, child in value.items():
            yield from leaves(f"{key}.{name}", child)
    else:
        yield key, value


def _check_no_sweep(config: DictConfig) -> None:
    for override, key, _ in _settings(config):
        with ended(HydraConfig.instance()):
            if f"{key}.".startswith(OF_A_SWEEP):
                raise RunError(
                    f"{override} is for a sweep, and this is one run: add -m, or leave it out"
                )


def _given(config: DictConfig) -> str | None:
    """The folder that the command line gives, by itself or in a mapping."""
    found = [value for _, key, value in _settings(config) if key == KEY and value is not None]
    return str(found[-1]) if found else None


@contextlib.contextmanager
def ended(known: HydraConfig) -> Iterator[None]:
    """Ends the command with a refusal: of an exception in a callback Hydra makes a warning.

    Args:
      known: Hydra's config, which is forgotten: there is no run to report on.

    Yields:
      None.
    """
    try:
        yield
    except RunError as error:
        known.cfg = None
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except Exception:
        known.cfg = None
        traceback.print_exc()
        sys.exit(1)
