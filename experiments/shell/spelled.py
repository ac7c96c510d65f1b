"""Constructors that build other objects call only what the config being built spells out.

They build from nodes that they are given. A node that another constructor has put together is
refused, so a config that was checked stays checked.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from omegaconf import OmegaConf

from experiments.run import names, trust
from experiments.run.folders import RunError

# What the config being built names: constructors, files that they read, interpolations.
_SPELLED: ContextVar[frozenset[str]] = ContextVar("spelled", default=frozenset())


@contextmanager
def building(cfg: Any, *also: str) -> Iterator[None]:
    """Lets constructors call what a config spells out, while it is built.

    Args:
      cfg: composed, or checked.
      also: constructors of ours that it need not name.
    """
    named = _named(cfg, resolve=True) | _named(cfg, resolve=False) | set(map(repr, also))
    token = _SPELLED.set(named)
    try:
        yield
    finally:
        _SPELLED.reset(token)


def spelled_out(node: Any) -> Any:
    """Refuses a node that a constructor is to build unless the config being built spells it out.

    Args:
      node: a config, or plain values.

    Returns:
      The node, as a config.

    Raises:
      RunError: names what the config does not.
    """
    if not OmegaConf.is_config(node):
        node = OmegaConf.create(node, flags={"allow_objects": True})
    if foreign := _named(node, resolve=False) - _SPELLED.get():
        raise RunError(
            f"a constructor is asked to build {min(foreign)}, which the config does not spell "
            "out where it is built:\nwrite that node itself into the config"
        )
    return node


def _named(cfg: Any, *, resolve: bool) -> frozenset[str]:
    """Collects what a config names: constructors, files that they would read, interpolations."""
    values = OmegaConf.to_container(cfg, resolve=resolve) if OmegaConf.is_config(cfg) else cfg
    called = {repr(name) for _, name in names.targets(values, "")}
    read = {f"file {path}" for _, path in trust.paths(values, "")}
    return frozenset(called | read | set(_interpolations(values)))


def _interpolations(node: Any) -> Iterator[str]:
    if isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _interpolations(child)
    elif isinstance(node, str) and "${" in node:
        yield node
