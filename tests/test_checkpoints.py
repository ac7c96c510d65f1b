"""Checkpoints: what is written comes back, anywhere; which ones stay; which one is the best."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments import checkpoints
from experiments.runs import RunError
from jaxpara.train import init_state, make_step
from jaxpara.types import Model

BEST = ("figure", "min")
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))


def init(key):
    return {"layers": [{"w": jax.random.normal(key, (8, 16))}, {"b": jnp.zeros(8, jnp.bfloat16)}]}


MODEL = Model(init, lambda params, x: x)


def loss(params, batch, key):
    value = jnp.mean((batch + jax.random.normal(key)) @ params["layers"][0]["w"]) ** 2
    return value, {"loss": value}


def state_after(steps):
    step = jax.jit(make_step(loss, OPTIMIZER))
    state = init_state(MODEL, OPTIMIZER, jax.random.key(7))
    for _ in range(steps):
        state, _ = step(state, jnp.ones((4, 8)))
    return state


def like():
    return jax.eval_shape(lambda: init_state(MODEL, OPTIMIZER, jax.random.key(0)))


def write(folder, figures, *, keep_last=100, keep_best=0, best=BEST):
    """One checkpoint a figure, of steps 1, 2, ..."""
    state = state_after(1)
    with checkpoints.saver(folder, keep_last=keep_last, keep_best=keep_best, best=best) as save:
        for step, figure in enumerate(figures, start=1):
            params = jax.tree.map(lambda a, s=step: jnp.full_like(a, s), state.params)
            known = None if figure is None else {"figure": figure}
            save(state._replace(step=jnp.int32(step), params=params), {}, known)


def numbers(tree):
    """Leaves as NumPy arrays, keys as their data."""
    is_key = lambda a: jnp.issubdtype(a.dtype, jax.dtypes.prng_key)  # noqa: E731
    plain = jax.tree.map(lambda a: jax.random.key_data(a) if is_key(a) else a, tree)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(plain)]


def check_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(numbers(found), numbers(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with one checkpoint, and the state that it holds."""
    folder, state = tmp_path_factory.mktemp("run"), state_after(3)
    run = {"data": {"position": 3}, "memory": {"losses": [0.1, 1 / 3]}}
    with checkpoints.saver(folder, keep_last=1, keep_best=1, best=BEST) as save:
        save(state, run, {"figure": 1.5})
    return folder, state, run


def test_what_is_written_comes_back_bit_for_bit(saved):
    folder, state, run = saved
    assert checkpoints.steps(folder) == [3]
    found, known = checkpoints.restore(folder, 3, like())
    check_equal(found, state)
    assert {name: known[name] for name in run} == run and known["figures"] == {"figure": 1.5}


def test_a_state_from_one_device_goes_to_eight(saved):
    folder, state, _ = saved
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(state.params)} == {1}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        axes = PartitionSpec("data") if leaf.shape and leaf.shape[0] == 8 else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, axes))

    found, _ = checkpoints.restore(folder, 3, jax.tree.map(place, like()))
    weights = found.params["layers"][0]["w"]
    assert len(weights.devices()) == 8 and weights.addressable_shards[0].data.shape == (1, 16)
    assert found.opt_state[1][0].mu["layers"][0]["w"].addressable_shards[0].data.shape == (1, 16)
    check_equal(found, state)


def test_a_state_from_eight_devices_goes_to_one(tmp_path, saved):
    _, state, _ = saved
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.tree.map(
        lambda a: jax.device_put(a, NamedSharding(mesh, PartitionSpec("data"))), state.params
    )
    with checkpoints.saver(tmp_path, keep_last=1, keep_best=0, best=BEST) as save:
        save(state._replace(params=spread), {}, None)
    found, _ = checkpoints.restore(tmp_path, 3, like())
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(found.params)} == {1}
    check_equal(found, state)


def test_a_state_given_away_to_the_next_step_is_not_changed_on_its_way_to_disk(tmp_path):
    def init(key):
        return {"w": jnp.zeros((64, 4096))}

    bump = jax.jit(
        lambda s: s._replace(params=jax.tree.map(lambda a: a + 1, s.params), step=s.step + 1),
        donate_argnums=0,
    )
    state = init_state(Model(init, lambda p, x: x), optax.sgd(0.1), jax.random.key(0))
    shapes = jax.eval_shape(lambda: state)
    with checkpoints.saver(tmp_path, keep_last=9, keep_best=0, best=BEST) as save:
        for _ in range(3):
            state = bump(state)
            save(state, {}, None)
            for _ in range(20):  # while the checkpoint is being written
                state = bump(state)
    assert checkpoints.steps(tmp_path) == [1, 22, 43]
    for step in (1, 22, 43):
        weights = checkpoints.restore(tmp_path, step, shapes)[0].params["w"]
        assert np.unique(weights).tolist() == [step]


@pytest.mark.parametrize(
    "keep, expected",
    [
        (dict(keep_last=2), [5, 6]),
        (dict(keep_last=1, keep_best=1), [2, 6]),
        (dict(keep_last=1, keep_best=2), [2, 4, 6]),
        (dict(keep_last=1, keep_best=1, best=("figure", "max")), [1, 6]),
    ],
)
def test_the_last_and_the_best_are_kept(tmp_path, keep, expected):
    write(tmp_path, [9.0, 1.0, None, 2.0, 3.0, None], **keep)
    assert checkpoints.steps(tmp_path) == expected


def test_parameters_are_those_of_the_best_figure_or_of_the_last_step(tmp_path):
    write(tmp_path, [3.0, 1.0, float("nan"), None])
    params = like().params
    for chosen, step in (({}, 2), ({"which": "last"}, 4)):
        found = checkpoints.load_params(tmp_path, params, **chosen)
        assert {float(leaf.ravel()[0]) for leaf in jax.tree.leaves(found)} == {step}
    assert checkpoints.best_step(tmp_path) == 2


def test_parameters_are_the_last_where_nothing_was_evaluated(tmp_path):
    write(tmp_path, [None, float("nan")])
    assert checkpoints.best_step(tmp_path) is None
    found = checkpoints.load_params(tmp_path, like().params)
    assert float(found["layers"][0]["w"][0, 0]) == 2


def test_a_folder_without_a_checkpoint_is_said_to_have_none(tmp_path):
    assert checkpoints.steps(tmp_path) == [] and checkpoints.best_step(tmp_path) is None
    with pytest.raises(RunError, match="holds no checkpoint.*Give run=FOLDER of another"):
        checkpoints.load_params(tmp_path, like().params)


def test_another_shape_is_refused(saved):
    folder, *_ = saved
    wrong = jax.tree.map(lambda a: jax.ShapeDtypeStruct((3, *a.shape), a.dtype), like().params)
    with pytest.raises(ValueError, match="shape"):
        checkpoints.load_params(folder, wrong)


def test_what_was_half_written_is_no_checkpoint_and_is_removed(saved):
    folder, state, _ = saved
    half = folder / checkpoints.FOLDER / "9.orbax-checkpoint-tmp"
    half.mkdir()
    assert checkpoints.steps(folder) == [3]
    with checkpoints.saver(folder, keep_last=1, keep_best=1, best=BEST):
        assert checkpoints.steps(folder) == [3]
        deadline = time.monotonic() + 60
        while half.exists():  # Orbax removes it in a thread of its own
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_the_resume_command_can_be_pasted_into_a_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = checkpoints.resume_command(tmp_path / "runs" / "my run")
    assert command == "python -m experiments.train 'resume=runs/my run'"


def test_what_is_not_trained_is_written_once_and_comes_back_with_every_checkpoint(tmp_path):
    state = state_after(1)
    big = jnp.asarray(np.random.default_rng(0).standard_normal((512, 512)), jnp.float32)
    state = state._replace(params={"base": big, "codes": jnp.arange(9), "new": jnp.ones(3)})

    def trainable(params):
        return {"base": False, "codes": False, "new": True}

    rule = {"keep_last": 9, "keep_best": 0, "best": BEST, "trainable": trainable}
    with checkpoints.saver(tmp_path, **rule) as save:
        for step in (1, 2):
            new = {**state.params, "new": jnp.full(3, float(step))}
            save(state._replace(params=new, step=jnp.int32(step)), {}, None)
    with checkpoints.saver(tmp_path, **rule) as save:  # a run that goes on
        save(state._replace(step=jnp.int32(3)), {}, None)

    def size(path):
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())

    assert size(tmp_path / "frozen") > 2**19  # 2^20 random bytes, which nothing packs into half
    assert all(size(checkpoints.path_of(tmp_path, step)) < 2**17 for step in (1, 2, 3))
    shapes = jax.eval_shape(lambda: state)
    for step in (1, 2):
        found, _ = checkpoints.restore(tmp_path, step, shapes)
        wanted = {**state.params, "new": jnp.full(3, float(step))}
        check_equal(found, state._replace(params=wanted, step=jnp.int32(step)))
    check_equal(checkpoints.load_params(tmp_path, shapes.params), state.params)
    other = {name: leaf for name, leaf in shapes.params.items() if name != "codes"}
    with pytest.raises(ValueError, match=r"frozen has \['codes'\], and the model has not"):
        checkpoints.load_params(tmp_path, other)
