"""Reparameterisations: which leaves of a parameter tree are computed from parts, and how.

`chain(a, b)` is written as the weight flows: `effective = b(a(W))`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpara.tree import Where, is_matrix, matcher, path_of, select
from jaxpara.types import Key, Model, Params
from jaxpara.weights import trained
from jaxpara.weights.lift import Report, lift, report
from jaxpara.weights.parts import owned
from jaxpara.weights.sampling import key_of, sampled
from jaxpara.weights.weight import (
    Method,
    Pooled,
    Weight,
    dense,
    is_weight,
    resolved,
    unresolved,
)


class Member(NamedTuple):
    """One method and the leaves that it is for.

    Attributes:
      method: how.
      where: which leaves.
      optional: whether it may be that there are none.
    """

    method: Method
    where: Where
    optional: bool = False


class Reparam(NamedTuple):
    """A transform of models, and the pure functions that belong to it.

    Attributes:
      members: methods in the order in which the weight flows through them.
    """

    members: tuple[Member, ...]

    def __call__(self, model: Model) -> Model:
        """The same model, whose parameters are the state of this reparameterisation.

        Args:
          model: any; its functions must take the parameters first.

        Returns:
          The model; `init` makes parameters and attaches to them. Its functions take a `key=`, from
          which dropout and stochastic rounding draw, see `sample`; without one they are
          deterministic. A model that takes a `key=` itself gets the same one.
        """

        def init(key: Key) -> Any:
            k_params, k_attach = jax.random.split(key)
            return self.attach(k_attach, model.init(k_params))

        lifted = [
            None if function is None else self._keyed(function)
            for function in (model.apply, model.start, model.run)
        ]
        assert lifted[0] is not None
        return Model(init, lifted[0], lifted[1], lifted[2])

    def attach(self, key: Key, params: Params) -> Any:
        """Puts the parts beside existing parameters.

        The state has copies of the arrays, so either may be donated and the other lives on. Where
        the parameters are not needed any more, `jax.jit(t.attach, donate_argnums=1)` hands their
        memory over instead.

        Args:
          key: random; each leaf draws from it by its path, so the order of leaves is of no matter.
          params: arrays.

        Returns:
          The state: `params` with `Weight`s for the leaves that were selected.

        Raises:
          ValueError: a member selects nothing (names the leaves that come near), or a leaf that is
            not an array of two or more axes and of floats of 16 bits or more.
        """
        state: Any = params
        pools: dict[str, jax.Array] = {}
        for i, member in enumerate(self.members):
            # Patterns speak of the leaves of the parameters, whatever came before.
            selected = _selected(member, params)
            for path, leaf in selected.items():
                if not is_matrix(leaf):
                    raise ValueError(
                        f"{member.method.name} needs a floating array of two or more axes; where="
                        f"{member.where!r} also selects {path!r}, of shape {jnp.shape(leaf)} and "
                        f"dtype {jnp.result_type(leaf)}: narrow it"
                    )
                if jnp.dtype(leaf.dtype).itemsize < 2:
                    raise ValueError(
                        f"{member.method.name} needs floats of 16 bits or more; {path!r} has dtype "
                        f"{leaf.dtype}: cast it first, for example with .astype(jax.numpy.bfloat16)"
                    )
            found = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_weight)
            leaves = {
                path_of(keys): resolved(Pooled(leaf, pools))
                for keys, leaf in found
                if path_of(keys) in selected
            }
            new, made = _attached(member.method, jax.random.fold_in(key, i), leaves)
            pools |= {f"{i}_{name}": pool for name, pool in made.items()}
            weights = {path: _without_pools(weight, f"{i}_") for path, weight in new.items()}
            state = jax.tree_util.tree_map_with_path(
                lambda keys, leaf, weights=weights: weights.get(path_of(keys), leaf),
                state,
                is_leaf=is_weight,
            )
        return owned(Pooled(state, pools) if pools else state)

    def _keyed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        lifted, own = lift(function), "key" in inspect.signature(function).parameters

        @functools.wraps(lifted)
        def call(state, *inputs, key=None, **more):
            if own and key is not None:
                more["key"] = key
            return lifted(state if key is None else self.sample(state, key), *inputs, **more)

        # What a caller sees: the function's own parameters, and the key.
        signature = inspect.signature(function)
        named = inspect.Parameter("key", inspect.Parameter.KEYWORD_ONLY, default=None)
        if not own:
            before = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
            after = [p for p in signature.parameters.values() if p.kind == p.VAR_KEYWORD]
            signature = signature.replace(parameters=[*before, named, *after])
        vars(call)["__signature__"] = signature
        return call

    def sample(self, state: Any, key: Key) -> Any:
        """The state of one step, with the random choices of methods made: dropout, rounding.

        `jp.lift(f)(t.sample(state, key), x)` sees one weight wherever it uses a leaf, the one that
        `t.effective(t.sample(state, key))` has. What is trained and merged is the state itself.

        Args:
          state: from `attach`.
          key: random, another one for each step.

        Returns:
          The state; itself where no method draws anything.
        """
        return sampled(state, key)

    def effective(self, state: Any) -> Params:
        """The dense weights: the definition of everything else here.

        Args:
          state: from `attach`.

        Returns:
          Parameters as the model knows them.
        """
        return jax.tree.map(dense, resolved(state), is_leaf=is_weight)

    def penalty(self, state: Any) -> jax.Array:
        """What the methods want added to the loss, such as the decay of pruned weights.

        Args:
          state: from `attach`.

        Returns:
          A scalar; zero where no method asks for anything.
        """
        total = jnp.zeros((), jnp.float32)
        for leaf in jax.tree.leaves(resolved(state), is_leaf=is_weight):
            while is_weight(leaf):
                method = leaf.method
                if method.penalty is not None:
                    own = method.penalty(method.settings, dense(leaf.base), leaf.parts)
                    total = total + own
                leaf = leaf.base
        return total

    def trainable(self, state: Any) -> Any:
        """What is trained, as a mask for `jp.split`.

        A method that freezes does so to the leaves that it matched: a leaf of another member of a
        chain is trained as that one alone would train it. Leaves that no member matched are trained
        where no member freezes.

        Args:
          state: from `attach`.

        Returns:
          Booleans in the structure of the state; true on floating arrays only.
        """
        return trained.trainable(state)

    def merge(self, state: Any) -> Any:
        """What is deployed: plain arrays, or integers with their scales.

        Args:
          state: from `attach`.

        Returns:
          The tree; `lift` runs it as it is.
        """

        def one(leaf):
            if not is_weight(leaf) or leaf.method.merge is None:
                return dense(leaf)
            return leaf.method.merge(leaf.method.settings, dense(leaf.base), leaf.parts)

        return jax.tree.map(one, resolved(state), is_leaf=is_weight)

    def report(self, state: Any, function: Callable[..., Any], *inputs: Any) -> Report:
        """Every use of every matched leaf: by a rule, or densified.

        Args:
          state: from `attach`.
          function: of the model, lifted or not.
          inputs: arrays or shapes, as the function takes them after the parameters.

        Returns:
          The report; print it.
        """
        return report(function, state, *inputs)


def _selected(member: Member, params: Params) -> dict[str, Any]:
    if member.optional:
        wanted = matcher(member.where)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        if not any(wanted(path_of(keys), leaf) for keys, leaf in leaves):
            return {}
    return select(params, member.where)


def _attached(method: Method, key: Key, leaves: Mapping[str, Any]):
    """The weights in the place of leaves, and the pools of those that have parts in common."""
    if method.share is not None:
        pools, weights = method.share(method, key, leaves)
        return weights, pools
    assert method.init is not None
    weights = {}
    for path, leaf in leaves.items():
        try:
            made = method.init(method.settings, key_of(key, path), leaf)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from None
        base, parts, *own = made
        weights[path] = Weight(base, parts, own[0] if own else method)
    return weights, {}


def _without_pools(weight: Weight, prefix: str) -> Weight:
    """A new weight as it stands in a state: pools by their names there, the base without any."""
    shared = tuple((part, prefix + pool) for part, pool in sorted(weight.shared))
    return dataclasses.replace(weight, base=unresolved(weight.base), shared=shared)


def reparam(method: Method, where: Where) -> Reparam:
    """The reparameterisation of one method.

    Args:
      method: how.
      where: which leaves, see `jaxpara.tree.matcher`.

    Returns:
      The reparameterisation.
    """
    return Reparam((Member(method, where),))


def chain(*reparams: Reparam) -> Reparam:
    """Reparameterisations one after another, as the weight flows.

    `chain(lora(), fake_quant())` quantises `W + A B` (the adapter is inside the quantiser);
    `chain(fake_quant(), lora())` adapts a quantised weight, `Q(W) + A B`.

    Args:
      reparams: in order.

    Returns:
      The reparameterisation.

    Raises:
      ValueError: none is given.
    """
    if not reparams:
        raise ValueError("chain() needs at least one reparameterisation")
    return Reparam(tuple(member for each in reparams for member in each.members))
