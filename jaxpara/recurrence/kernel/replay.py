"""A traced elementwise function, replayed on arrays of any common shape.

A kernel cannot call the user's step: its shapes are the user's, and differentiating inside a
kernel meets primitives that the compilers of kernels lack. So the step is traced and
differentiated outside. The result is a list of elementwise equations, which are replayed inside
on whatever tile the kernel holds. Values are float32. Where the trace keeps a narrower type they
are rounded to it after each equation.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpara import compat
from jaxpara.recurrence.structure.flat import Flat, Node, flatten, needed, slots

NARROW = ("bfloat16", "float16")
NO_POWER = "the exponent is an array; kernels take a fixed number"


class UnsupportedCell(NotImplementedError):
    """A step that no kernel can run.

    Attributes:
      primitive: what it uses.
      line: the user's line that uses it.
    """

    def __init__(self, primitive: str, line: str, why: str):
        super().__init__(f"the step uses {primitive!r} at {line}: {why}")
        self.primitive, self.line = primitive, line


def refuse(node: Node, why: str) -> UnsupportedCell:
    """The refusal of one equation."""
    return UnsupportedCell(node.name, node.line, why)


def _power(x: Any, n: int) -> Any:
    """`x**n` by products; a negative power is a quotient."""
    if n < 0:
        return 1.0 / _power(x, -n)
    result, square = None, x
    while n:
        if n & 1:
            result = square if result is None else result * square
        n >>= 1
        square = square * square if n else square
    return jnp.full_like(x, 1.0) if result is None else result


def _pow(params: dict[str, Any], x: Any, y: Any) -> Any:
    """`x**y` for a fixed `y`; halves are exact roots, and a negative base gives NaN as it must."""
    del params
    if not math.isfinite(y):
        return jnp.exp(y * jnp.log(x))
    if y == int(y):
        return _power(x, int(y))
    if 2 * y == int(2 * y):
        return _power(jnp.sqrt(x), int(2 * y))
    return jnp.exp(y * jnp.log(x))


def _log1p(x: Any) -> Any:
    # log(1 + x) = 2 atanh(x / (2 + x)), by its series near 0. The usual correction of log(1 + x)
    # by x / ((1 + x) - 1) is no help: XLA takes that quotient for one.
    s = x / (2.0 + x)
    square = s * s
    series = 1.0 / 9.0
    for odd in (7.0, 5.0, 3.0):
        series = series * square + 1.0 / odd
    near = 2.0 * s * (series * square + 1.0)
    return jnp.where(jnp.abs(x) < 0.25, near, jnp.log(1.0 + x))


def _where(pred: Any, when_false: Any, when_true: Any) -> Any:
    if isinstance(pred, bool):
        return when_true if pred else when_false
    if all(jnp.result_type(case) == jnp.bool_ for case in (when_false, when_true)):
        return (pred & when_true) | (~pred & when_false)
    return _float(jnp.where(pred, when_true, when_false))


def _float(x: Any) -> Any:
    return x.astype(jnp.float32)


def _convert(params: dict[str, Any], x: Any) -> Any:
    was, wanted = x.dtype == jnp.bool_, params["new_dtype"] == jnp.bool_
    if was == wanted:
        return x
    return x != 0.0 if wanted else _float(jnp.where(x, 1.0, 0.0))


def rounding(params: dict[str, Any]) -> str | None:
    """The type that a `reduce_precision` rounds to, or None: one that kernels do not store."""
    bits = params["exponent_bits"], params["mantissa_bits"]
    if bits[0] >= 8 and bits[1] >= 23:
        return "float32"
    return {(8, 7): "bfloat16", (5, 10): "float16"}.get(bits)


def _reduce_precision(params: dict[str, Any], x: Any) -> Any:
    # An input's rounding to another width is not replayed: no kernel has it, and it says so.
    kind = rounding(params)
    if kind is None:
        raise NotImplementedError(f"a kernel cannot round as {params}")
    return x.astype(kind).astype(jnp.float32)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, *operands: function(*operands)


# What the equations become. Mosaic GPU has no rule for many primitives that are a line of
# others; only the identity of the values matters here, for differentiation is over.
TABLE: dict[str, Callable[..., Any]] = {
    name: _plain(function)
    for name, function in {
        "abs": jnp.abs,
        "add": lambda a, b: a + b,
        "add_any": lambda a, b: a + b,
        "and": lambda a, b: a & b,
        "clamp": lambda low, x, high: jnp.minimum(jnp.maximum(x, low), high),
        "copy": lambda x: x,
        "copy_p": lambda x: x,
        "cos": lax.cos,
        "div": lambda a, b: a / b,
        "eq": lambda a, b: a == b,
        "exp": lax.exp,
        "exp2": lambda x: lax.exp(x * math.log(2.0)),
        "expm1": lambda x: lax.tanh(0.5 * x) * (lax.exp(x) + 1.0),
        "ge": lambda a, b: a >= b,
        "gt": lambda a, b: a > b,
        "is_finite": lambda x: jnp.abs(x) < math.inf,
        "le": lambda a, b: a <= b,
        "log": lax.log,
        "log1p": _log1p,
        "logistic": lambda x: 1.0 / (1.0 + lax.exp(-x)),
        "lt": lambda a, b: a < b,
        "max": jnp.maximum,
        "min": jnp.minimum,
        "mul": lambda a, b: a * b,
        "ne": lambda a, b: a != b,
        "neg": lambda x: -x,
        "not": lambda x: ~x,
        "one_minus_square": lambda x: (1.0 - x) * (1.0 + x),
        "optimization_barrier": lambda x: x,
        "or": lambda a, b: a | b,
        "pcast": lambda x: x,
        "pvary": lambda x: x,
        "rsqrt": lax.rsqrt,
        "select_n": _where,
        "sign": lax.sign,
        "sin": lax.sin,
        "sqrt": lax.sqrt,
        "square": lambda x: x * x,
        "stop_gradient": lambda x: x,
        "sub": lambda a, b: a - b,
        "tan": lambda x: lax.sin(x) / lax.cos(x),
        "tanh": lax.tanh,
        "xor": lambda a, b: a ^ b,
    }.items()
} | {
    "convert_element_type": _convert,
    "integer_pow": lambda params, x: _power(x, params["y"]),
    "pow": _pow,
    "reduce_precision": _reduce_precision,
}


class _Line(NamedTuple):
    """One step of a program: operands and result are slots, or operands are Python scalars."""

    name: str
    function: Callable[..., Any]
    params: dict[str, Any]
    operands: tuple[tuple[bool, Any], ...]  # (is a slot, slot or scalar)
    result: int
    narrow: Any


class Program(NamedTuple):
    """Elementwise equations, ready to be replayed."""

    inputs: list[int]
    lines: list[_Line]
    outputs: list[tuple[bool, Any]]

    def using(self, functions: Mapping[str, Callable[[jax.Array], jax.Array]]) -> "Program":
        """The same equations, with other functions for the primitives that are named."""
        lines = [
            line._replace(function=_plain(functions[line.name])) if line.name in functions else line
            for line in self.lines
        ]
        return self._replace(lines=lines)

    def __call__(self, *arrays: jax.Array) -> list[jax.Array]:
        values = {
            slot: a if a.dtype == jnp.float32 else _float(a)
            for slot, a in zip(self.inputs, arrays, strict=True)
        }
        for line in self.lines:
            operands = [values[v] if known else v for known, v in line.operands]
            result = line.function(line.params, *operands)
            if line.narrow is not None:
                result = _float(result.astype(line.narrow))
            values[line.result] = result
        like = values[self.inputs[0]]
        return [values[v] if known else jnp.full_like(like, v) for known, v in self.outputs]


def program(function: Callable[..., Any], like: Sequence[Any]) -> Program:
    """Traces `function` of flat arrays of one shape, and makes a program of it.

    Args:
      function: from as many arrays as `like` has to a list of arrays, all of one shape.
      like: shapes and dtypes.

    Raises:
      UnsupportedCell: an equation that is not elementwise, or not in the table.
    """
    flat = flatten(jax.make_jaxpr(lambda *a: list(function(*a)))(*like))
    shape = like[0].shape
    scalars: dict[int, Any] = {}
    for slot, value in flat.consts.items():
        if jnp.ndim(value) or compat.is_tracer(value):
            raise UnsupportedCell("constant", "a derivative rule", f"an array {value!r}")
        scalars[slot] = _python(value)

    def read(atom: Any) -> tuple[bool, Any]:
        if not isinstance(atom, int):
            return False, _python(atom.val)
        return (False, scalars[atom]) if atom in scalars else (True, atom)

    lines: list[_Line] = []
    for node in needed(flat.nodes, slots(flat.outputs)):
        if len(node.results) > 1:
            raise refuse(node, "not elementwise")
        operands = tuple(map(read, node.operands))
        folded = _folded(node, operands, flat)
        if folded is not None:
            scalars[node.result] = folded
            continue
        if node.name == "pow" and operands[1][0]:
            raise refuse(node, NO_POWER)
        identity = node.name in ("broadcast_in_dim", "reshape") and _same_shape(node, flat)
        check_types(node, flat)
        if flat.avals[node.result].shape != shape:
            raise refuse(node, "not elementwise on the state")
        if identity:
            function = _plain(lambda x: x)
        elif node.name in TABLE:
            function = TABLE[node.name]
        else:
            raise refuse(node, "not an elementwise operation that kernels know")
        dtype = flat.avals[node.result].dtype
        narrow = dtype if dtype.name in NARROW else None
        name = "" if identity else node.name
        lines.append(_Line(name, function, node.eqn.params, operands, node.result, narrow))
    return Program(flat.inputs, lines, [read(out) for out in flat.outputs])


def check_types(node: Node, flat: Flat) -> None:
    """Raises unless every array of an equation is of a type that kernels compute in."""
    for atom in (*node.operands, *node.results):
        aval = flat.avals[atom] if isinstance(atom, int) else atom.aval
        if aval.shape and aval.dtype.name not in ("float32", "bool", *NARROW):
            raise refuse(node, f"an array of {aval.dtype.name}; kernels take float32 or narrower")


def _same_shape(node: Node, flat: Flat) -> bool:
    (operand,) = node.operands[:1]
    return isinstance(operand, int) and (flat.avals[operand].shape == flat.avals[node.result].shape)


def _python(value: Any) -> Any:
    """A constant as a Python scalar, which a kernel takes without capturing an array."""
    value = np.asarray(value)  # not jnp: under a trace that would be one more equation
    return bool(value) if value.dtype == np.bool_ else float(value)


def _folded(node: Node, operands: Sequence[tuple[bool, Any]], flat: Flat) -> Any:
    """The scalar that an equation on scalars only gives, or None."""
    if not operands or any(known for known, _ in operands):
        return None
    if node.name in ("broadcast_in_dim", "reshape", "pcast", "pvary"):
        return operands[0][1]
    if node.name not in TABLE:
        return None
    avals = [flat.avals[a] if isinstance(a, int) else a.aval for a in node.operands]
    with jax.ensure_compile_time_eval():
        typed = [jnp.asarray(v, a.dtype) for (_, v), a in zip(operands, avals, strict=True)]
        return _python(compat.bind(node.eqn, typed)[0])
