"""Other people's implementations of the same recurrence, each behind its own import.

Each computes the same function as `lax.scan`, with the same weights, so its values and gradients
can be checked. A rival that is not installed, or that cannot express the cell, says so.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxpara as jp
from experiments.contest import published
from experiments.contest.recurrence_problem import Problem, both_passes
from experiments.contest.timing import Prepared, prepare


class Rival(NamedTuple):
    """One pass of a rival, ready to be timed.

    Attributes:
      prepared: the call.
      canonical: from what the call returns to outputs, or outputs and gradients of
        `(params, init, gates)`; not timed.
    """

    prepared: Prepared
    canonical: Callable[[Any], Any]


class CannotRun(Exception):
    """Says why a rival has no row; its text goes into the table."""


def _gru_weights(problem: Problem) -> tuple[jax.Array, jax.Array, jax.Array]:
    recurrent = problem.params["recurrent"]
    if set(recurrent) != {"update", "reset", "candidate"}:
        raise CannotRun("only the para_gru cell is written for it")
    return recurrent["update"], recurrent["reset"], recurrent["candidate"]


def _split(x: Any) -> tuple[Any, ...]:
    return tuple(jnp.split(jnp.asarray(x), 3, axis=-1))


def flax_rnn(problem: Problem, which: str) -> Rival:
    """Flax's `nn.RNN` over a cell with the problem's step; the gates are one array, as it needs."""
    try:
        import flax.linen as nn
    except ImportError:
        raise CannotRun("not installed") from None

    splits, step = len(problem.gates), problem.step

    class Cell(nn.RNNCellBase):
        recurrent: Any

        @nn.compact
        def __call__(self, carry, x):
            # A parameter, as in any Flax cell: gradients then run through Flax's own scan.
            params = self.param("recurrent", lambda _: dict(self.recurrent))
            return step({"recurrent": params}, carry, tuple(jnp.split(x, splits, axis=-1)))

        def initialize_carry(self, rng, input_shape):
            return problem.init

        @property
        def num_feature_axes(self):
            return 1

    layer = nn.RNN(Cell(problem.params["recurrent"]), time_major=True)
    gates = jnp.concatenate(problem.gates, axis=-1)

    def solve(params, init, gates):
        return layer.apply({"params": {"cell": params}}, gates, initial_carry=init)

    def canonical(out):
        if which == "forward":
            return out
        ys, (params, init, gates) = out
        return ys, (params, init, tuple(jnp.split(gates, splits, axis=-1)))

    function = both_passes(solve)[which]
    prepared = prepare(function, problem.params, problem.init, gates, problem.cotangent)
    return Rival(prepared, canonical)


def deer(problem: Problem, which: str) -> Rival:
    """The DEER package's `seq1d`, one sequence in a vmap lane, with its dense Jacobians."""
    try:
        from deer import seq1d  # another package on the index has the same name
    except ImportError:
        raise CannotRun("not installed") from None
    if not isinstance(problem.init, jax.Array):
        raise CannotRun("it solves for one array, and this cell's carry is a tuple")
    gigabytes = problem.cotangent.size * problem.init.shape[-1] * 4 / 1e9
    if gigabytes > 2:
        raise CannotRun(f"its dense Jacobians would take {gigabytes:.0f} GB")

    def solve(params, init, gates):
        def one(y0, x):
            return seq1d(lambda y, x_t, p: problem.step(p, y, x_t)[0], y0, x, params).value

        return jax.vmap(one, in_axes=(0, 1), out_axes=1)(init, gates)  # this cell's output is y

    return Rival(prepare(both_passes(solve)[which], *problem[1:]), lambda out: out)


def published_method(name: str, problem: Problem, which: str) -> Rival:
    """Our implementation of a published method, see `published`, one sequence in a vmap lane.

    It stops where no state, of order 1, changes by more than 1e-6; our own solvers stop where the
    next correction is below 1e-5, and apply it.
    """
    if not isinstance(problem.init, jax.Array):
        raise CannotRun("it solves for one array, and this cell's carry is a tuple")
    first = jax.tree.map(lambda x: x[0, 0], problem.gates)
    structure = jp.jacobian_structure(
        lambda h, x: problem.step(problem.params, h, x), problem.init[0], first
    )
    if name == "deer" or not isinstance(structure, jp.structure.Diagonal):
        gigabytes = 5 * problem.cotangent.size * problem.init.shape[-1] * 4 / 1e9
        if gigabytes > 16:
            raise CannotRun(f"its dense Jacobians would take {gigabytes:.0f} GB")
    options = (name, isinstance(structure, jp.structure.Diagonal), 1e-6, 1e-8, 100)

    def solve(params, init, gates):
        def one(h0, x):
            return published.solve(
                lambda p, h, x_t: problem.step(p, h, x_t)[0], options, params, h0, x
            )

        return jax.vmap(one, in_axes=(0, 1), out_axes=1)(init, gates)  # this cell's output is h

    return Rival(prepare(both_passes(solve)[which], *problem[1:]), lambda out: out)


def _torch_rival(problem: Problem, which: str, run: Callable[..., Any], leaves: Any) -> Rival:
    """Times `run(*leaves)` in torch, backward included where asked."""
    import torch

    cotangent = torch.from_numpy(np.array(problem.cotangent))

    def forward():
        with torch.no_grad():
            return run(*leaves)

    def forward_backward():
        for leaf in leaves:
            leaf.grad = None
        ys = run(*leaves)
        ys.backward(cotangent)
        return ys.detach(), [leaf.grad for leaf in leaves]

    call = forward if which == "forward" else forward_backward
    began = time.perf_counter()
    call()
    return Rival(Prepared(call, time.perf_counter() - began), lambda out: out)


def torch_gru(problem: Problem, which: str) -> Rival:
    """`torch.nn.GRU` with this cell's weights on the diagonals of its dense matrices.

    Its update gate is one minus ours, hence the signs. It does dense products where the cell has
    elementwise ones, because it cannot express these.
    """
    update, reset, candidate = (np.array(w) for w in _gru_weights(problem))
    try:
        import torch
    except ImportError:
        raise CannotRun("not installed") from None

    state = update.shape[0]
    layer = torch.nn.GRU(3 * state, state, bias=False)
    eye, zero = np.eye(state, dtype=np.float32), np.zeros((state, state), np.float32)
    with torch.no_grad():
        # rows: reset, update, candidate; columns: the gates as (update, reset, candidate)
        layer.weight_ih_l0.copy_(
            torch.from_numpy(np.block([[zero, eye, zero], [-eye, zero, zero], [zero, zero, eye]]))
        )
        layer.weight_hh_l0.copy_(
            torch.from_numpy(np.concatenate([np.diag(reset), np.diag(-update), np.diag(candidate)]))
        )
    gates = torch.from_numpy(np.array(jnp.concatenate(problem.gates, axis=-1))).requires_grad_()
    init = torch.from_numpy(np.array(problem.init)).requires_grad_()
    rival = _torch_rival(
        problem,
        which,
        lambda gates, init, _: layer(gates, init[None])[0],
        [gates, init, layer.weight_hh_l0],
    )

    def canonical(out):
        if which == "forward":
            return out.numpy()
        ys, (d_gates, d_init, d_weights) = out
        r, z, n = (np.diagonal(x) for x in np.split(d_weights.numpy(), 3))
        params = {"recurrent": {"update": -z, "reset": r, "candidate": n}}
        return ys.numpy(), (params, d_init.numpy(), _split(d_gates.numpy()))

    return rival._replace(canonical=canonical)


def pararnn_torch(problem: Problem, which: str) -> Rival:
    """The pararnn-torch package's Newton solve of this cell, to a residual of 1e-6."""
    weights = [np.array(w) for w in _gru_weights(problem)]
    try:
        import torch
        from pararnn import NewtonConfig, newton_apply
    except ImportError as error:
        raise CannotRun(f"not installed ({error.name} is missing)") from None

    class Cell(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden_size = self.d_h = len(weights[0])
            self.weights = torch.nn.ParameterList(torch.from_numpy(w) for w in weights)

        def step(self, h, x):
            update, reset, candidate = self.weights
            x_z, x_r, x_n = x.chunk(3, dim=-1)
            z = torch.sigmoid(x_z + update * h)
            n = torch.tanh(x_n + candidate * (torch.sigmoid(x_r + reset * h) * h))
            return h + z * (n - h)

    cell, config = Cell(), NewtonConfig(max_iters=12, residual_atol=1e-6)
    joined = np.array(jnp.concatenate(problem.gates, axis=-1))
    gates = torch.from_numpy(np.swapaxes(joined, 0, 1).copy()).requires_grad_()
    init = torch.from_numpy(np.array(problem.init)).requires_grad_()
    rival = _torch_rival(
        problem,
        which,
        lambda gates, init, *_: newton_apply(cell, gates, config, h0=init).transpose(0, 1),
        [gates, init, *cell.weights],
    )

    def canonical(out):
        if which == "forward":
            return out.numpy()
        ys, (d_gates, d_init, *d_weights) = out
        names = ("update", "reset", "candidate")
        params = {"recurrent": {n: d.numpy() for n, d in zip(names, d_weights, strict=True)}}
        return ys.numpy(), (params, d_init.numpy(), _split(d_gates.numpy().swapaxes(0, 1)))

    return rival._replace(canonical=canonical)


RIVALS: dict[str, Callable[[Problem, str], Rival]] = {
    "flax nn.RNN": flax_rnn,
    "torch nn.GRU": torch_gru,
    "deer": deer,
    "deer's method": functools.partial(published_method, "deer"),
    "quasi-deer's method": functools.partial(published_method, "quasi_deer"),
    "elk's method": functools.partial(published_method, "elk"),
    "pararnn-torch": pararnn_torch,
}
