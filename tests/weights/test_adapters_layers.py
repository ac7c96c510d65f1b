"""Adapters and prefixes: their equations, gradients, and the points where methods meet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hydra import compose, initialize_config_module

import jaxpara as jp
from experiments.run import folders
from experiments.shell import build
from jaxpara import nn

KEY = jax.random.key(0)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def moved(params):
    """Parameters in float64 of which none is zero."""
    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, [normal(i, *leaf.shape) for i, leaf in enumerate(leaves)])


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def by_hand(params, x, reads):
    """The layer is `x W`; the adapter's output and its gradients for the cotangent one."""
    w = params["layer"]["kernel"]
    down, up = (params["adapter"][name]["kernel"] for name in ("down", "up"))
    h = x @ w
    source = x if reads == "input" else h
    inner = np.maximum(source @ down, 0)
    g = np.ones_like(h)
    g_up = 4.0 * inner.T @ g
    g_inner = 4.0 * g @ up.T * (inner > 0)
    through = g + (0 if reads == "input" else g_inner @ down.T)
    grads = {
        "layer": {"kernel": x.T @ through},
        "adapter": {"down": {"kernel": source.T @ g_inner}, "up": {"kernel": g_up}},
    }
    return h + 4.0 * inner @ up, grads


@pytest.mark.parametrize(
    ("make", "reads"),
    [
        (nn.parallel_adapter, "input"),
        pytest.param(nn.sequential_adapter, "output", marks=pytest.mark.slow),
    ],
)
def test_adapters_start_as_the_layer_and_follow_their_equations(make, reads, double):
    layer = nn.linear(6, 8)
    model = make(layer, nn.bottleneck(6 if reads == "input" else 8, 8, hidden=3), scale=4.0)
    params, x = model.init(KEY), normal(1, 5, 6)
    np.testing.assert_array_equal(model.apply(params, x), layer.apply(params["layer"], x))
    params = moved(params)
    out, grads = by_hand(params, x, reads)
    np.testing.assert_allclose(model.apply(params, x), out, rtol=1e-10)
    found = jax.jit(jax.grad(lambda p: jnp.sum(model.apply(p, x))))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, grads)


@pytest.mark.slow
def test_a_linear_parallel_adapter_is_lora(double):
    layer, x = nn.linear(6, 8), normal(1, 5, 6)
    thin = nn.bottleneck(6, 8, hidden=2, activation=lambda h: h)
    params = moved(nn.parallel_adapter(layer, thin, scale=1.5).init(KEY))
    t = jp.lora(rank=2, alpha=3.0)
    state = t.attach(KEY, params["layer"])["kernel"]
    names = {"a": params["adapter"]["down"]["kernel"], "b": params["adapter"]["up"]["kernel"]}
    state = {"kernel": jp.Weight(state.base, names, state.method)}
    model = nn.parallel_adapter(layer, thin, scale=1.5)
    found, ours = (
        jax.value_and_grad(lambda p, f=f: jnp.sum(jnp.sin(f(p, x))))(p)
        for f, p in ((model.apply, params), (t(layer).apply, state))
    )
    np.testing.assert_allclose(found[0], ours[0], rtol=1e-12)
    adapter, parts = found[1]["adapter"], ours[1]["kernel"].parts
    np.testing.assert_allclose(adapter["down"]["kernel"], parts["a"], rtol=1e-10)
    np.testing.assert_allclose(adapter["up"]["kernel"], parts["b"], rtol=1e-10)


@pytest.mark.slow
def test_only_what_is_marked_is_trained():
    model = nn.parallel_adapter(nn.linear(6, 8), nn.bottleneck(6, 8))
    params = model.init(KEY)
    train, frozen = jp.split(params, jp.marked(params, "adapter/**"))
    assert train["layer"]["kernel"] is None and frozen["adapter"]["up"]["kernel"] is None
    loss = lambda t: jnp.sum(model.apply(jp.combine(t, frozen), jnp.ones((2, 6))))  # noqa: E731
    grads = jax.jit(jax.grad(loss))(train)
    # The bottleneck starts at zero: its first gradient is that of the second matrix alone.
    assert not np.any(grads["adapter"]["down"]["kernel"])
    assert np.any(grads["adapter"]["up"]["kernel"])
    with pytest.raises(ValueError, match="selects none of the 3 leaves; near it are 'adapter/"):
        jp.marked(params, "adapters/*")


@pytest.mark.slow
def test_a_prefix_is_a_gated_mean_of_two_attentions(double):
    heads, size, n, time = 2, 4, 3, 5
    mixer = nn.mixers.attention(heads=heads, prefix=n)(heads * size)
    params = moved(mixer.init(KEY))
    x = normal(7, 1, time, heads * size)

    start = mixer.start(params, 1, time, jnp.float64)
    found = np.asarray(jax.jit(mixer.run)(params, start, x, None)[1]).reshape(time, heads, size)
    q, k, v = (part.reshape(time, heads, size) for part in np.split(x[0] @ params["kernel"], 3, -1))
    angle = np.arange(time)[:, None] * 10_000.0 ** -(np.arange(size // 2) / (size // 2))

    def turned(a, i):
        pairs = (a[..., : size // 2] + 1j * a[..., size // 2 :]) * np.exp(1j * angle[i])
        return np.concatenate([pairs.real, pairs.imag], -1)

    keys, values = params["prefix"]["keys"], params["prefix"]["values"]
    for i in range(time):
        for head in range(heads):
            turn = turned(q[i, head], i)
            scores = [turn @ turned(k[j, head], j) for j in range(i + 1)]
            own = np.exp(np.array(scores) / np.sqrt(size))
            scores = np.exp(keys[:, head] @ q[i, head] / np.sqrt(size))
            share = scores.sum() / (scores.sum() + own.sum())
            without, mean = (
                w @ rows[:, head] / w.sum() for w, rows in ((own, v[: i + 1]), (scores, values))
            )
            wanted = (1 - share) * without + share * mean
            np.testing.assert_allclose(found[i, head], wanted, rtol=1e-10)

    # Gradients of the prefix against finite differences.
    def loss(prefix):
        out = mixer.run({**params, "prefix": prefix}, start, x, None)[1]
        return jnp.sum(jnp.sin(out)), out

    run = jax.jit(jax.grad(loss, has_aux=True))
    grads = run(params["prefix"])[0]
    along = moved(params["prefix"])
    ahead, behind = (
        np.sum(np.sin(run(jax.tree.map(lambda p, d, h=h: p + h * d, params["prefix"], along))[1]))
        for h in (1e-5, -1e-5)
    )
    slope = sum(np.sum(g * d) for g, d in zip(*map(jax.tree.leaves, (grads, along)), strict=True))
    np.testing.assert_allclose((ahead - behind) / 2e-5, slope, rtol=1e-7)


def softmaxes(params, x, heads):
    """For each position and head the probabilities by a loop, and the values that they weigh."""
    time, size = x.shape[1], x.shape[2] // heads
    q, k, v = (part.reshape(time, heads, size) for part in np.split(x[0] @ params["kernel"], 3, -1))
    angle = np.arange(time)[:, None] * 10_000.0 ** -(np.arange(size // 2) / (size // 2))

    def turned(a, i):
        pairs = (a[..., : size // 2] + 1j * a[..., size // 2 :]) * np.exp(1j * angle[i])
        return np.concatenate([pairs.real, pairs.imag], -1)

    for i, head in np.ndindex(time, heads):
        scores = [turned(q[i, head], i) @ turned(k[j, head], j) for j in range(i + 1)]
        values = [v[j, head] for j in range(i + 1)]
        for key, value in zip(*params.get("prefix", {"k": (), "v": ()}).values(), strict=True):
            scores.append(key[head] @ q[i, head])
            values.append(value[head])
        weights = np.exp(np.array(scores) / np.sqrt(size))
        yield weights / weights.sum(), np.array(values)


@pytest.mark.parametrize("n", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_attention_on_a_grid_of_probabilities_and_its_straight_gradient(n, double):
    heads, time = 2, 5
    mixer = nn.mixers.attention(heads=heads, prefix=n, probabilities=jp.weights.unit_grid(bits=4))(
        8
    )
    params, x = moved(mixer.init(KEY)), normal(7, 1, time, 8)
    start = mixer.start(params, 1, time, jnp.float64)

    def loss(params):
        out = mixer.run(params, start, x, None)[1]
        return jnp.sum(jnp.sin(out)), out

    grads, found = jax.jit(jax.grad(loss, has_aux=True))(params)
    rounded = [np.round(weights * 15) / 15 for weights, _ in softmaxes(params, x, heads)]
    exact = [weights for weights, _ in softmaxes(params, x, heads)]
    wanted = [
        w @ values for w, (_, values) in zip(rounded, softmaxes(params, x, heads), strict=True)
    ]
    np.testing.assert_allclose(found.reshape(-1, 4), wanted, rtol=1e-10, atol=1e-12)
    assert max(np.max(np.abs(r - e)) for r, e in zip(rounded, exact, strict=True)) > 0.02

    # Of the function whose rounding errors are held the gradient is a finite difference.
    def held(params):
        pairs = zip(rounded, exact, softmaxes(params, x, heads), strict=True)
        return sum(np.sum(np.sin((w + r - e) @ values)) for r, e, (w, values) in pairs)

    step = moved(params)
    ahead, behind = (
        held(jax.tree.map(lambda p, d, h=h: p + h * d, params, step)) for h in (1e-6, -1e-6)
    )
    slope = sum(np.sum(g * d) for g, d in zip(*map(jax.tree.leaves, (grads, step)), strict=True))
    np.testing.assert_allclose((ahead - behind) / 2e-6, slope, rtol=1e-6)


MIXERS = {
    "prefix": nn.mixers.attention(heads=2, prefix=3),
    "adapted": nn.adapted_mixer(nn.mixers.attention(heads=2), hidden=3),
    "adapted behind": nn.adapted_mixer(nn.mixers.attention(heads=2), hidden=3, reads="output"),
    "grid": nn.mixers.attention(heads=2, probabilities=jp.weights.unit_grid()),
}


@pytest.mark.slow
def test_an_adapted_mixer_is_the_mixer_and_what_is_beside_or_behind_it(double):
    plain, x = nn.mixers.attention(heads=2)(8), normal(1, 2, 6, 8)
    run = jax.jit(plain.run)
    for reads in ("input", "output"):
        mixer = nn.adapted_mixer(nn.mixers.attention(heads=2), hidden=3, scale=4.0, reads=reads)(8)
        params = moved(jax.eval_shape(mixer.init, KEY))
        start = mixer.start(params, 2, 6, jnp.float64)
        state, h = run(params["layer"], start, x, None)
        kept, found = jax.jit(mixer.run)(params, start, x, None)
        jax.tree.map(np.testing.assert_array_equal, kept, state)
        down, up = (params["adapter"][name]["kernel"] for name in ("down", "up"))
        source = x if reads == "input" else np.asarray(h)
        wanted = h + 4.0 * np.maximum(source @ down, 0) @ up
        np.testing.assert_allclose(found, wanted, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
def test_mixers_with_adapters_run_in_pieces_and_forget_at_a_reset(name, double):
    mixer = MIXERS[name](8)
    params, x = moved(mixer.init(KEY)), normal(1, 2, 6, 8)
    run = jax.jit(mixer.run)

    def pieces(reset, *sizes):
        state, out, begin = mixer.start(params, 2, 6, jnp.float64), [], 0
        for size in sizes:
            part = slice(begin, begin + size)
            state, y = run(params, state, x[:, part], reset[:, part])
            out, begin = [*out, y], begin + size
        return np.concatenate(out, axis=1)

    none = np.zeros((2, 6), bool)
    np.testing.assert_allclose(pieces(none, 6), pieces(none, 2, 1, 3), rtol=1e-10)
    # A document after a reset is the document alone: it sees the prefix from no position.
    restart = none.copy()
    restart[:, 2] = True
    alone, state = none[:, 2:], mixer.start(params, 2, 6, jnp.float64)
    np.testing.assert_allclose(
        pieces(restart, 6)[:, 2:], run(params, state, x[:, 2:], alone)[1], rtol=1e-9
    )


def test_an_adapted_mlp_is_the_mlp_and_what_is_beside_or_behind_it(double):
    mlp, x = nn.swiglu(6, 4), normal(0, 5, 6)
    for reads in ("input", "output"):
        model = nn.adapted_mlp(hidden=3, reads=reads, biases=True)(mlp, 6)
        start = model.init(KEY)
        np.testing.assert_array_equal(model.apply(start, x), mlp.apply(start["layer"], x))
        params = moved(start)
        h = np.asarray(mlp.apply(params["layer"], x))
        down, up = params["adapter"]["down"], params["adapter"]["up"]
        source = x if reads == "input" else h
        inner = np.maximum(source @ down["kernel"] + down["bias"], 0)
        wanted = h + 4.0 * (inner @ up["kernel"] + up["bias"])
        np.testing.assert_allclose(model.apply(params, x), wanted, rtol=1e-12)
    assert "bias" not in nn.adapted_mlp()(mlp, 6).init(KEY)["adapter"]["up"]
    with pytest.raises(ValueError, match="reads='both': give 'input' .* or 'output'"):
        nn.adapted_mlp(reads="both")


def test_the_mam_adapter_is_a_prefix_at_the_attention_and_an_adapter_at_the_mlp():
    make = nn.mixers.attention
    tokens = np.arange(10).reshape(2, 5)
    plain = nn.decoder(11, 8, 2, mixer=make(heads=2, prefix=3))
    mam = nn.decoder(11, 8, 2, mixer=make(heads=2, prefix=3), mlp_adapter=nn.adapted_mlp(hidden=4))
    params = jax.jit(mam.init)(KEY)
    mask = jp.marked(params, lambda path, leaf: "adapter" in path or "prefix" in path)
    train, frozen = jp.split(params, mask)
    (block,) = params["blocks"]
    bare = {**params, "blocks": ({**block, "mlp": block["mlp"]["layer"]},)}
    found, wanted = jax.jit(mam.apply)(params, tokens), jax.jit(plain.apply)(bare, tokens)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    loss = lambda train: jnp.sum(mam.apply(jp.combine(train, frozen), tokens) ** 2)  # noqa: E731
    grads = {
        jp.tree.path_of(k): g for k, g in jax.tree_util.tree_leaves_with_path(jax.grad(loss)(train))
    }
    assert np.any(grads["blocks/0/mlp/adapter/up/kernel"] != 0)
    assert len(jax.tree.leaves(train)) < len(jax.tree.leaves(frozen))


def test_a_decoder_takes_them_and_computes_in_its_dtype():
    for mixer in MIXERS.values():
        model = nn.decoder(11, 8, 2, mixer=mixer, compute_dtype=jnp.bfloat16)
        params, tokens = jax.eval_shape(model.init, KEY), np.arange(10).reshape(2, 5)
        state = jax.eval_shape(lambda p, m=model: m.start(p, 2, 5), params)
        kept, logits = jax.eval_shape(model.run, params, state, tokens)
        assert kept == state and logits.shape == (2, 5, 11)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="prefix=-1: give the number of trained keys"):
        nn.mixers.attention(prefix=-1)(8)
    with pytest.raises(ValueError, match="reads='both': give 'input' .* or 'output'"):
        nn.adapted_mixer(nn.mixers.attention(), reads="both")


CONFIGS = sorted((folders.REPOSITORY / "experiments/conf/mixer").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in CONFIGS])
def test_every_mixer_of_the_configs_makes_a_model(name):
    with initialize_config_module("experiments.conf", version_base="1.3"):
        cfg = compose("train", [f"mixer={name}", "model.width=32", "model.layers=3"])
    model = build.build_model(cfg)
    params = jax.eval_shape(model.init, KEY)
    tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    assert jax.eval_shape(model.apply, params, tokens).shape[:2] == (2, 5)
    paths = " ".join(jp.tree.path_of(k) for k, _ in jax.tree_util.tree_leaves_with_path(params))
    assert ("adapter" in paths) == ("adapted" in name) and ("prefix" in paths) == ("prefix" in name)
