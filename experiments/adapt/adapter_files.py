"""Adapters on disk, without their weights."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from experiments.run import seals
from experiments.run.disk import by_plain_name, quiet
from experiments.run.folders import RunError
from jaxpara import weights

FOLDER = "adapters"


def save(folder: Path, state: Any) -> bool:
    """Writes the adapters of a state to `folder/adapters`, by Orbax.

    Args:
      folder: of a run.
      state: from `t.attach`.

    Returns:
      Whether the state has adapters; if the weights themselves were trained, it has none.
    """
    try:
        saved = weights.adapters(state)
    except ValueError:
        return False
    with quiet(), by_plain_name(folder) as place, ocp.StandardCheckpointer() as writer:
        writer.save(place / FOLDER, saved, force=True)
    seals.seal(folder / FOLDER)
    return True


def load(folder: Path) -> dict[str, Any]:
    """Reads adapters back.

    Args:
      folder: of a run.

    Returns:
      The argument of `jp.weights.with_adapters`.

    Raises:
      RunError: the run has none, or they are damaged.
    """
    path = folder / FOLDER
    if not path.is_dir():
        raise RunError(
            f"{folder} holds no {FOLDER}: it is not a finetuned run, it is not finished, or its "
            "transforms train the weights themselves"
        )
    seals.check(path)
    try:
        with quiet(), by_plain_name(path) as place, ocp.StandardCheckpointer() as reader:
            return reader.restore(place)
    except Exception as error:  # Orbax and TensorStore raise many kinds
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"{path} is damaged ({told[:200]}): copy it again, or finish the run again"
        ) from error
