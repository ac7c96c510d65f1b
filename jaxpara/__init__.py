"""Pure JAX functions, trained in parallel: over time, devices, experts, bits and ranks.

The public names are in `__init__.pyi`, for readers, type checkers and the lines below: what a
name needs is imported when it is first asked for. Solvers load no optimiser; `jp.linen` needs Flax.
"""

import ast as _ast
import importlib as _importlib
import importlib.metadata as _metadata
import pathlib as _pathlib
import sys as _sys

_IMPORTS = _ast.parse(_pathlib.Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
_HOMES = {
    alias.name: f"{__name__}.{node.module}" if node.module else __name__
    for node in _IMPORTS
    if isinstance(node, _ast.ImportFrom)
    for alias in node.names
}
# Flax may be absent.
__all__ = [n for n in _HOMES if n not in ("linen", "nnx")]  # pyright: ignore[reportUnsupportedDunderAll]


def __dir__() -> list[str]:
    return [*_HOMES, "__version__"]


def __getattr__(name: str):
    if name == "__version__":
        return _metadata.version(__name__)
    if name not in _HOMES:  # with these arguments Python names the nearest
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message, name=name, obj=_sys.modules[__name__])
    home = _HOMES[name]
    module = _sys.modules[home] if home == __name__ else _importlib.import_module(home)
    found = vars(module).get(name) or _importlib.import_module(f"{home}.{name}")
    globals()[name] = found
    return found
