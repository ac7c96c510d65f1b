"""Refuses `hydra.run.dir` where no folder of one run is made, before Hydra makes it."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from experiments.run.folders import RunError

KEY = "hydra.run.dir"


class OneRun(Callback):
    """For commands with a folder for each run: `hydra.callbacks.one_run` in the config."""

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
        """Refuses a folder, which would stay empty."""
        del kwargs
        value = _given(config)
        with ended(HydraConfig.instance()):
            if value is not None:
                raise RunError(
                    f"{KEY}={value}: this command makes no folder; leave it out.\n"
                    "Settings with which a file is named are shown by --help"
                )

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """As for one run."""
        self.on_run_start(config, **kwargs)


def _given(config: DictConfig) -> str | None:
    for override in OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False):
        key, _, value = override.lstrip("+").partition("=")
        if key == KEY:
            return value
    return None


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
