"""Recurrences that are compiled ahead of time and timed, with their data and their oracle.

They are cells of `jp.cells` at weights typical of training (uniform within 1), over the gates that
their input projection makes from unit-normal inputs: unit normal plus the bias.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxpara as jp
from jaxpara.recurrence.kernel import elementwise
from pallas_kernels.shapes import Leaves, Shape

Arrays = Sequence[jax.Array]


class Recurrence(NamedTuple):
    """A recurrence on lists of arrays.

    Attributes:
      name: for tables.
      leaves: numbers of states and inputs.
      step: `(consts, states, inputs) -> states`, in the dtype of the states.
      consts: `[D]` each.
      draw: `(key, shape, index) -> values` of input `index`, `[T, B, D]`, float32.
      affine: the step is affine in the state.
      certain: whether a correction bounds the error, as `newton_scan` tells a kernel.
    """

    name: str
    leaves: Leaves
    step: Callable[[Arrays, Arrays, Arrays], list[jax.Array]]
    consts: list[jax.Array]
    draw: Callable[[jax.Array, Shape, int], jax.Array]
    affine: bool = False
    certain: bool = True


class Data(NamedTuple):
    """Operands as stored: `[B, D]` and `[T, B, D]`."""

    init: list[jax.Array]
    xs: list[jax.Array]
    cotangents: list[jax.Array]


def gated(name: str, width: int) -> Recurrence:
    """Makes the recurrence of a cell of `jp.cells`.

    Args:
      name: its name there, `gru` and `lstm` for those with one weight a unit.
      width: D.

    Returns:
      The recurrence.
    """
    cell = {"gru": "para_gru", "lstm": "para_lstm"}.get(name, name)
    built = getattr(jp.cells, cell)(1, width, scale=1.0)
    params = built.init(jax.random.key(0))
    names = sorted(params["recurrent"])
    gates = built.project(params, jnp.zeros((1, 1)))
    carry = built.start(params, ())
    single = isinstance(carry, jax.Array)

    def step(consts, states, inputs):
        weights = {"recurrent": dict(zip(names, consts, strict=True))}
        new, _ = built.step(weights, states[0] if single else tuple(states), tuple(inputs))
        return [new] if single else list(new)

    def draw(key, shape, index):
        return jax.random.normal(key, shape) + gates[index][0]

    leaves = Leaves(len(jax.tree.leaves(carry)), len(gates))
    consts = [params["recurrent"][n] for n in names]
    # The stabiliser of an sLSTM is a maximum.
    return Recurrence(name, leaves, step, consts, draw, certain=name != "slstm")


def linear(size: int) -> Recurrence:
    """Makes `s_t = A_t s_{t-1} + b_t`, K by K: the inputs are A row by row, then b.

    Args:
      size: K.

    Returns:
      The recurrence.
    """

    def step(consts, states, inputs):
        del consts
        a, b = inputs[: size * size], inputs[size * size :]
        return [sum((a[size * i + j] * states[j] for j in range(size)), b[i]) for i in range(size)]

    def draw(key, shape, index):
        if index >= size * size:
            return jax.random.normal(key, shape)
        low = 0.5 if size == 1 else -1.0  # decays; with signs, rows whose norm is below one
        return jax.random.uniform(key, shape, minval=low, maxval=1.0) * 0.99 / size

    leaves = Leaves(size, size * size + size, size)
    return Recurrence("linear" if size == 1 else f"linear{size}", leaves, step, [], draw, True)


def three(width: int) -> Recurrence:
    """Makes a cell without a kernel of its own: three states, a clip, a softplus, a where.

    Args:
      width: D.

    Returns:
      The recurrence.
    """

    def step(consts, states, inputs):
        u, v, w = states
        a, b = (c.astype(u.dtype) for c in consts)
        x, y = (i.astype(u.dtype) for i in inputs)
        t = jnp.tanh(a * v + x)
        return [
            0.6 * u + 0.3 * t,
            jnp.where(w > 0, 0.5 * w, 0.2 * w) + 0.4 * jnp.clip(u + y, -1.0, 1.0),
            b * jax.nn.softplus(0.5 * v) - 0.3 * u * jnp.tanh(w),
        ]

    consts = list(jax.random.uniform(jax.random.key(0), (2, width), minval=-1.0))
    return Recurrence(
        "three", Leaves(3, 2), step, consts, lambda key, shape, _: jax.random.normal(key, shape)
    )


def make(name: str, width: int) -> Recurrence:
    """Makes a recurrence by name.

    Args:
      name: `linear`, `linear2` to `linear4`, `three`, or a cell of `jp.cells`.
      width: D.

    Returns:
      The recurrence.
    """
    if name.startswith("linear"):
        return linear(int(name.removeprefix("linear") or 1))
    return three(width) if name == "three" else gated(name, width)


@functools.cache
def leaves(name: str) -> Leaves:
    """Counts the arrays that a recurrence reads and writes.

    Args:
      name: as in `make`.

    Returns:
      The numbers.
    """
    return make(name, 1).leaves


def prepared(recurrence: Recurrence, shape: Shape, dtype: str) -> elementwise.Elementwise:
    """Prepares a recurrence for a kernel, with float32 arithmetic for any storage.

    Args:
      recurrence: one of the above.
      shape: T, B, D.
      dtype: of the inputs as they are stored.

    Returns:
      The cell, and its operands as a function of `(consts, xs)`.
    """
    state = jax.ShapeDtypeStruct(shape[1:], jnp.float32)
    return elementwise.prepare(
        lambda consts, states, xs: (recurrence.step(consts, states, xs), []),
        recurrence.consts,
        [state] * recurrence.leaves.states,
        [jax.ShapeDtypeStruct(shape, dtype)] * recurrence.leaves.inputs,
    )


def order_of_params(
    ready: elementwise.Elementwise, recurrence: Recurrence, shape: Shape
) -> list[int]:
    """Maps each parameter of the kernel to one of the recurrence's consts.

    Args:
      ready: from `prepared`.
      recurrence: what it was prepared from.
      shape: T, B, D.

    Returns:
      The index into `recurrence.consts` of each parameter.
    """
    marks = [jnp.full_like(c, i) for i, c in enumerate(recurrence.consts)]
    xs = [jnp.zeros((1, *shape[1:]))] * recurrence.leaves.inputs
    return [int(p.ravel()[0]) for p in ready.operands(marks, xs)[1]]


def data(recurrence: Recurrence, shape: Shape, dtype: str, count: int = 1) -> list[Data]:
    """Makes operands on the default device.

    Args:
      recurrence: the recurrence.
      shape: T, B, D.
      dtype: of the storage.
      count: of independent sets.

    Returns:
      The sets.
    """
    states, inputs, _ = recurrence.leaves

    @jax.jit
    def draw(key):
        keys = jax.random.split(key, inputs + states)
        xs = [recurrence.draw(keys[i], shape, i).astype(dtype) for i in range(inputs)]
        cotangents = [jax.random.normal(k, shape).astype(dtype) for k in keys[inputs:]]
        return Data([jnp.zeros(shape[1:], dtype)] * states, xs, cotangents)

    return [draw(key) for key in jax.random.split(jax.random.key(0), count)]


class Truth(NamedTuple):
    """Results in float64 at the chosen sequences and channels: `[T, b, d]` and `[b, d]`."""

    states: list[np.ndarray]
    d_init: list[np.ndarray]
    d_xs: list[np.ndarray]
    d_consts: list[np.ndarray]


def corner(array: Any) -> np.ndarray:
    """Selects the first and last sequence and four channels of `[..., B, D]`, as float64.

    Args:
      array: with the last two axes B and D.

    Returns:
      `[..., b, d]`.
    """
    *_, batch, width = array.shape
    rows = sorted({0, batch - 1})
    channels = sorted({round(i * (width - 1) / 3) for i in range(4)})
    picked = array[..., np.array(rows)[:, None], np.array(channels)[None]]
    return np.asarray(picked.astype(jnp.float32)).astype(np.float64)


def truth(recurrence: Recurrence, operands: Data) -> Truth:
    """Computes the results of `lax.scan` and backpropagation in float64 on the host, in a corner.

    Channels and sequences are independent, so a corner of the operands gives that corner of the
    results.

    Args:
      recurrence: the recurrence.
      operands: its data, as stored.

    Returns:
      States and gradients; the parameters' by sequence.
    """
    small = jax.tree.map(corner, operands)
    shape = (*operands.xs[0].shape[1:],)
    consts = [corner(jnp.broadcast_to(c, shape)) for c in recurrence.consts]
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):

        @jax.jit
        def both(init, xs, consts, cotangents):
            def solve(init, xs, consts):
                def step(h, x):
                    new = recurrence.step(consts, h, x)
                    return new, new

                return jax.lax.scan(step, init, xs)[1]

            states, pull = jax.vjp(solve, init, xs, consts)
            return Truth(states, *pull(cotangents))

        wide = jax.tree.map(jnp.asarray, (small.init, small.xs, consts, small.cotangents))
        return jax.tree.map(np.asarray, both(*wide))
