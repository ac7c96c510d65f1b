"""Pure JAX functions, trained in parallel: over time, devices, experts, bits and ranks.

The public names stand in `__init__.pyi`, for readers, type checkers and the lines below: what a
name needs is imported when it is first asked for. Solvers load no optimiser; `jp.linen` needs Flax.
"""

import importlib.metadata as _metadata
import sys as _sys

import lazy_loader as _lazy

_attribute, __dir__, _names = _lazy.attach_stub(__name__, __file__)
# Flax may be absent.
__all__ = [n for n in _names if n not in ("linen", "nnx")]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name == "__version__":
        return _metadata.version("jaxpara")
    if name not in __dir__():  # with these arguments Python names the nearest
        message = f"module 'jaxpara' has no attribute {name!r}"
        raise AttributeError(message, name=name, obj=_sys.modules[__name__])
    return _attribute(name)
