"""Finished runs judged again: several at once, on their own text or on other text."""

import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omegaconf import OmegaConf

from experiments import evaluate
from experiments.data.windows import evenly_spaced
from experiments.run import checkpoints
from experiments.shell.build import build_data, build_model
from tests.experiments.saved_run import EVALUATION, MODEL, call, save_run


def source(root):
    loader = {"_target_": "experiments.data.stdlib.load", "root": str(root), "tokenizer": None}
    return {**loader, "validation_fraction": 0.2, "seed": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two texts, and three runs: a and b on one text, c on the other."""
    place = tmp_path_factory.mktemp("place")
    for text in ("one", "two"):
        (place / text).mkdir()
        for i in range(5):
            (place / text / f"{i}.py").write_text(f"{text}_{i} = [{i}, 'x']\n" * 20)
    (place / "lm").mkdir()
    for seed, (run, text) in enumerate({"a": "one", "b": "one", "c": "two"}.items()):
        save_run(place / "lm" / run, data=source(place / text), seed=seed)
    return place


def scored(shown):
    """Bits per byte by the first column of the tables that were printed."""
    rows = re.findall(r"^│ (\S[^│]*?) *│ +([\d.]+) │$", shown, re.M)
    return {name: float(bits) for name, bits in rows}


def test_a_list_of_runs_is_judged_on_the_same_windows_beside_compressors(place, capsys):
    assert call(evaluate, place, "run=[lm/a,lm/b]", "trust=.") is None
    shown = capsys.readouterr().out
    bits = scored(shown)
    assert set(bits) == {"lm/a", "lm/b", "unigram", "gzip -9", "xz -9e"}
    assert shown.count("Bits per byte on 6 windows of 16 bytes") == 1
    assert bits["lm/a"] > 4 and bits["lm/a"] != bits["lm/b"]


def test_runs_that_cannot_be_scored_are_left_out_by_name(place, tmp_path, capsys):
    shutil.copytree(place / "lm" / "a", tmp_path / "a")
    for name in ("b", "c"):
        shutil.copytree(place / "lm" / "b", tmp_path / name)
    shutil.rmtree(tmp_path / "b" / checkpoints.FOLDER)  # as a run that diverged at once
    (tmp_path / "c" / "config.yaml").write_text("steps: 1\n")
    common = (f"trust={place}/one", "windows=1")
    assert call(evaluate, tmp_path, "run=[b,a,c]", *common) is None
    shown = capsys.readouterr().out
    assert set(scored(shown)) >= {"a"} and not {"b", "c"} & set(scored(shown))
    assert "left out: b: b holds no checkpoint" in shown and shown.count("left out: c: ") == 1
    shutil.copytree(tmp_path / "a", tmp_path / "d")
    said = call(evaluate, tmp_path, "run=[a,d]", *common, "length=100000")
    shown = capsys.readouterr().out
    assert "no run could be scored" in said and "a window of 100000" in shown
    assert shown.count("left out: a: ") == shown.count("left out: d: ") == 1
    assert "no run could be scored" in call(evaluate, tmp_path, "run=[b,c]", *common)
    assert "b holds no checkpoint" in call(evaluate, tmp_path, "run=b", *common)


@pytest.mark.slow
def test_runs_on_different_text_get_a_table_each(place, capsys):
    assert call(evaluate, place, "run=lm/*", "windows=3", "trust=[./one,./two]") is None
    shown = capsys.readouterr().out
    assert shown.count("Bits per byte on 3 windows of 16 bytes") == 2
    assert {"lm/a", "lm/b", "lm/c"} < set(scored(shown))


def test_other_text_is_read_in_place_of_the_runs_own(place, capsys):
    other = ("data=stdlib", f"data.root={place}/two", "data.validation_fraction=0.2")
    assert call(evaluate, place, "run=lm/a", *other) is None
    [first] = [bits for name, bits in scored(capsys.readouterr().out).items() if name == "lm/a"]
    # Slowly: the held-out file of the other text, its windows, float64.
    assert call(evaluate, place, "run=lm/c", "trust=./two") is None
    assert f"{place}/two" in capsys.readouterr().out

    text = build_data(OmegaConf.create({"data": source(place / "two")})).validation
    cut = evenly_spaced(text, count=EVALUATION["windows"], length=EVALUATION["length"])
    model = build_model(OmegaConf.create({"model": MODEL}))
    params = checkpoints.load_params(
        place / "lm" / "a", jax.eval_shape(model.init, jax.random.key(0))
    )
    logits = np.asarray(model.apply(params, jnp.asarray(cut[:, :-1], jnp.int32)), np.float64)
    chosen = np.take_along_axis(logits, cut[:, 1:, None].astype(int), -1)[..., 0]
    nats = np.log(np.exp(logits).sum(-1)) - chosen
    assert first == pytest.approx(nats.mean() / math.log(2), abs=6e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run=[lm/a,gone]"], "error: runs: 'gone': no such folder"),
        (["run=gone*"], r"error: runs: 'gone\*': no such folder"),
        (["run=lm"], "error: run='lm' holds no config.yaml.*; it holds runs: .* run=lm/a$"),
        (
            ["run=lm/a", "length=100000", "trust=."],
            r"error: a window of 100000 . 1 \w+ does not fit",
        ),
        (["run=lm/a", "data=text", "data.path=gone"], "error: .*data.path='gone' is neither"),
    ],
)
def test_what_cannot_be_judged_is_said_in_one_line(place, arguments, message):
    assert re.search(message, call(evaluate, place, *arguments) or "no error")
