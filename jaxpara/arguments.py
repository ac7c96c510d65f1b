"""Checks of what the seams take: models, losses, optimisers."""

import inspect
from collections.abc import Callable
from typing import Any

from jaxpara.types import Model


def kind_of(value: Any) -> str:
    """What a message calls an argument that does not fit: a function by its name, else its type."""
    name = getattr(value, "__name__", None)
    return f"{name} ({type(value).__name__})" if isinstance(name, str) else type(value).__name__


def need_model(
    model: Any, call: str, advice: str = ", such as jp.nn.decoder(...) or jp.Model(init, apply)"
) -> None:
    """Refuses a model that is not a `Model`, such as a function.

    Args:
      model: the argument.
      call: that it was given to, with its arguments as they are expected.
      advice: what to type.

    Raises:
      TypeError: it is not a `Model`.
    """
    if not isinstance(model, Model):
        raise TypeError(f"{call} got a model of type {kind_of(model)}; expected a jp.Model{advice}")


def need_loss(loss: Any) -> None:
    """Refuses a loss that cannot be called, such as the model itself.

    Args:
      loss: the argument.

    Raises:
      TypeError: it is no function.
    """
    if not callable(loss):
        raise TypeError(
            f"make_step(loss, optimizer) got a loss of type {kind_of(loss)}; expected a function "
            "(params, batch, key) -> (scalar, metrics), such as jp.train.next_token_loss(model)"
        )


def need_optimizer(optimizer: Any, call: str) -> None:
    """Refuses an optimiser that lacks the functions of those of optax.

    Args:
      optimizer: the argument.
      call: that it was given to, with its arguments as they are expected.

    Raises:
      TypeError: it has no `init` and `update`.
    """
    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        raise TypeError(
            f"{call} got an optimizer of type {kind_of(optimizer)}; expected one of optax, such "
            "as optax.adamw(1e-3)"
        )


def takes(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a function can be called with these arguments, as far as its signature tells."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # it has none, as some builtins
        pass
    return True
