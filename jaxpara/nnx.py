"""Flax NNX: its modules as Models, and its `nnx.RNN` solved by `newton_scan`.

Needs the extra `flax`; `import jaxpara` alone never loads it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree, Shaped

from jaxpara.padded import solve_padded
from jaxpara.recurrence.choice import Auto
from jaxpara.recurrence.scan import newton_scan
from jaxpara.recurrence.system import Solver
from jaxpara.tree import shapes_of
from jaxpara.types import Model

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("jaxpara.nnx needs Flax: pip install 'jaxpara[flax]'") from error

# nnx.RNN keeps a stream of this name for initial carries, which are zeros as a rule.
CARRY = "carry"


def from_nnx(
    build: Callable[[nnx.Rngs], nnx.Module],
    *,
    rngs: tuple[str, ...] = (),
    mutable: tuple[str, ...] = (),
    start: Callable[..., Any] | str | None = None,
    run: Callable[..., Any] | str | None = None,
    examples: tuple[Any, ...] | None = None,
    **keywords: Any,
) -> Model:
    """An NNX module as a `Model` of pure functions.

    `init(key)` holds the values of its `nnx.Param`s as a nested dict of arrays and
    `apply(params, *inputs)` calls the module. Anything else that it needs is an ordinary input
    or output:

    - keys: with `rngs=("dropout",)` it is `apply(params, *inputs, key)`; every layer that
      keeps a stream of that name draws from its own fold of the key. What is not named is on
      the stream "default", as in `nnx.Rngs`;
    - further variables, by the names of their collections: with `mutable=("batch_stats",)`
      the parameters are `{"params": ..., "batch_stats": ...}` and `apply` gives
      `(outputs, updates)`; `variables | updates` is what the next call takes.

    Args:
      build: makes the module from `nnx.Rngs`, as `lambda rngs: Net(8, rngs=rngs)`. What is
        set on it there, by `eval()` say, is part of the Model: one for training and one for
        evaluation share their parameters.
      rngs: names of the random streams that a call draws from.
      mutable: names of the collections beside the parameters.
      start: method of the module, or its name, `(self, batch_size, max_length) -> state`, if
        it reads sequences. An `nnx.RNN` brings this and `run` with it.
      run: method, or its name, `(self, state, inputs) -> (state, outputs)`.
      examples: inputs of `apply`, arrays or shapes. They are the Model's `inputs`, from which a
        reparameterisation that is applied to it (`t(model)`) reads what is summed over in each
        kernel; without them a kernel is taken as `[.., in, out]`.
      **keywords: keyword arguments of the module's `__call__`.

    Returns:
      A `Model`.

    Raises:
      TypeError: `build` is a module instead of the function that makes one.
      ValueError: a collection that is not named, an unknown name, one of `start` and
        `run` without the other; from `apply`, a draw from a stream that is not named.
    """
    if isinstance(build, nnx.Module):
        raise TypeError(
            f"build is a {type(build).__name__} that is made already; give the function that makes "
            f"it: from_nnx(lambda rngs: {type(build).__name__}(..., rngs=rngs))"
        )
    if (start is None) != (run is None):
        raise ValueError("a sequence model has both start= and run=; one was given")
    if run is not None and mutable:
        raise ValueError(
            f"run= is given, and so is mutable={mutable}; a sequence model passes on only "
            "its state. Leave one of them out"
        )

    def made(key):
        named = {n: jax.random.fold_in(key, i) for i, n in enumerate(rngs) if n != "default"}
        return build(nnx.Rngs(key, **named))

    shapes = nnx.eval_shape(lambda: made(jax.random.key(0)))
    if start is None and isinstance(shapes, nnx.RNN) and _plain(shapes):
        start, run = _rnn_start, _rnn_run
    graph, streams, params, rest = nnx.split(shapes, nnx.RngState, nnx.Param, ...)
    found = sorted({_collection(v) for _, v in nnx.to_flat_state(rest)})
    if found != sorted(mutable):
        raise ValueError(
            f"{type(shapes).__name__} has the collections {found} beside its parameters; "
            f"mutable={mutable}. Name exactly these: mutable={tuple(found)}"
        )
    drawn = {v.tag for _, v in nnx.to_flat_state(streams)}
    if unknown := sorted(set(rngs) - drawn):
        raise ValueError(
            f"rngs={rngs} names {unknown}, which {type(shapes).__name__} does not keep; it has "
            f"the streams {sorted(drawn)}, 'default' being what nnx.Rngs(seed) gives to all"
        )

    def init(key):
        _, _, params, rest = nnx.split(made(key), nnx.RngState, nnx.Param, ...)
        params = nnx.to_pure_dict(params)
        return {"params": params} | _collections(rest) if mutable else params

    def call(variables, inputs, method=None, **how):
        key = jax.random.key(0)  # for streams that only initial carries may draw from
        if rngs:
            if len(inputs) < 2 or not _is_key(inputs[-1]):
                raise ValueError(
                    f"rngs={rngs}: the last input must be a key as jax.random.key makes it, and "
                    "is not"
                )
            *inputs, key = inputs
        values = variables["params"] if mutable else variables
        state = [_filled(params, values), _seeded(streams, key)]
        state += [_filled(rest, *(variables[name] for name in mutable))]
        module = nnx.merge(graph, *state)
        before = _counts(module)
        if isinstance(method, str):
            method = getattr(type(module), method)
        out = module(*inputs, **how) if method is None else method(module, *inputs, **how)
        drawn = {tag for (path, tag), n in _counts(module).items() if n is not before[path, tag]}
        if silent := sorted(drawn - {CARRY, *rngs}):
            raise ValueError(
                f"{type(module).__name__} draws from the random streams {silent}, which "
                f"rngs={rngs} does not name; add them, and give apply a key as last input"
            )
        return out, module

    def apply(params, *inputs):
        out, module = call(params, inputs, **keywords)
        if not mutable:
            return out
        found = _collections(nnx.state(module, nnx.Not(nnx.Any(nnx.RngState, nnx.Param))))
        return out, {name: found[name] for name in mutable}

    known = None if examples is None else shapes_of(tuple(examples))
    if start is None:
        return Model(init, apply, inputs=known)
    return Model(
        init,
        apply,
        lambda params, batch_size, max_length: call(params, (batch_size, max_length), start)[0],
        lambda params, state, *inputs: call(params, (state, *inputs), run)[0],
        known,
    )


class RNN(nnx.RNN):
    """Flax's `nnx.RNN`, solved by `newton_scan`: same arguments, values and gradients.

    Only variables that the cell changes in a step are part of the carry. A count of random draws
    runs ahead. A floating variable becomes part of the state that is solved for.

    Args:
      cell, time_major, return_carry, reverse, keep_order, unroll, state_axes, broadcast_rngs,
        rngs: as for `nnx.RNN`. `state_axes` may not give a variable one slice a step.
      solver: as for `newton_scan`; None lets it choose.
      derivative: as for `newton_scan`; "reverse" is the right choice for a training loop.

    Raises:
      ValueError: a `state_axes` other than `Carry` or None.

    References: [flax], [deer].
    """

    def __init__(
        self,
        cell: Any,
        *,
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        unroll: int = 1,
        state_axes: Any = None,
        broadcast_rngs: Any = None,
        rngs: Any = True,
        solver: Solver | Auto | None = None,
        derivative: str | None = None,
    ) -> None:
        super().__init__(
            cell,
            time_major=time_major,
            return_carry=return_carry,
            reverse=reverse,
            keep_order=keep_order,
            unroll=unroll,
            state_axes=state_axes,
            broadcast_rngs=broadcast_rngs,
            rngs=rngs,
        )
        for name, axis in (state_axes or {}).items():
            if axis not in (None, nnx.Carry):
                raise ValueError(
                    f"state_axes maps {name} to {axis!r}; expected nnx.Carry or None. Variables "
                    "with one slice a step are for flax.nnx.RNN"
                )
        self.solver = solver
        self.derivative = derivative

    def __call__(
        self,
        inputs: Shaped[Array, "..."],
        *,
        initial_carry: PyTree = None,
        seq_lengths: Int[Array, "..."] | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: Any = None,
    ) -> PyTree:
        """Applies the cell over time.

        Args:
          inputs: `[*batch, time, *features]`, or time first if `time_major`.
          initial_carry: the state to start from; None asks the cell for it.
          seq_lengths: `[*batch]`, what lies beyond them is padding.
          return_carry, time_major, reverse, keep_order: override the attributes.
          rngs: for the cell's initial carry; None takes the layer's own stream.

        Returns:
          The outputs, or `(carry, outputs)` if `return_carry`.
        """
        return_carry = self.return_carry if return_carry is None else return_carry
        time_major = self.time_major if time_major is None else time_major
        reverse = self.reverse if reverse is None else reverse
        keep_order = self.keep_order if keep_order is None else keep_order

        axis = 0 if time_major else inputs.ndim - self.cell.num_feature_axes - 1
        shape = inputs.shape[:axis] + inputs.shape[axis + 1 :]
        if initial_carry is None:
            rngs = self.rngs if rngs is None else rngs
            rngs = rngs.carry.fork() if isinstance(rngs, nnx.Rngs) else rngs
            initial_carry = self.cell.initialize_carry(shape, rngs)

        @nnx.split_rngs(splits=1, only=self.broadcast_rngs, squeeze=True)
        def over_time(cell, xs, keep):
            return _scan(cell, initial_carry, xs, keep, self)

        carry, ys = solve_padded(
            lambda xs, keep: over_time(self.cell, xs, keep),
            jnp.moveaxis(inputs, axis, 0),
            None if seq_lengths is None else jnp.asarray(seq_lengths),
            reverse=reverse,
            keep_order=keep_order,
            return_carry=return_carry,
        )
        ys = jax.tree.map(lambda y: jnp.moveaxis(y, 0, axis), ys)
        return (carry, ys) if return_carry else ys


def _scan(cell, init, xs, keep, layer):
    fixed = nnx.All(nnx.RngState, layer.broadcast_rngs)
    graph, constant, state = nnx.split(cell, fixed, ...)
    constant = jax.tree.map(lambda x: x, constant)
    leaves, tree = jax.tree.flatten(state)
    changed = []

    def step(carry, x):
        moving, carry = carry
        now = iter(moving)
        old = [next(now) if moves else leaf for leaf, moves in zip(leaves, changed, strict=True)]
        # Variables must be made at the trace level at which the cell changes them.
        here = nnx.merge(graph, jax.tree.map(lambda x: x, constant), jax.tree.unflatten(tree, old))
        carry, y = here(carry, x)
        after, _, state = nnx.split(here, fixed, ...)
        new, structure = jax.tree.flatten(state)
        if after != graph or structure != tree:
            raise ValueError(
                f"{type(cell).__name__} adds or removes variables, or sets attributes, in a step; "
                "make them in its __init__"
            )
        return new, old, carry, y

    def probe(moving, carry, x):
        new, old, _, _ = step((moving, carry), x)
        changed[:] = [a is not b for a, b in zip(new, old, strict=True)]

    # What a step leaves alone stays outside the carry: a weight there would couple every state.
    changed[:] = [True] * len(leaves)
    jax.eval_shape(probe, leaves, init, jax.tree.map(lambda x: x[0], xs))

    def body(carry, x):
        new, _, carry, y = step(carry, x)
        moving = [leaf for leaf, moves in zip(new, changed, strict=True) if moves]
        return (moving, carry), ((carry, y) if keep else y)

    moving = [leaf for leaf, moves in zip(leaves, changed, strict=True) if moves]
    (moving, carry), ys = newton_scan(
        body,
        (moving, init),
        xs,
        unroll=layer.unroll,
        solver=layer.solver,
        derivative=layer.derivative,
    )
    now = iter(moving)
    leaves = [next(now) if moves else leaf for leaf, moves in zip(leaves, changed, strict=True)]
    nnx.update(cell, jax.tree.unflatten(tree, leaves))
    return carry, ys


def _plain(layer):
    """Whether this `nnx.RNN` reads `[batch, time, ...]` forwards, and gives only its outputs."""
    return not (layer.reverse or layer.return_carry or layer.time_major)


def _rnn_start(layer, batch_size, max_length):
    del max_length  # constant memory
    return layer.cell.initialize_carry((batch_size, layer.cell.in_features), nnx.Rngs(0))


def _rnn_run(layer, state, inputs):
    return layer(inputs, initial_carry=state, return_carry=True)


def _collection(variable):
    return nnx.variable_name_from_type(type(variable), allow_register=True)


def _collections(state):
    """Values by collection, each a nested dict of arrays."""
    names = {_collection(v) for _, v in nnx.to_flat_state(state)}
    return {
        name: nnx.to_pure_dict(
            nnx.filter_state(state, lambda _, v, name=name: _collection(v) == name)
        )
        for name in sorted(names)
    }


def _filled(shapes, *values):
    """The state with these shapes that holds these values, each a nested dict of arrays."""
    state = jax.tree.map(lambda x: x, shapes)
    for tree in values:
        nnx.replace_by_pure_dict(state, tree)
    for path, variable in nnx.to_flat_state(state):
        if isinstance(variable.get_value(), jax.ShapeDtypeStruct):
            name = "/".join(map(str, path))
            raise ValueError(f"params has no {name}; expected the tree that init gives")
    return state


def _seeded(streams, key):
    """Every stream on its own fold of the key, none drawn from yet."""

    def one(i, variable):
        shape = variable.get_value().shape
        if isinstance(variable, nnx.RngCount):
            return variable.replace(jnp.zeros(shape, jnp.uint32))
        own = jax.random.fold_in(key, i)
        return variable.replace(jax.random.split(own, shape) if shape else own)

    flat = nnx.to_flat_state(streams)
    return nnx.from_flat_state([(path, one(i, v)) for i, (path, v) in enumerate(flat)])


def _counts(module):
    counts = nnx.to_flat_state(nnx.state(module, nnx.RngCount))
    return {(path, v.tag): v.get_value() for path, v in counts}


def _is_key(x):
    return jnp.issubdtype(getattr(x, "dtype", jnp.float32), jax.dtypes.prng_key)
