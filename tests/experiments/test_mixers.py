"""The comparison of contenders: which learning rate counts, what is measured, what is refused."""

import csv

import jax
import optax
import pytest

from experiments.run.folders import RunError
from experiments.studies import mixers
from experiments.sweep.run_sets import read_all
from jaxpara import cells
from jaxpara.nn import decoder
from jaxpara.nn import mixers as token_mixers
from tests.experiments.run_folders import config, make_run

JUDGED = "validation_bits_per_byte"


def runs_of(folder, *described):
    """Reads runs written as (contender, rate, seed, figure, changes of the summary)."""
    for i, (name, rate, seed, figure, *changes) in enumerate(described):
        summary = {"status": "finished", "judged_by": [JUDGED, "min"], JUDGED: figure}
        summary |= {"tokens_per_second": 100 + i, "parameters": 7, **dict(*changes)}
        cfg = config(optim__learning_rate=rate, seed=seed)
        if name is not None:
            cfg["contender"] = name
        make_run(folder / str(i), cfg, summary=summary)
    return read_all(str(folder))[0]


def test_each_contender_counts_at_its_best_rate_over_seeds(tmp_path):
    runs = runs_of(
        tmp_path,
        ("gru", 0.1, 0, 1.0),
        ("gru", 0.1, 1, 3.0),
        ("gru", 0.3, 0, 1.5),
        ("gru", 0.3, 1, 1.6),
        ("gru", 0.9, 0, 0.1, {"status": "diverged"}),
        ("attention", 0.3, 0, 1.2),
    )
    column, choices = mixers.choose(runs)
    assert column == JUDGED
    assert [(c.name, c.rate, c.tried) for c in choices] == [
        ("attention", 0.3, [0.3]),
        ("gru", 0.3, [0.1, 0.3, 0.9]),
    ]
    assert choices[1].figure == pytest.approx(1.55) and len(choices[1].runs) == 2


@pytest.mark.parametrize(
    "described, message",
    [
        ([(None, 0.1, 0, 1.0)], "has no contender: give the runs of `python -m .*sweep=mixers`"),
        ([("gru", 0.1, 0, 1.0, {"status": "failed"})], "no run of contender gru is finished"),
        (
            [("gru", 0.1, 0, 1.0), ("lstm", 0.1, 0, 1.0, {"judged_by": ["accuracy", "max"]})],
            "judged by different figures",
        ),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, described, message):
    with pytest.raises(RunError, match=message):
        mixers.choose(runs_of(tmp_path, *described))


def test_a_contender_that_the_config_does_not_name_is_found_in_hydras_record(tmp_path):
    [run] = runs_of(tmp_path, (None, 0.1, 0, 1.0))
    (run.folder / ".hydra" / "overrides.yaml").write_text("- seed=0\n- contender=slstm\n")
    assert mixers.choose([run])[1][0].name == "slstm"


def test_contenders_must_have_seen_equal_numbers_of_tokens(tmp_path):
    runs = runs_of(tmp_path, ("gru", 0.1, 0, 1.0), ("lstm", 0.1, 0, 1.0))
    runs[1].columns["tokens"][-1] = 99.0
    with pytest.raises(RunError, match="unequal numbers of tokens: .*99"):
        mixers.choose(runs)


@pytest.fixture(scope="module")
def model():
    return decoder(256, 8, 1, mixer=token_mixers.recurrent(cells.para_gru), mlp_hidden=8)


@pytest.mark.slow
def test_a_steps_memory_grows_with_its_batch(model):
    def held(batch_size):
        return mixers.step_memory(model, optax.adam(1e-3), batch_size=batch_size, window=16)

    small, large = held(2), held(32)
    parameters = jax.eval_shape(model.init, jax.random.key(0))
    least = 3 * 4 * sum(leaf.size for leaf in jax.tree.leaves(parameters))
    assert least < small and small + 30 * 16 * 256 * 4 < large, "a batch's logits at the least"


def test_decoding_is_timed_without_compiling(model):
    params = jax.jit(model.init)(jax.random.key(0))
    assert 10 < mixers.decode_speed(model, params, prompt=3, length=8, rounds=2) < 1e7


def test_the_table_and_the_figure_are_written(tmp_path, monkeypatch, capsys):
    runs = runs_of(tmp_path, *(("gru", rate, 0, 1.0 + rate) for rate in (0.1, 0.3)))
    row = dict(zip(mixers.COLUMNS, ("gru", 7, 0.1, 1.1, 100.0, 2.5, 50.0), strict=True))
    monkeypatch.setattr(mixers, "measure", lambda choice, **settings: row)
    target = tmp_path / "out" / "m.png"
    mixers.compare(runs, y=JUDGED, output=target, optimizer_of=None, decoding={})
    shown = capsys.readouterr().out
    assert "0.1*" in shown and "* at the edge of its grid" in shown
    assert "| gru | 7 | 0.1* | 1.100 | 100 | 2.5 | 50 |" in (tmp_path / "out/m.md").read_text()
    [written] = csv.DictReader((tmp_path / "out/m.csv").open())
    assert written["bits per byte"] == "1.1" and (tmp_path / "out/m.png").stat().st_size > 5000
