"""Reparameterisations: which leaves of a parameter tree are computed from parts, and how.

`chain(a, b)` is written as the weight flows: `effective = b(a(W))`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpara.arguments import need_model
from jaxpara.tree import Where, is_matrix, matcher, path_of, select
from jaxpara.types import Key, Model, Params
from jaxpara.weights import arguments, notice, trained
from jaxpara.weights.lazy import Axes
from jaxpara.weights.lift import Report, lift, report
from jaxpara.weights.matrices import Layout, axes_for, in_matrices, matrices_of, merged, put_back
from jaxpara.weights.method import Method, without_window
from jaxpara.weights.parts import owned
from jaxpara.weights.pools import Pooled, resolved, unresolved, whole
from jaxpara.weights.sampling import key_of, sampled
from jaxpara.weights.uses import Layouts, given
from jaxpara.weights.weight import Weight, dense, is_weight

LIFT_IT = (
    "; a function of parameters is lifted by jp.lift(function), and its parameters are given to "
    "t.attach(key, params)"
)


class Member(NamedTuple):
    """One method and the leaves that it is for.

    Attributes:
      method: how.
      where: which leaves.
      optional: whether the selection may be empty.
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

    def __repr__(self) -> str:
        flow = (
            m.method.name + ("" if m.where is None else f" where={m.where!r}") for m in self.members
        )
        return f"Reparam({' then '.join(flow)})"

    def __call__(self, model: Model) -> Model:
        """The same model, whose parameters are the state of this reparameterisation.

        Args:
          model: any; its functions must take the parameters first.

        Returns:
          The model; `init` makes parameters and attaches to them. Its functions take a `key=`, from
          which dropout and stochastic rounding draw, see `sample`; without one they are
          deterministic. A model that takes a `key=` itself gets the same one.

        Raises:
          TypeError: it is no `Model`.
        """
        need_model(model, "t(model)", LIFT_IT)

        def init(key: Key) -> Any:
            k_params, k_attach = jax.random.split(key)
            params = model.init(k_params)
            if model.inputs is None:
                return self.attach(k_attach, params)
            return self.attach(k_attach, params, function=model.apply, inputs=model.inputs)

        lifted = [
            None if function is None else self._keyed(function)
            for function in (model.apply, model.start, model.run)
        ]
        assert lifted[0] is not None
        return Model(init, lifted[0], lifted[1], lifted[2], model.inputs)

    def attach(
        self,
        key: Key,
        params: Params,
        *,
        function: Callable[..., Any] | None = None,
        inputs: Sequence[Any] = (),
        layout: Layouts | Mapping[str, Layout] | None = None,
    ) -> Any:
        """Adds the parts to existing parameters.

        Methods work on matrices `[.., inputs, outputs]`. A leaf is read in this layout unless it is
        known what is summed over. `function` and `inputs` prove this (see `jp.weights.layout`),
        also for leaves `(out, in)`, kernels of convolutions and einsums.

        A leaf without elements does not change. The state has copies of the arrays, so either may
        be donated while the other is used. Where the parameters are not needed any more,
        `jax.jit(t.attach, donate_argnums=1)` hands their memory over instead.

        Args:
          key: random; each leaf draws from it by its path, so the order of leaves does not matter.
          params: arrays.
          function: `(params, *inputs) -> outputs`, which is traced and not run.
          inputs: arrays or shapes.
          layout: instead of both, `jp.weights.layout(function, params, *inputs)`, or layouts by
            path, for leaves of another layout.

        Returns:
          The state: `params` with `Weight`s for the leaves that were selected.

        Raises:
          TypeError: `key` is no random key, or `layout` holds no `Layout`s.
          ValueError: a member selects nothing (the message names near leaves), or a leaf that is
            not an array of two or more axes and of floats of 16 bits or more, or reparameterised
            already; two leaves have the same path; a layout does not fit its leaf.

        Warns:
          UserWarning: parts hold more numbers than their weight; `function` does not tell what is
            summed over in a leaf; a method does not do in it what it is for.

        Examples:
          >>> import jax, jax.numpy as jnp, jaxpara as jp
          >>> params = {"w": jnp.ones((300, 2, 50))}  # [out, in, in]
          >>> f = lambda params, x: jnp.einsum("bhk,ohk->bo", x, params["w"])
          >>> t, x = jp.lora(rank=1), jnp.ones((4, 2, 50))
          >>> state = t.attach(jax.random.key(0), params, function=f, inputs=(x,))
          >>> {name: part.shape for name, part in jp.weights.adapters(state)["w"].items()}
          {'a': (100, 1), 'b': (1, 300)}
        """
        arguments.need_key(key)
        layouts = given(function, params, inputs, layout)
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
            # A leaf without elements, such as a stack of no layers, has nothing to compute.
            selected = {path: leaf for path, leaf in selected.items() if jnp.size(leaf)}
            if not selected:
                continue
            found = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_weight)
            arguments.need_plain(selected, (path_of(keys) for keys, _ in found))
            leaves, axes = {}, {}
            for path, leaf in ((path_of(keys), leaf) for keys, leaf in found):
                if path in selected:
                    leaf, axes[path] = _as_matrices(path, leaf, layouts)
                    leaves[path] = resolved(Pooled(leaf, pools))
            new, made = _attached(member.method, jax.random.fold_in(key, i), leaves, axes)
            pools |= {f"{i}_{name}": pool for name, pool in made.items()}
            weights = {
                path: put_back(_without_pools(weight, f"{i}_"), axes[path])
                for path, weight in new.items()
            }
            state = jax.tree_util.tree_map_with_path(
                lambda keys, leaf, weights=weights: weights.get(path_of(keys), leaf),
                state,
                is_leaf=is_weight,
            )
        state = owned(Pooled(state, pools) if pools else state)
        told = layout is not None or function is not None
        sizes = notice.about_sizes(state, told, layouts.unknown)
        unknown = self._not_known(params, layouts) if told else []
        uses = report(function, state, *inputs).uses if function is not None else ()
        for line in notice.lines(sizes, unknown, notice.about_uses(uses, told=True)):
            notice.warn(f"attach: {line}")
        return state

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

        `jp.lift(f)(t.sample(state, key), x)` sees the same weight wherever it uses a leaf, that of
        `t.effective(t.sample(state, key))`. Train and merge the state itself.

        Args:
          state: from `attach`.
          key: random, another one for each step.

        Returns:
          The state; itself where no method draws anything.
        """
        arguments.need_key(key, "sample(state, key)")
        return sampled(state, key)

    def _not_known(self, params: Params, layouts: Layouts) -> list[notice.Notice]:
        """What is to be said of selected leaves whose layout is not known."""
        found = []
        for member in self.members:
            leaves = select(params, member.where)
            found += notice.about_layouts(member.method.name, leaves, layouts.unknown)
        return found

    def effective(self, state: Any) -> Params:
        """The dense weights: the definition of everything else here.

        Args:
          state: from `attach`.

        Returns:
          Parameters as the model knows them.
        """
        return jax.tree.map(dense, whole(state), is_leaf=is_weight)

    def penalty(self, state: Any) -> jax.Array:
        """The term that the methods add to the loss, such as the decay of pruned weights.

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
        """The mask of what is trained, for `jp.split`.

        A method that freezes does so to the leaves that it matched. A leaf of another member of a
        chain is trained as if that member were the only one. Leaves that no member matched are
        trained where no member freezes.

        Args:
          state: from `attach`.

        Returns:
          Booleans in the structure of the state; true on floating arrays only.
        """
        return trained.trainable(state)

    def merge(self, state: Any) -> Any:
        """The weights for deployment: plain arrays, or integers with their scales.

        Args:
          state: from `attach`.

        Returns:
          The tree: of arrays, which need no jaxpara, or of `Weight`s with integers, which are used
          through `lift`.

        Raises:
          ValueError: another reparameterisation attached the state; it is one part of a `split`.
        """
        arguments.need_own([member.method for member in self.members], state)
        return jax.tree.map(merged, whole(state), is_leaf=is_weight)

    def report(self, state: Any, function: Callable[..., Any], *inputs: Any) -> Report:
        """Every use of every matched leaf: by a rule, or densified.

        Args:
          state: from `attach`.
          function: of the model, lifted or not.
          inputs: arrays or shapes, as the function takes them after the parameters.

        Returns:
          The report; print it.

        Warns:
          UserWarning: a method does not do what it is for in some use: the weight is built whole,
            what it is multiplied with is not quantised, the backward pass is not sparse.
        """
        found = report(function, state, *inputs)
        for line in notice.lines(notice.about_uses(found.uses, told=_any_layout(state))):
            notice.warn(f"report: {line}")
        return found


def _selected(member: Member, params: Params) -> dict[str, Any]:
    if member.optional:
        wanted = matcher(member.where)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        if not any(wanted(path_of(keys), leaf) for keys, leaf in leaves):
            return {}
    return select(params, member.where)


def _any_layout(state: Any) -> bool:
    leaves = jax.tree.leaves(resolved(state), is_leaf=is_weight)
    return any(matrices_of(leaf)[1] is not None for leaf in leaves)


def _as_matrices(path: str, leaf: Any, layouts: Layouts) -> tuple[Any, Axes | None]:
    """A leaf of a state as `[*batch, inputs, outputs]`, and how to put it back."""
    if is_weight(leaf):
        return matrices_of(leaf)
    layout = layouts.known.get(path)
    axes = None if layout is None else axes_for(layout, jnp.shape(leaf))
    return (leaf if axes is None else in_matrices(leaf, axes)), axes


def _attached(method: Method, key: Key, leaves: Mapping[str, Any], axes: Mapping[str, Axes | None]):
    """The weights in place of leaves, and the pools of those that have parts in common."""
    if method.share is not None:
        pools, weights = method.share(method, key, leaves)
        return weights, pools
    weights = {}
    for path, leaf in leaves.items():
        own = method if axes[path] is None else without_window(method)
        assert own.init is not None
        try:
            made = own.init(own.settings, key_of(key, path), leaf)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from None
        base, kept, *of_leaf = made
        weights[path] = Weight(base, kept, of_leaf[0] if of_leaf else own)
    return weights, {}


def _without_pools(weight: Weight, prefix: str) -> Weight:
    """A new weight as a state holds it: pools by their names there, the base without any."""
    shared = tuple((part, prefix + pool) for part, pool in sorted(weight.shared))
    return dataclasses.replace(weight, base=unresolved(weight.base), shared=shared)


def reparam(method: Method, where: Where) -> Reparam:
    """The reparameterisation of one method.

    Args:
      method: how.
      where: the leaves, as for `lora`.

    Returns:
      The reparameterisation.
    """
    return Reparam((Member(method, where),))


def chain(*reparams: Reparam) -> Reparam:
    """Applies reparameterisations one after another, as the weight flows.

    `chain(lora(), fake_quant())` quantises `W + A B` (the adapter is inside the quantiser);
    `chain(fake_quant(), lora())` adapts a quantised weight, `Q(W) + A B`.

    Args:
      reparams: in order.

    Returns:
      The reparameterisation.

    Raises:
      TypeError, ValueError: one of them is no reparameterisation; none is given.

    Examples:
      >>> import jaxpara as jp
      >>> t = jp.chain(jp.nf4(), jp.lora(rank=4))  # QLoRA: Q(W) + s A B
      >>> " then ".join(member.method.name for member in t.members)
      'nf4(block=64) then lora(rank=4)'
    """
    arguments.need_reparams(reparams, Reparam)
    return Reparam(tuple(member for each in reparams for member in each.members))
