"""Parameters on disk, by Orbax."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from experiments.runs import RunError

PARAMS = "params"


def save_params(folder: Path, params: Any) -> Path:
    """Writes the parameters of a run and waits until they are on disk.

    Args:
      folder: the run's folder.
      params: any pytree of arrays.

    Returns:
      Where they are: `folder/params`.
    """
    path = (folder / PARAMS).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, params, force=True)
    return path


def load_params(folder: Path, like: Any) -> Any:
    """Reads the parameters of a run onto this process's first device.

    Args:
      folder: the run's folder.
      like: pytree of shapes and dtypes, for example `jax.eval_shape(model.init, key)`.

    Returns:
      The parameters.

    Raises:
      RunError: the run saved none.
      ValueError: what is on disk has another structure or other shapes.
    """
    path = (folder / PARAMS).absolute()
    if not path.is_dir():
        raise RunError(
            f"{folder} holds no '{PARAMS}': the run did not end, or is not a training run. "
            "Give run=FOLDER of a finished one"
        )
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)
