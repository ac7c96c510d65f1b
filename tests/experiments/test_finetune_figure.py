"""The table and the figure of finetuned runs, from folders made by hand; what a sweep runs once."""

import csv
import functools
import shutil

import pytest
from omegaconf import OmegaConf

from experiments import finetune
from experiments.adapt.shared_numbers import unused
from experiments.run.folders import RunError
from experiments.studies import finetune_figure
from experiments.sweep.run_sets import read
from tests.experiments.run_folders import make_run

LORA = {"lora": {"_target_": "jaxpara.lora", "rank": 8}}
QUANT = {"fake_quant": {"_target_": "jaxpara.fake_quant", "bits": 4}}


def run(place, name, quality, transform, *, seed=0, bits=4, rank=8, rate=0.1, **more):
    cfg = {
        "name": "finetune",
        "seed": seed,
        "steps": 4,
        "batch_size": 2,
        "window": 50,
        "bits": bits,
        "rank": rank,
        "learning_rate": rate,
        "transform": transform,
    }
    summary = {
        "status": "finished",
        "validation_bits_per_byte": quality,
        "merged_bits_per_byte": quality,
        "bits_per_weight": 4.5 if "fake_quant" in transform else 32.0,
        "trainable_parameters": 10 * rank,
        "tokens_per_second": 1000.0,
        "step_memory_bytes": 2_000_000,
        **more,
    }
    return make_run(place / name, cfg, summary=summary)


@pytest.fixture
def folders(tmp_path):
    rounded = {"rounded_2_bits_per_byte": 3.0, "rounded_2_bits_per_weight": 2.5}
    found = [
        run(tmp_path, "a", 2.0, LORA, **rounded),
        run(tmp_path, "b", 2.2, LORA, seed=1, **rounded),
        run(tmp_path, "again", 2.0, LORA, **rounded),  # of another sweep
        run(tmp_path, "copy", 2.0, LORA, bits=2, same_as="a", **rounded),
        run(tmp_path, "c", 2.4, LORA | QUANT),
        run(tmp_path, "worse", 2.5, LORA | QUANT, rate=0.2),
        run(tmp_path, "d", 9.0, {}, status="interrupted"),
    ]
    return [read(folder) for folder in found]


def test_rows_are_seed_means_at_the_best_rate_without_copies(folders):
    rows = {(r.transforms, r.bits, r.rank): r for r in finetune_figure.rows(folders)}
    assert set(rows) == {("lora", None, 8), ("lora, rounded", 2, 8), ("lora > fake_quant", 4, 8)}
    lora = rows["lora", None, 8]
    assert (lora.seeds, lora.trained, lora.memory) == (2, 80, 2.0)
    assert (lora.quality, lora.spread) == (pytest.approx(2.1), pytest.approx(0.1))
    assert lora.milliseconds == pytest.approx(100.0)  # 100 tokens a step, 1000 a second
    after = rows["lora, rounded", 2, 8]
    assert (after.quality, after.bits_per_weight, after.merged) == (3.0, 2.5, None)


def test_settings_that_differ_make_rows_of_their_own_and_names_say_them(tmp_path):
    def chain(**more):
        return {"nf4": {"_target_": "jaxpara.nf4", **more}} | LORA

    folders = [
        run(tmp_path, "old", 2.0, chain()),  # before there was such a setting
        run(tmp_path, "none", 2.2, chain(scale_block=None), seed=1),
        run(tmp_path, "bytes", 2.6, chain(scale_block=256)),
        run(tmp_path, "alone", 2.9, {"nf4": {"_target_": "jaxpara.nf4", "scale_block": 64}}),
    ]
    found = {r.transforms: r for r in finetune_figure.rows(map(read, folders))}
    assert set(found) == {"nf4 > lora", "nf4(scale_block=256) > lora", "nf4"}
    assert found["nf4 > lora"].quality == pytest.approx(2.1)
    assert found["nf4(scale_block=256) > lora"].seeds == 1


def test_the_figure_shows_requested_lines_without_outliers(folders):
    table = finetune_figure.rows(folders)
    assert list(finetune_figure.pick(table, None)) == [
        "lora, rank 8",
        "lora > fake_quant, rank 8",
        "lora, rounded, rank 8",
    ]
    lines = finetune_figure.pick(table, ["lora, r*"])
    far = [row._replace(quality=row.quality + 2) for row in lines["lora, rounded, rank 8"]]
    figure = finetune_figure.draw({**lines, "lora, rounded, rank 8": far}, title="")
    (axes,) = figure.axes
    assert axes.get_legend_handles_labels()[1] == ["lora, rank 8"]
    with pytest.raises(RunError, match="lines: 'dora' selects none of 'lora, rank 8', "):
        finetune_figure.pick(table, ["dora"])


def test_the_command_writes_table_numbers_and_figure(folders, tmp_path):
    output = tmp_path / "plots" / "f.png"
    table = finetune_figure.rows(folders)
    finetune_figure.write(output, table, title="here")
    with output.with_suffix(".csv").open() as file:
        lines = list(csv.reader(file))
    assert tuple(lines[0]) == finetune_figure.COLUMNS and len(lines) == 1 + len(table)
    assert (
        "| lora > fake_quant | 4 | 8 | 0.1 | 1 | 2.400 |" in output.with_suffix(".md").read_text()
    )
    assert output.stat().st_size > 5000


def test_runs_of_another_program_and_none_at_all_are_refused(tmp_path):
    other = make_run(tmp_path / "lm", {"name": "lm", "seed": 0}, summary={"status": "finished"})
    with pytest.raises(RunError, match="is not a run of `python -m experiments.finetune`"):
        finetune_figure.rows([read(other)])
    with pytest.raises(RunError, match="no run is finished"):
        finetune_figure.rows([])


def test_a_sweep_knows_a_run_that_differs_in_unused_numbers_alone(tmp_path):
    first = run(tmp_path, "first", 2.0, LORA)
    cfg = OmegaConf.load(first / "config.yaml")
    assert unused(cfg) == {"bits"}
    shutil.copytree(first, tmp_path / "damaged")
    (tmp_path / "damaged" / "config.yaml").write_text("a: [")
    beside = [tmp_path / "damaged", first]
    twin = functools.partial(finetune.twin, beside=beside)
    assert twin(OmegaConf.merge(cfg, {"bits": 2})) == first
    assert twin(OmegaConf.merge(cfg, {"rank": 4})) is None
    assert twin(OmegaConf.merge(cfg, {"bits": 2, "seed": 1})) is None
    both = OmegaConf.merge(cfg, {"transform": QUANT})
    for order in ([*LORA, "ternary"], ["ternary", *LORA]):  # what is set in which order
        chain = {name: LORA.get(name, {}) for name in order}
        saved = OmegaConf.merge(OmegaConf.masked_copy(cfg, set(cfg) - {"transform"}))
        saved.transform = chain
        OmegaConf.save(saved, first / "config.yaml")
        other = saved.copy()
        other.transform = dict(reversed(chain.items()))
        assert twin(OmegaConf.merge(saved, {"bits": 2})) == first
        assert twin(OmegaConf.merge(other, {"bits": 2})) is None
    OmegaConf.save(cfg, first / "config.yaml")
    assert unused(both) == set() and twin(both) is None
    assert finetune.twin(OmegaConf.merge(cfg, {"bits": 2}), []) is None
    assert unused(OmegaConf.create({"transform": {}})) == {"bits", "rank"}
