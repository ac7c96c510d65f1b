"""Sizes of every public function: whole numbers, from Python or NumPy, and no booleans."""

import importlib
import inspect

import jax
import numpy as np
import optax
import pytest

import jaxpara as jp
from experiments.run.names import PUBLIC
from jaxpara.nn import mixers
from jaxpara.sizes import finite, needed, positive, whole

# Parameters that lax.scan has too, whose rules they keep.
SCAN = ("length", "unroll", "reverse")
# What a function needs besides the size that is tried.
GIVEN = {
    "accumulate": 1,
    "features": 4,
    "heads": 1,
    "hidden": 4,
    "layers": 1,
    "learning_rate": 0.1,
    "loss": lambda params, batch, key: (0.0, {}),
    "mixer": mixers.attention(heads=1),
    "mlp_hidden": 4,
    "optimizer": optax.sgd(0.1),
    "outputs": 4,
    "scale": np.ones((1, 1, 4), np.float32),
    "steps": 3,
    "taps": 2,
    "values": np.ones((4, 4), np.int8),
    "vocab_size": 4,
    "width": 4,
}
# What takes the size only when it is called.
CALLED = {
    "attention": lambda made: made(4),
    "recurrent": lambda made: made(4),
    "adapted_mixer": lambda made: made(4),
}


def modules():
    for name in PUBLIC:
        try:
            yield importlib.import_module(name)
        except ImportError:  # jaxpara.cells and jaxpara.structure are attributes; Flax is optional
            found = getattr(jp, name.rpartition(".")[2], None)
            if found is not None:
                yield found


def parameters_of(*kinds):
    """(function, parameter) of every public function that takes one of these types."""
    found = {}
    for module in modules():
        for name in getattr(module, "__all__", None) or vars(module):
            thing = getattr(module, name)
            home = getattr(thing, "__module__", "") or ""
            own = hasattr(module, "__path__") or home == module.__name__
            if not (
                inspect.isfunction(thing) and home.startswith("jaxpara") and own
            ) or name.startswith("_"):
                continue
            for key, parameter in inspect.signature(thing).parameters.items():
                if parameter.annotation in kinds and key not in SCAN:
                    found[f"{name}.{key}"] = (thing, key)
    return found


SIZES = parameters_of(int, int | None)
SWITCHES = parameters_of(bool)


def call(function, **given):
    """A public function with what it needs beside `given`, called where only that looks."""
    parameters = inspect.signature(function).parameters.values()
    needs = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    known = {**GIVEN, "cell": jp.cells.para_gru}
    made = function(**{one: known[one] for one in needs if one in known} | given)
    return CALLED.get(function.__name__, lambda made: made)(made)


def test_the_tables_find_sizes_and_switches():
    assert {"lora.rank", "shooting.chunks", "decoder.width", "para_gru.hidden"} <= set(SIZES)
    assert len(SIZES) > 60
    assert {"lora.rank_stabilised", "shooting.debug", "decoder.tied", "lsq.full"} <= set(SWITCHES)


@pytest.mark.untyped
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("wrong", [True, 1.5])
def test_no_size_is_a_boolean_a_fraction_or_a_text(name, wrong):
    function, key = SIZES[name]
    with pytest.raises(ValueError, match=f"{key}=.*: give a whole number"):
        call(function, **{key: wrong})


@pytest.mark.untyped
def test_sizes_are_integers_of_python_whatever_they_were():
    for given in (3, np.int8(3), np.uint64(3), jax.numpy.int32(3)):
        assert type(whole(rank=given)) is int and needed(rank=given) == 3
        positive(rank=given)
    assert whole(group=None) is None
    for wrong in (True, np.True_, jax.numpy.array(True), 3.0, "3", [3]):
        with pytest.raises(ValueError, match="rank=.*: give a whole number"):
            whole(rank=wrong)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"rank={wrong}: give a whole number, at least 1"):
            positive(rank=wrong)


@pytest.mark.untyped
@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_a_boolean_and_no_text(name):
    # What `affine=no` is on a command line: a text, and so true.
    function, key = SWITCHES[name]
    assert "np.True_" not in repr(call(function, **{key: np.True_}))  # it is Python's own
    for wrong in ("no", 1, None):
        with pytest.raises(ValueError, match=f"{key}={wrong!r}: give True or False"):
            call(function, **{key: wrong})


@pytest.mark.untyped
@pytest.mark.parametrize("wrong", [True, "1", None, float("nan"), float("inf"), [1.0]])
def test_a_number_is_finite_and_no_boolean(wrong):
    with pytest.raises(ValueError, match="alpha=.*: give a finite number"):
        finite(alpha=wrong)
    for refused in (
        lambda: jp.sparse_nm(decay=wrong),
        lambda: jp.lora(dropout=wrong),
        lambda: jp.easy_quant(sigmas=wrong),
        lambda: jp.train.optimizer(steps=3, learning_rate=wrong),
        lambda: jp.train.schedule(0.1, 3, warmup=wrong),
    ):
        with pytest.raises(ValueError, match="give a finite number"):
            refused()
