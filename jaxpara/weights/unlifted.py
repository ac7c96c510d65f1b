"""What a node of a state says where an array was expected: that `jp.lift` was forgotten."""

from typing import TYPE_CHECKING, Any

from jaxpara.tree import short

HINT = (
    "call the function through jp.lift(function)(state, ...), or give it the arrays of "
    "t.effective(state)"
)


def _refused(self: Any, *operands: Any, **options: Any) -> Any:
    del operands, options
    raise TypeError(f"a {type(self).__name__} is not an array: {HINT}")


class Unlifted:
    """A dataclass that prints without its numbers and says by name why it is no array."""

    def __repr__(self) -> str:
        own = (f"{name}={short(value)}" for name, value in vars(self).items())
        return f"{type(self).__name__}({', '.join(own)})"

    if not TYPE_CHECKING:
        # A type checker knows the attributes, and that there are no operators.
        __jax_array__ = __array__ = __getitem__ = __neg__ = _refused
        __matmul__ = __add__ = __sub__ = __mul__ = __truediv__ = __pow__ = _refused
        __rmatmul__ = __radd__ = __rsub__ = __rmul__ = __rtruediv__ = _refused

        def __getattr__(self, name: str) -> Any:
            # Only what is missing comes here; `hasattr` must see an AttributeError.
            kind = type(self).__name__
            raise AttributeError(
                f"{kind!r} object has no attribute {name!r}: a {kind} is not an array: {HINT}"
            )
