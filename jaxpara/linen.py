"""Flax Linen: its modules as Models, and its `nn.RNN` solved by `newton_scan`.

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
    from flax import errors, linen
    from flax.core import lift
    from flax.linen.transforms import lift_transform
except ImportError as error:
    raise ImportError("jaxpara.linen needs Flax: pip install 'jaxpara[flax]'") from error


def from_linen(
    module: linen.Module,
    *examples: Any,
    rngs: tuple[str, ...] = (),
    mutable: tuple[str, ...] = (),
    start: Callable[..., Any] | str | None = None,
    run: Callable[..., Any] | str | None = None,
    **keywords: Any,
) -> Model:
    """A Linen module as a `Model` of pure functions.

    `init(key)` is the "params" collection of `module.init`, `apply(params, *inputs)` the
    module's `__call__`. Anything else that a module needs is an ordinary input or output:

    - keys: with `rngs=("dropout",)` it is `apply(params, *inputs, key)`; of several streams
      each gets a split of the key;
    - further collections: with `mutable=("batch_stats",)` the parameters are Flax's
      variables, `{"params": ..., "batch_stats": ...}`, and `apply` gives `(outputs, updates)`,
      as Flax's own does; `variables | updates` is what the next call takes.

    Args:
      module: the module.
      *examples: inputs of `__call__`, arrays or `jax.ShapeDtypeStruct`s.
      rngs: names of the random streams that the module draws from.
      mutable: names of its collections beside "params".
      start: method, or its name, `(self, batch_size, max_length) -> state`, of a module that
        reads sequences. An `nn.RNN` brings this and `run` with it.
      run: method, or its name, `(self, state, inputs) -> (state, outputs)`.
      **keywords: keyword arguments of `__call__`, as `train=True`. Models that differ in
        these share their parameters.

    Returns:
      A `Model`; the shapes of the examples are its `inputs`, from which a reparameterisation that
      is applied to it (`t(model)`) reads what is summed over in each kernel.

    Raises:
      TypeError: `module` is not an instance of a Linen module.
      ValueError: a collection or a random stream that is not named, an unknown name, or
        one of `start` and `run` without the other; and what the module raises on `examples`.
    """
    if not isinstance(module, linen.Module):
        raise TypeError(
            f"module is {module!r}; expected a Linen module that is made: from_linen(Net(4), x)"
        )
    if (start is None) != (run is None):
        raise ValueError("a sequence model has both start= and run=; one was given")
    if run is not None and mutable:
        raise ValueError(
            f"run= is given, and so is mutable={mutable}; a sequence model passes on only "
            "its state. Leave one of them out"
        )
    if start is None and isinstance(module, linen.RNN) and _plain(module):
        start, run = _rnn_start(module, examples), _rnn_run

    def variables(key):
        # Like Flax's, all streams of the initialisation come from this one key.
        return module.init(key, *jax.tree.map(_concrete, examples, is_leaf=_is_shape), **keywords)

    def init(key):
        return variables(key) if mutable else variables(key).get("params", {})

    def apply(params, *inputs):
        return call(params, inputs, mutable=list(mutable) or False, **keywords)

    def call(params, inputs, **how):
        streams = {}
        if rngs:
            if len(inputs) < 2 or not _is_key(inputs[-1]):
                raise ValueError(f"rngs={rngs}: the last input must be a key, and is not")
            *inputs, key = inputs
            keys = jax.random.split(key, len(rngs)) if len(rngs) > 1 else [key]
            streams = dict(zip(rngs, keys, strict=True))
        try:
            tree = params if mutable else {"params": params}
            return module.apply(tree, *inputs, rngs=streams, **how)
        except errors.InvalidRngError as error:
            raise ValueError(
                f"{type(module).__name__} draws from a random stream that rngs={rngs} does not "
                f"name ({str(error).splitlines()[0]}); add it, and give apply a key as last input"
            ) from error

    key = jax.random.key(0)
    found = sorted(set(jax.eval_shape(variables, key)) - {"params"})
    if found != sorted(mutable):
        raise ValueError(
            f"{type(module).__name__} has the collections {found} beside 'params'; "
            f"mutable={mutable}. Name exactly these: mutable={tuple(found)}"
        )
    jax.eval_shape(apply, jax.eval_shape(init, key), *examples, *([key] if rngs else []))
    known = shapes_of((*examples, *([key] if rngs else [])))
    if start is None:
        return Model(init, apply, inputs=known)
    return Model(
        init,
        apply,
        lambda params, batch_size, max_length: module.apply(
            {"params": params}, batch_size, max_length, method=start
        ),
        lambda params, state, *inputs: call(params, (state, *inputs), method=run),
        known,
    )


class RNN(linen.RNN):
    """Flax's `nn.RNN`, solved by `newton_scan`: same arguments, parameters, values, gradients.

    Flax's own layer makes the parameters. Afterwards its scan is replaced, and with it the work
    of `nn.scan` on collections and random streams. All steps read `variable_broadcast` at once.
    `variable_axes` is one slice a step. A floating `variable_carry` becomes part of the state
    that is solved for, whose Jacobian is then rarely diagonal.

    Attributes:
      solver: as for `newton_scan`; None lets it choose.
      derivative: as for `newton_scan`; "reverse" is the right choice for a training loop.

    References: [flax], [deer].
    """

    solver: Solver | Auto | None = None
    derivative: str | None = None

    def __call__(
        self,
        inputs: Shaped[Array, "..."],
        *,
        initial_carry: PyTree = None,
        init_key: Shaped[Array, "..."] | None = None,
        seq_lengths: Int[Array, "..."] | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> PyTree:
        """Applies the cell over time.

        Args:
          inputs: `[*batch, time, *features]`, or time first if `time_major`.
          initial_carry: the state to start from; None asks the cell for it.
          init_key: key for the cell's initial carry; None is `jax.random.key(0)`, as in Flax.
          seq_lengths: `[*batch]`, what lies beyond them is padding.
          return_carry, time_major, reverse, keep_order: override the attributes.

        Returns:
          The outputs, or `(carry, outputs)` if `return_carry`.
        """
        return_carry = self.return_carry if return_carry is None else return_carry
        time_major = self.time_major if time_major is None else time_major
        reverse = self.reverse if reverse is None else reverse
        keep_order = self.keep_order if keep_order is None else keep_order
        if self.is_initializing():
            return super().__call__(
                inputs,
                initial_carry=initial_carry,
                init_key=init_key,
                seq_lengths=seq_lengths,
                return_carry=return_carry,
                time_major=time_major,
                reverse=reverse,
                keep_order=keep_order,
            )
        axis = 0 if time_major else inputs.ndim - self.cell.num_feature_axes - 1
        shape = inputs.shape[:axis] + inputs.shape[axis + 1 :]
        xs = jnp.moveaxis(inputs, axis, 0)
        if initial_carry is None:
            key = jax.random.key(0) if init_key is None else init_key
            initial_carry = self.cell.initialize_carry(key, shape)
        settings = {
            "unroll": self.unroll,
            "solver": self.solver,
            "derivative": self.derivative,
        }

        def solve(xs, keep):
            def step(cell, carry, x):
                carry, y = cell(carry, x)
                return carry, ((carry, y) if keep else y)

            lifted = lift_transform(
                _lifted_scan,
                step,
                settings=settings,
                broadcast=self.variable_broadcast,
                carried=self.variable_carry,
                axes=dict(self.variable_axes),
                split=dict(self.split_rngs),
            )
            return lifted(self.cell, initial_carry, xs)

        carry, ys = solve_padded(
            solve,
            xs,
            None if seq_lengths is None else jnp.asarray(seq_lengths),
            reverse=reverse,
            keep_order=keep_order,
            return_carry=return_carry,
        )
        ys = jax.tree.map(lambda y: jnp.moveaxis(y, 0, axis), ys)
        return (carry, ys) if return_carry else ys


def _lifted_scan(fn, *, settings, broadcast, carried, axes, split):
    """What `flax.core.lift.scan` is to `lax.scan`, to `newton_scan`: a scan over scopes."""
    for name, axis in axes.items():
        if not isinstance(axis, int):
            raise ValueError(f"variable_axes maps {name!r} to {axis!r}; expected the axis, an int")

    def inner(scope_fn, repack, variables, rngs, init, xs):
        shared, carries, *slices = variables
        slices = [_moved(s, axis, 0) for s, axis in zip(slices, axes.values(), strict=True)]
        length = jax.tree.leaves(xs)[0].shape[0]
        each = list(split.values())
        rngs = [
            lift.tree_map_rngs(lambda k: jax.random.split(jax.random.clone(k), length), keys)
            if apart
            else keys
            for keys, apart in zip(rngs, each, strict=True)
        ]
        counts = []

        def step(carry, x):
            (carries, carry), (slices, now, x) = carry, x
            keys = [now[i] if apart else rngs[i] for i, apart in enumerate(each)]
            scopes = scope_fn((shared, carries, *slices), tuple(keys))
            counters = [scope.rng_counters for scope in jax.tree.leaves(scopes)]
            for counter, count in zip(counters, counts, strict=False):
                counter.update(count)
            carry, y = fn(scopes, carry, x)
            kept, changed, *slices = repack(scopes)
            _check_shared(shared, kept)
            counts[:] = counts or [dict(counter) for counter in counters]
            # A collection that is not mutable does not come back from a scope.
            changed = tuple({**old, **new} for old, new in zip(carries, changed, strict=True))
            return (changed, carry), (y, tuple(slices))

        carry = (carries, init)
        now = {i: keys for i, keys in enumerate(rngs) if each[i]}
        xs = (tuple(slices), now, xs)
        # Flax traces a step twice and its scopes count what they draw: the trace that counts is
        # the second one there, and every later one here, so that all draw the same numbers.
        jax.eval_shape(step, carry, jax.tree.map(lambda x: x[0], xs))
        (carries, carry), (ys, slices) = newton_scan(step, carry, xs, **settings)
        slices = [_moved(s, 0, axis) for s, axis in zip(slices, axes.values(), strict=True)]
        return (carry, ys), (shared, carries, *slices)

    groups = (broadcast, carried, *axes)
    return lift.pack(inner, groups, groups, tuple(split), name="scan")


def _check_shared(before, after):
    for old, new in zip(before, after, strict=True):
        for name, collection in new.items():
            now, was = jax.tree.leaves(collection), jax.tree.leaves(old.get(name, {}))
            if len(now) != len(was) or any(a is not b for a, b in zip(now, was, strict=True)):
                raise ValueError(
                    f"the cell changes the collection {name!r}, which variable_broadcast says "
                    "all steps share; name it in variable_carry= instead"
                )


def _moved(tree, source, destination):
    return jax.tree.map(lambda x: jnp.moveaxis(x, source, destination), tree)


def _plain(module):
    """Whether this `nn.RNN` reads `[batch, time, ...]` forwards, and gives only its outputs."""
    return not (module.reverse or module.return_carry or module.time_major)


def _rnn_start(module, examples):
    features = examples[0].shape[-module.cell.num_feature_axes :]

    def start(module, batch_size, max_length):
        del max_length  # constant memory
        return module.cell.initialize_carry(jax.random.key(0), (batch_size, *features))

    return start


def _rnn_run(module, state, inputs):
    return module(inputs, initial_carry=state, return_carry=True)


def _is_shape(x):
    return isinstance(x, jax.ShapeDtypeStruct)


def _concrete(x):
    return jnp.zeros(x.shape, x.dtype) if _is_shape(x) else x


def _is_key(x):
    x = jnp.asarray(x) if not hasattr(x, "dtype") else x
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key) or (x.dtype, x.shape) == (jnp.uint32, (2,))
