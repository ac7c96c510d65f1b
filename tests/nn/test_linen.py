"""Linen modules as Models, and `linen.RNN` against Flax's own `nn.RNN`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jaxpara as jp
from jaxpara import linen

SHOOTING = jp.shooting(chunks=3)
X = jax.random.normal(jax.random.key(0), (3, 7, 4))
LENGTHS = jnp.array([3, 7, 1])
CELLS = {
    "GRUCell": nn.GRUCell(5),
    "OptimizedLSTMCell": nn.OptimizedLSTMCell(5),
    "SimpleCell": nn.SimpleCell(5),
    "MGUCell": nn.MGUCell(5),
    "LSTMCell": nn.LSTMCell(5),
}


def assert_close(found, wanted, tolerance=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for f, w in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (f.shape, f.dtype) == (w.shape, w.dtype)
        np.testing.assert_allclose(f, w, rtol=tolerance, atol=tolerance * np.abs(w).max())


def both(layer, **keywords):
    """Values, and gradients of a sum over them, in one program."""

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def run(variables, x):
        out = layer.apply(variables, x, **keywords)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out)), out

    return run


@pytest.mark.parametrize("name", ["GRUCell", "OptimizedLSTMCell"])
def test_rnn_has_the_parameters_values_and_gradients_of_flax(name):
    keywords = dict(seq_lengths=LENGTHS, return_carry=True, reverse=True, keep_order=True)
    flax, ours = nn.RNN(CELLS[name]), linen.RNN(CELLS[name], solver=SHOOTING)
    variables = flax.init(jax.random.key(1), X)
    assert_close(ours.init(jax.random.key(1), X), variables, 0)
    assert_close(both(ours, **keywords)(variables, X), both(flax, **keywords)(variables, X))


@pytest.mark.parametrize("name", ["SimpleCell", "MGUCell", "LSTMCell"])
def test_rnn_has_the_values_of_flax_over_other_cells(name):
    flax, ours = nn.RNN(CELLS[name]), linen.RNN(CELLS[name], solver=SHOOTING)
    variables = flax.init(jax.random.key(1), X)
    assert_close(ours.apply(variables, X), flax.apply(variables, X))


def test_rnn_runs_a_convolutional_cell():
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 4, 2))
    cell = nn.ConvLSTMCell(2, (3, 3))
    variables = nn.RNN(cell).init(jax.random.key(1), x)
    out = linen.RNN(cell, solver=SHOOTING).apply(variables, x)
    assert_close(out, nn.RNN(cell).apply(variables, x))


@pytest.mark.slow
@pytest.mark.parametrize(
    "keywords",
    [
        {"reverse": True},
        {"reverse": True, "keep_order": True, "return_carry": True},
        {"time_major": True, "return_carry": True},
        {"time_major": True, "reverse": True, "keep_order": True, "seq_lengths": LENGTHS},
        {"seq_lengths": LENGTHS, "return_carry": True},
        {"initial_carry": jnp.ones((3, 5)), "unroll": 2},
    ],
    ids=lambda keywords: " ".join(keywords),
)
def test_every_option_means_what_it_means_in_flax(keywords):
    x = X.swapaxes(0, 1) if "time_major" in keywords else X
    fields = {k: v for k, v in keywords.items() if k not in ("seq_lengths", "initial_carry")}
    call = {k: v for k, v in keywords.items() if k not in fields}
    flax = nn.RNN(nn.SimpleCell(5), **fields)
    variables = flax.init(jax.random.key(1), x)
    # Once as attributes, once as arguments of the call, where Flax takes them there.
    wanted = flax.apply(variables, x, **call)
    ours = linen.RNN(nn.SimpleCell(5), solver=SHOOTING, **fields)
    assert_close(ours.apply(variables, x, **call), wanted)
    fields.pop("unroll", None)
    ours = linen.RNN(nn.SimpleCell(5), solver=SHOOTING)
    assert_close(ours.apply(variables, x, **fields, **call), wanted)


@pytest.mark.parametrize(
    ("solver", "parallel"),
    [
        (SHOOTING, True),
        (jp.newton(), True),
        (jp.quasi_newton(), True),
        (jp.jacobi(), True),
        (jp.sequential(), False),
    ],
    ids=["shooting", "newton", "quasi_newton", "jacobi", "sequential"],
)
def test_every_solver_gives_the_same_and_a_parallel_one_iterates(solver, parallel, monkeypatch):
    seen = []

    def watched(*args, **keywords):
        out, info = jp.solve_scan(*args, **keywords)
        seen.append((bool(info.converged), int(info.iterations)))
        return out

    monkeypatch.setattr(linen, "newton_scan", watched)
    cell = nn.SimpleCell(5)
    variables = nn.RNN(cell).init(jax.random.key(1), X)
    out = linen.RNN(cell, solver=solver).apply(variables, X)
    assert_close(out, nn.RNN(cell).apply(variables, X))
    ((converged, iterations),) = seen
    assert converged and (iterations > 1) == parallel


def test_rnn_under_vmap_remat_and_the_reverse_rule():
    flax = nn.RNN(nn.SimpleCell(5))
    variables = flax.init(jax.random.key(1), X)
    many = jnp.stack([X, 2 * X])
    wanted = jax.vmap(both(flax), (None, 0))(variables, many)
    ours = nn.remat(linen.RNN)(nn.SimpleCell(5), solver=SHOOTING, derivative="reverse")
    assert_close(jax.vmap(both(ours), (None, 0))(variables, many), wanted)


class Stack(nn.Module):
    """Somebody's model; the recurrent layer is an argument."""

    rnn: type = nn.RNN

    @nn.compact
    def __call__(self, x):
        x = nn.Bidirectional(self.rnn(nn.SimpleCell(3)), self.rnn(nn.SimpleCell(3)))(x)
        lifted = nn.vmap(self.rnn, variable_axes={"params": 0}, split_rngs={"params": True})
        return nn.Dense(2)(lifted(nn.SimpleCell(3))(jnp.stack([x, -x])))


@pytest.mark.slow
def test_rnn_takes_the_place_of_flax_inside_a_model():
    variables = Stack().init(jax.random.key(1), X)
    shapes = functools.partial(jax.tree.map, jnp.shape)
    assert shapes(Stack(linen.RNN).init(jax.random.key(1), X)) == shapes(variables)
    ours = Stack(functools.partial(linen.RNN, solver=jp.sequential()))
    assert_close(ours.apply(variables, X), Stack().apply(variables, X))


class Noisy(nn.RNNCellBase):
    """A cell that draws, counts its steps, keeps a trace, and reads one gain a step."""

    features: int = 5

    @nn.compact
    def __call__(self, carry, x):
        count = self.variable("count", "steps", lambda: jnp.zeros((), jnp.int32))
        gain = self.variable("gains", "gain", lambda: jnp.ones(()))
        key = self.make_rng("noise")
        h = jnp.tanh(nn.Dense(self.features)(jnp.concatenate([carry, x], -1)) * gain.value)
        h = nn.Dropout(0.3, deterministic=False)(h) + 0.1 * jax.random.normal(key, h.shape)
        self.sow("trace", "h", h.sum())
        count.value += 1
        return h, h

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], self.features))

    num_feature_axes = 1


KEYS = {name: jax.random.key(i) for i, name in enumerate(("params", "noise", "dropout"))}
SPLIT = {"params": False, "noise": True, "dropout": True}


def noisy_variables():
    """Made by the cell alone: Flax wants carried collections to be there before its scan."""
    variables = Noisy().init(KEYS, jnp.zeros((3, 5)), X[:, 0])
    variables = {name: {"cell": variables[name]} for name in ("params", "count", "gains")}
    return variables | {"gains": {"cell": {"gain": 1 + 0.1 * jnp.arange(7.0)}}}


@pytest.mark.parametrize("solver", [SHOOTING, None])
def test_collections_and_random_streams_are_those_of_flax(solver):
    config = {"variable_carry": "count", "variable_axes": {"gains": 0, "trace": 0}}
    config["split_rngs"] = SPLIT
    flax, ours = nn.RNN(Noisy(), **config), linen.RNN(Noisy(), solver=solver, **config)
    variables, mutable = noisy_variables(), ["count", "trace"]
    wanted = flax.apply(variables, X, rngs=KEYS, mutable=mutable)
    assert wanted[1]["count"]["cell"]["steps"] == 8
    assert_close(ours.apply(variables, X, rngs=KEYS, mutable=mutable), wanted)


def test_a_collection_that_changes_must_be_carried():
    shared = {"variable_broadcast": ["params", "count"], "split_rngs": SPLIT}
    ours = linen.RNN(Noisy(), variable_axes={"gains": 0, "trace": 0}, **shared)
    with pytest.raises(ValueError, match="changes the collection 'count'.*variable_carry="):
        ours.apply(noisy_variables(), X, rngs=KEYS, mutable=["count", "trace"])
    ours = linen.RNN(Noisy(), variable_axes={"gains": None}, **shared)
    with pytest.raises(ValueError, match="variable_axes maps 'gains' to None; expected the axis"):
        ours.apply(noisy_variables(), X, rngs=KEYS)


class Net(nn.Module):
    """A plain module with everything that is not a parameter."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


def test_a_module_becomes_a_model_with_its_own_parameters():
    dense = nn.Dense(3)
    model = linen.from_linen(dense, jax.ShapeDtypeStruct((2, 4), jnp.float32))
    params = model.init(jax.random.key(0))
    assert_close(params, dense.init(jax.random.key(0), X[:, 0])["params"], 0)
    assert_close(model.apply(params, X), dense.apply({"params": params}, X), 0)
    assert model.start is None and model.run is None


def test_keys_and_collections_are_ordinary_inputs_and_outputs():
    options = {"mutable": ("batch_stats",)}
    train = linen.from_linen(Net(), X, rngs=("dropout",), **options)
    test = linen.from_linen(Net(), X, **options, train=False)
    variables = train.init(jax.random.key(0))
    key = jax.random.key(1)
    out, updates = jax.jit(train.apply)(variables, X, key)
    wanted = Net().apply(variables, X, rngs={"dropout": key}, mutable=["batch_stats"])
    assert_close((out, updates), wanted)
    assert jnp.any(train.apply(variables, X, jax.random.key(2))[0] != out)
    after = variables | updates
    assert jnp.any(test.apply(after, X)[0] != test.apply(variables, X)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"collections \['batch_stats'\] beside 'params'; mutable=\(\)"),
        ({"mutable": ("cache",)}, r"Name exactly these: mutable=\('batch_stats',\)"),
        ({"mutable": ("batch_stats",)}, r"random stream that rngs=\(\) does not name"),
        ({"start": "start"}, "both start= and run="),
        ({"start": "a", "run": "b", "mutable": ("batch_stats",)}, "Leave one of them out"),
    ],
)
def test_what_from_linen_refuses_says_what_to_change(options, message):
    with pytest.raises(ValueError, match=message):
        linen.from_linen(Net(), X, **options)


@pytest.mark.untyped
def test_a_class_in_place_of_a_module_is_named():
    with pytest.raises(TypeError, match="Net'>; expected a Linen module that is made"):
        linen.from_linen(Net, X)


def test_a_forgotten_key_says_so():
    model = linen.from_linen(Net(), X, rngs=("dropout",), mutable=("batch_stats",))
    with pytest.raises(ValueError, match="the last input must be a key"):
        model.apply(model.init(jax.random.key(0)), X)


class Reader(nn.Module):
    """A language model with a state, as its author wrote it."""

    rnn: type = nn.RNN

    def setup(self):
        self.embed, self.out = nn.Embed(11, 4), nn.Dense(11)
        self.layer = self.rnn(nn.GRUCell(4))

    def start(self, batch_size, max_length):
        return self.layer.cell.initialize_carry(jax.random.key(0), (batch_size, 4))

    def run(self, state, tokens):
        state, y = self.layer(self.embed(tokens), initial_carry=state, return_carry=True)
        return state, self.out(y)

    def __call__(self, tokens):
        return self.run(self.start(tokens.shape[0], 0), tokens)[1]


TOKENS = jnp.arange(10).reshape(2, 5) % 11


def test_a_module_with_a_state_becomes_a_sequence_model_that_our_step_trains():
    model = linen.from_linen(Reader(linen.RNN), TOKENS, start="start", run=Reader.run)
    assert model.run is not None  # its laws are checked on the adapters page

    def loss(params, tokens, key):
        logits = model.apply(params, tokens[:, :-1])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
        return nats, {"loss": nats}

    optimizer = optax.adam(0.1)
    step = jax.jit(jp.train.make_step(loss, optimizer))
    state = jp.train.init_state(model, optimizer, jax.random.key(0))
    losses = []
    for _ in range(20):
        state, metrics = step(state, TOKENS)
        losses.append(metrics["loss"])
    assert losses[-1] < 0.2 * losses[0]


def test_an_rnn_brings_its_state_with_it():
    model = linen.from_linen(linen.RNN(nn.GRUCell(5)), X)
    params = model.init(jax.random.key(0))
    state, first = model.run(params, model.start(params, 3, 7), X[:, :4])
    state, second = model.run(params, state, X[:, 4:])
    assert_close(jnp.concatenate([first, second], 1), model.apply(params, X))
    assert linen.from_linen(nn.RNN(nn.GRUCell(5)), X).run is not None
    assert linen.from_linen(nn.RNN(nn.GRUCell(5), reverse=True), X).run is None
