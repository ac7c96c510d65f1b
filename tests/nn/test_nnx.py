"""NNX modules as Models, and `nnx.RNN` against Flax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax

import jaxpara as jp
from jaxpara import nnx
from jaxpara.testing import check_model

SHOOTING = jp.shooting(chunks=3)
X = jax.random.normal(jax.random.key(0), (3, 7, 4))
LENGTHS = jnp.array([3, 7, 1])


def assert_close(found, wanted, tolerance=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for f, w in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (f.shape, f.dtype) == (w.shape, w.dtype)
        np.testing.assert_allclose(f, w, rtol=tolerance, atol=tolerance * np.abs(w).max())


def both(layer, x, **keywords):
    """Values, and gradients of a sum over them, in one program."""

    def run(layer, x):
        out = layer(x, **keywords)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out)), out

    (layer_grad, x_grad), out = flax.jit(flax.grad(run, argnums=(0, 1), has_aux=True))(layer, x)
    return flax.to_pure_dict(layer_grad), x_grad, out


def pair(cell, solver=SHOOTING, **fields):
    """Flax's layer and ours over equal cells."""
    theirs, ours = cell(4, 5, rngs=flax.Rngs(0)), cell(4, 5, rngs=flax.Rngs(0))
    return flax.RNN(theirs, **fields), nnx.RNN(ours, solver=solver, **fields)


def test_rnn_has_the_values_and_gradients_of_flax():
    keywords = dict(seq_lengths=LENGTHS, return_carry=True, reverse=True, keep_order=True)
    theirs, ours = pair(flax.SimpleCell)
    assert_close(both(ours, X, **keywords), both(theirs, X, **keywords))


@pytest.mark.parametrize("name", ["GRUCell", "OptimizedLSTMCell"])
def test_rnn_has_the_values_of_flax_over_other_cells(name):
    theirs, ours = pair(getattr(flax, name))
    assert_close(ours(X), theirs(X))


@pytest.mark.parametrize(
    "keywords",
    [
        {"reverse": True, "keep_order": True, "return_carry": True},
        {"time_major": True, "reverse": True, "seq_lengths": LENGTHS},
        {"seq_lengths": LENGTHS, "return_carry": True},
        {"initial_carry": jnp.ones((3, 5)), "unroll": 2},
    ],
    ids=lambda keywords: " ".join(keywords),
)
def test_every_option_means_what_it_means_in_flax(keywords):
    x = X.swapaxes(0, 1) if "time_major" in keywords else X
    fields = {k: v for k, v in keywords.items() if k not in ("seq_lengths", "initial_carry")}
    call = {k: v for k, v in keywords.items() if k not in fields}
    theirs, ours = pair(flax.SimpleCell, **fields)
    wanted = theirs(x, **call)
    assert_close(ours(x, **call), wanted)
    fields.pop("unroll", None)
    assert_close(pair(flax.SimpleCell)[1](x, **fields, **call), wanted)


@pytest.mark.parametrize("solver", [jp.newton(), jp.jacobi(), jp.sequential(), None, SHOOTING])
def test_every_solver_gives_the_same_and_the_named_one_iterates(solver, monkeypatch):
    seen = []

    def watched(*args, **keywords):
        out, info = jp.solve_scan(*args, **keywords)
        seen.append(int(info.iterations))
        return out

    monkeypatch.setattr(nnx, "newton_scan", watched)
    theirs, ours = pair(flax.SimpleCell, solver)
    assert_close(ours(X), theirs(X))
    assert seen[0] > 1 or solver in (None, jp.sequential())


def test_rnn_under_vmap_and_the_reverse_rule():
    theirs, _ = pair(flax.SimpleCell)
    cell = flax.SimpleCell(4, 5, rngs=flax.Rngs(0))
    ours = nnx.RNN(cell, solver=SHOOTING, derivative="reverse")

    def over(layer):
        return flax.vmap(lambda layer, x: layer(x), in_axes=(None, 0))(layer, jnp.stack([X, 2 * X]))

    def loss(layer):
        return jnp.sum(jnp.sin(over(layer)))

    wanted, got = (flax.to_pure_dict(flax.grad(loss)(layer)) for layer in (theirs, ours))
    assert_close(got, wanted)


class Noisy(flax.Module):
    """A cell that draws in every step, counts its steps and keeps a running mean."""

    num_feature_axes = 1

    def __init__(self, rngs):
        self.dense = flax.Linear(9, 5, rngs=rngs)
        self.dropout = flax.Dropout(0.3, rngs=rngs)
        self.steps = flax.Variable(jnp.zeros((), jnp.int32))
        self.mean = flax.BatchStat(jnp.zeros(5))

    def __call__(self, carry, x):
        h = self.dropout(jnp.tanh(self.dense(jnp.concatenate([carry, x], -1))))
        self.steps[...] += 1
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * h.mean(0)
        return h, h

    def initialize_carry(self, input_shape, rngs=None):
        return jnp.zeros((*input_shape[:-1], 5))


@pytest.mark.parametrize(("solver", "broadcast"), [(SHOOTING, None), (None, "dropout")])
def test_what_a_cell_changes_is_carried_and_written_back(solver, broadcast):
    def layer(kind, **more):
        return kind(Noisy(flax.Rngs(0, dropout=1)), broadcast_rngs=broadcast, **more)

    theirs, ours = layer(flax.RNN), layer(nnx.RNN, solver=solver)
    for _ in range(2):  # the second call goes on from what the first one wrote
        assert_close(ours(X), theirs(X))
        assert_close(
            *(flax.to_pure_dict(flax.state(m.cell, flax.BatchStat)) for m in (ours, theirs))
        )
    assert ours.cell.steps[...] == 14
    counts = [m.cell.dropout.rngs.count[...] for m in (ours, theirs)]
    assert counts[0] == counts[1]


def test_rnn_refuses_slices_of_variables_and_cells_that_grow():
    cell = flax.SimpleCell(4, 5, rngs=flax.Rngs(0))
    with pytest.raises(ValueError, match="to 0; expected nnx.Carry or None"):
        nnx.RNN(cell, state_axes=flax.StateAxes({...: 0}))

    class Growing(Noisy):
        def __call__(self, carry, x):
            self.new = flax.Variable(jnp.zeros(()))
            return carry, x

    with pytest.raises(ValueError, match="Growing adds or removes variables.*__init__"):
        nnx.RNN(Growing(flax.Rngs(0)))(X)


class Net(flax.Module):
    """A plain module with everything that is not a parameter."""

    def __init__(self, rngs):
        self.layers = flax.List([flax.Linear(4, 6, rngs=rngs), flax.Linear(6, 6, rngs=rngs)])
        self.norm = flax.BatchNorm(6, rngs=rngs)
        self.drops = flax.List([flax.Dropout(0.5, rngs=rngs), flax.Dropout(0.5, rngs=rngs)])

    def __call__(self, x):
        for layer, drop in zip(self.layers, self.drops, strict=True):
            x = drop(layer(x))
        return self.norm(x)


def test_a_module_becomes_a_model_with_its_own_parameters():
    model = nnx.from_nnx(lambda rngs: flax.Linear(4, 6, rngs=rngs))
    params = jax.jit(model.init)(jax.random.key(0))
    module = flax.Linear(4, 6, rngs=flax.Rngs(jax.random.key(0)))
    assert_close(params, flax.to_pure_dict(flax.state(module)), 1e-6)
    assert_close(jax.jit(model.apply)(params, X), module(X))
    trained = nnx.from_nnx(lambda rngs: module)  # one that is there already keeps its weights
    assert_close(trained.init(jax.random.key(5)), flax.to_pure_dict(flax.state(module)), 0)
    assert model.start is None and model.run is None


@pytest.mark.untyped
def test_a_module_in_place_of_the_function_that_makes_it_is_named():
    module = flax.Linear(4, 6, rngs=flax.Rngs(0))
    with pytest.raises(TypeError, match=r"a Linear that is made already; .* from_nnx\(lambda rngs"):
        nnx.from_nnx(module)


def test_keys_and_collections_are_ordinary_inputs_and_outputs():
    def evaluating(rngs):
        net = Net(rngs)
        net.eval()
        return net

    train = nnx.from_nnx(Net, rngs=("dropout",), mutable=("batch_stats",))
    test = nnx.from_nnx(evaluating, mutable=("batch_stats",))
    variables = train.init(jax.random.key(0))
    out, updates = jax.jit(train.apply)(variables, X, jax.random.key(1))
    assert_close(
        train.apply(variables, X, jax.random.key(1)), (out, updates)
    )  # pure: nothing is kept
    assert jnp.any(train.apply(variables, X, jax.random.key(2))[0] != out)
    after = variables | updates
    assert jnp.any(test.apply(after, X)[0] != test.apply(variables, X)[0])
    assert jax.tree.structure(test.init(jax.random.key(0))) == jax.tree.structure(after)


def test_every_layer_draws_from_its_own_fold_of_the_key():
    class Twice(flax.Module):
        def __init__(self, rngs):
            self.one, self.two = flax.Dropout(0.5, rngs=rngs), flax.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.one(x), self.two(x)

    model = nnx.from_nnx(Twice, rngs=("dropout",))
    one, two = model.apply(model.init(jax.random.key(0)), jnp.ones(64), jax.random.key(1))
    assert jnp.any(one != two)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"collections \['batch_stats'\] beside its parameters; mutable=\(\)"),
        ({"mutable": ("cache",)}, r"Name exactly these: mutable=\('batch_stats',\)"),
        ({"mutable": ("batch_stats",), "rngs": ("noise",)}, r"names \['noise'\].*does not keep"),
        ({"start": "start"}, "both start= and run="),
        ({"start": "a", "run": "b", "mutable": ("batch_stats",)}, "Leave one of them out"),
    ],
)
def test_what_from_nnx_refuses_says_what_to_change(options, message):
    with pytest.raises(ValueError, match=message):
        nnx.from_nnx(Net, **options)


def test_a_forgotten_key_or_stream_and_foreign_parameters_say_so():
    model = nnx.from_nnx(Net, rngs=("dropout",), mutable=("batch_stats",))
    variables = model.init(jax.random.key(0))
    with pytest.raises(ValueError, match="the last input must be a key"):
        model.apply(variables, X)
    silent = nnx.from_nnx(Net, mutable=("batch_stats",))
    with pytest.raises(ValueError, match=r"random streams \['default'\], which rngs=\(\) does not"):
        silent.apply(variables, X)
    del variables["params"]["norm"]["bias"]
    with pytest.raises(ValueError, match="params has no norm/bias"):
        model.apply(variables, X, jax.random.key(0))


def test_an_rnn_brings_its_state_with_it():
    def build(kind, **fields):
        return lambda rngs: kind(flax.OptimizedLSTMCell(4, 5, rngs=rngs), **fields)

    model = nnx.from_nnx(build(nnx.RNN))
    params = model.init(jax.random.key(0))
    state, first = model.run(params, model.start(params, 3, 7), X[:, :4])
    state, second = model.run(params, state, X[:, 4:])
    assert_close(jnp.concatenate([first, second], 1), model.apply(params, X))
    assert nnx.from_nnx(build(flax.RNN)).run is not None
    assert nnx.from_nnx(build(flax.RNN, reverse=True)).run is None


class Counter(flax.Module):
    """A sequence model whose state is the sum of its tokens."""

    def __init__(self, rngs):
        self.scale = flax.Param(jnp.ones(()))

    def start(self, batch_size, max_length):
        return jnp.zeros((batch_size, 1), jnp.int32)

    def run(self, state, tokens):
        sums = state + jnp.cumsum(tokens, axis=1)
        return sums[:, -1:], self.scale[...] * sums

    def __call__(self, tokens):
        return self.run(self.start(len(tokens), 0), tokens)[1]


def test_a_module_with_a_state_becomes_a_sequence_model():
    model = nnx.from_nnx(Counter, start="start", run=Counter.run)
    check_model(model, jnp.arange(10).reshape(2, 5))
