"""Folders as runs leave them, made without training."""

import csv
import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


def config(**changes: Any) -> dict[str, Any]:
    """A resolved config in the shape of conf/train.yaml; `a__b` changes the key `b` in `a`."""
    cell = {"_target_": "hydra.utils.get_method", "path": "jaxpara.cells.para_gru"}
    cell = {**cell, **changes.pop("cell", {})}
    mixer = {"_target_": "jaxpara.nn.mixers.recurrent", "cell": cell, "hidden": None}
    mixer = changes.pop("mixer", mixer)
    whole = {
        "name": "lm",
        "seed": 0,
        "steps": 4,
        "cell": cell,
        "mixer": mixer,
        "model": {"_target_": "jaxpara.nn.decoder", "width": 8, "mixer": mixer},
        "optim": {"_target_": "jaxpara.train.optimizer", "steps": 4, "learning_rate": 0.1},
    }
    for key, value in changes.items():
        outer, _, inner = key.partition("__")
        if inner:
            whole[outer][inner] = value
        else:
            whole[outer] = value
    return whole


ATTENTION = {"_target_": "jaxpara.nn.mixers.attention", "heads": 4}
LSTM = {"path": "jaxpara.cells.para_lstm"}


def make_run(
    folder: Path,
    cfg: dict[str, Any],
    rows: list[dict[str, Any]] | None = None,
    *,
    summary: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
) -> Path:
    """Writes config, metrics (four steps of a falling loss by default), and what else is given."""
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(cfg), folder / "config.yaml")
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text("name: not this one\n")
    if rows is None:
        rows = [
            {
                "step": step,
                "tokens": 10 * step,
                "validation_bits_per_byte": 8 / (1 + step) + 0.1 * cfg["seed"],
            }
            for step in range(5)
        ]
    with (folder / "metrics.csv").open("w", newline="") as file:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, names or ["step", "tokens"], restval="")
        writer.writeheader()
        writer.writerows(rows)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if environment is not None:
        (folder / "env.json").write_text(json.dumps(environment))
    return folder
