"""Checkpoints: what is written comes back, anywhere; which ones stay; which one is the best."""

import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxpara as jp
from experiments.adapt import adapter_files
from experiments.inject.injection import flip
from experiments.run import checkpoints, seals
from experiments.run.folders import RunError
from experiments.run.seals import Damaged
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


def test_a_donated_state_is_saved_unchanged(tmp_path):
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
    told = r"does not fit what config.yaml .*shape(.|\n)*put back the config.yaml"
    with pytest.raises(RunError, match=told):
        checkpoints.load_params(folder, wrong)
    narrow = like()._replace(params=jax.tree.map(lambda a: a.update(shape=(3,)), like().params))
    with pytest.raises(RunError, match=told):
        checkpoints.restore_newest(folder, narrow)


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


def test_frozen_parameters_are_written_once_and_restored_with_every_checkpoint(tmp_path):
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
    with pytest.raises(ValueError, match=r"frozen has \['codes'\], which the model lacks"):
        checkpoints.load_params(tmp_path, other)


def largest(folder):
    """Of the files in it: where the numbers are."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def copied(saved, tmp_path, name="run"):
    shutil.copytree(saved[0], tmp_path / name)
    return tmp_path / name


def test_a_flipped_bit_anywhere_is_refused_with_the_damaged_name(tmp_path, saved):
    folder = copied(saved, tmp_path)
    checkpoints.restore(folder, 3, like())
    step = checkpoints.path_of(folder, 3)
    files = [path for path in sorted(step.rglob("*")) if path.is_file() and path.stat().st_size]
    assert len(files) > 10 and {"run", "params", "rest", "metrics"} < {
        p.name for p in step.iterdir()
    }
    rng = np.random.default_rng(0)
    for file in files:
        whole = file.read_bytes()
        flip(file, rng)
        assert file.read_bytes() != whole
        with pytest.raises(Damaged) as caught:
            checkpoints.restore(folder, 3, like())
        assert str(file) in str(caught.value)
        with pytest.raises(Damaged, match=f"{file.name} is .*no other checkpoint is intact"):
            checkpoints.restore_newest(folder, like())
        file.write_bytes(whole)
    checkpoints.restore(folder, 3, like())


@pytest.mark.parametrize("harm", ["cut", "gone", "more", "unsealed"])
def test_a_step_that_is_not_whole_is_refused(tmp_path, saved, harm):
    folder = copied(saved, tmp_path)
    step = checkpoints.path_of(folder, 3)
    file = next(path for path in sorted((step / "params").rglob("*")) if path.stat().st_size > 50)
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    if harm == "gone":
        file.unlink()
    if harm == "more":
        file = step / "params" / "of another"
        file.write_text("")
    if harm == "unsealed":
        file = step / seals.SEAL
        file.unlink()
    said = {"cut": "is damaged", "gone": "is missing", "more": "not written with the rest"}
    with pytest.raises(Damaged, match=f"{file.name} .*{said.get(harm, 'is missing')}"):
        checkpoints.restore(folder, 3, like())


def test_a_changed_array_is_named_under_intact_seals(tmp_path):
    write(tmp_path, [1.0, 2.0])
    one, two = (checkpoints.path_of(tmp_path, step) for step in (1, 2))
    shutil.rmtree(one / "params")
    shutil.copytree(two / "params", one / "params")
    seals.seal(one)
    with pytest.raises(Damaged, match=r"1/params: the array \['layers'\]\[.*\] is damaged"):
        checkpoints.restore(tmp_path, 1, like())
    with pytest.raises(Damaged, match=r"1/params: the array"):
        checkpoints.load_params(tmp_path, like().params)  # the best one; 2 is read instead
        checkpoints.restore(tmp_path, 1, like())
    checkpoints.restore(tmp_path, 2, like())


def test_a_damaged_checkpoint_falls_back_to_the_newest_whole_one_in_one_line(tmp_path, capsys):
    write(tmp_path, [3.0, 1.0, 2.0])
    rng = np.random.default_rng(1)

    def damage(step):
        path = checkpoints.path_of(tmp_path, step) / "params"
        flip(largest(path), rng)

    def first(params):
        return float(params["layers"][0]["w"][0, 0])

    assert first(checkpoints.load_params(tmp_path, like().params)) == 2, "the best"
    assert capsys.readouterr().err == ""
    damage(2)
    assert first(checkpoints.load_params(tmp_path, like().params)) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "2/params" in said
    assert said.endswith("is not what was written; the checkpoint of step 3 is read instead\n")
    damage(3)
    state, _ = checkpoints.restore_newest(tmp_path, like())
    assert int(state.step) == 1 and "step 1 is read instead" in capsys.readouterr().err
    with checkpoints.saver(tmp_path, keep_last=9, keep_best=0, best=BEST, begin=1) as save:
        said = capsys.readouterr().err
        assert "checkpoint 2 is moved to" in said and "checkpoint 3 is moved to" in said
        save(state._replace(step=jnp.int32(2)), {}, None)
    assert checkpoints.steps(tmp_path) == [1, 2]
    assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == ["2", "3"]
    damage(1), damage(2)
    with pytest.raises(Damaged, match="Restore the run.s folder from a copy, or start a new"):
        checkpoints.restore_newest(tmp_path, like())


def test_later_checkpoints_than_the_one_that_is_continued_make_room(tmp_path, capsys):
    write(tmp_path, [3.0, 1.0, 2.0])
    with checkpoints.saver(tmp_path, keep_last=9, keep_best=0, best=BEST, begin=2):
        assert checkpoints.steps(tmp_path) == [1, 2]
    assert "is later than step 2, from which the run continues" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a[1]", "a*b?", "back\\slash", "50% of ü", "x=1", "{\udcff}"])
def test_a_run_under_any_path_is_written_and_read(tmp_path, saved, name):
    folder, state = tmp_path / name, saved[1]
    (tmp_path / "a1").mkdir()
    with checkpoints.saver(folder, keep_last=1, keep_best=0, best=BEST) as save:
        save(state, {}, None)
    assert checkpoints.steps(folder) == [3] and list((tmp_path / "a1").iterdir()) == []
    check_equal(checkpoints.restore(folder, 3, like())[0], state)
    check_equal(checkpoints.load_params(folder, like().params), state.params)


def test_what_is_frozen_and_adapters_are_checked_too(tmp_path):
    state = state_after(1)._replace(params={"base": jnp.ones((8, 8)), "new": jnp.ones(3)})
    rule = {"keep_last": 9, "keep_best": 0, "best": BEST}
    trainable = lambda params: {"base": False, "new": True}  # noqa: E731
    with checkpoints.saver(tmp_path, **rule, trainable=trainable) as save:
        save(state, {}, None)
    shapes = jax.eval_shape(lambda: state)
    checkpoints.load_params(tmp_path, shapes.params)
    adapted = jp.lora(rank=2).attach(jax.random.key(0), {"kernel": jnp.ones((8, 8))})
    assert adapter_files.save(tmp_path, adapted) and adapter_files.load(tmp_path)
    for place, read in (
        ("frozen", lambda: checkpoints.load_params(tmp_path, shapes.params)),
        ("frozen", lambda: checkpoints.restore(tmp_path, 1, shapes)),
        ("adapters", lambda: adapter_files.load(tmp_path)),
    ):
        file = largest(tmp_path / place)
        whole = file.read_bytes()
        flip(file, np.random.default_rng(2))
        with pytest.raises(Damaged, match=f"{place}/.*{file.name} is damaged"):
            read()
        file.write_bytes(whole)
        read()


def test_a_checkpoint_that_a_training_process_removes_while_it_is_read_is_passed_over(
    tmp_path, monkeypatch, capsys
):
    write(tmp_path, [1.0, 2.0, 3.0])
    read = checkpoints.read_items

    def remove_first(path, **what):
        if path.name == "1" and "params" in what:
            shutil.rmtree(path)
        return read(path, **what)

    monkeypatch.setattr(checkpoints, "read_items", remove_first)
    params = checkpoints.load_params(tmp_path, like().params)  # 1 is the best
    assert float(params["layers"][0]["w"][0, 0]) == 3
    assert "checkpoints/1 is gone: the run is training" in capsys.readouterr().err
