"""Parameters that are not trained: written once, to `folder/frozen/`, not to checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import args as items

from experiments.run import saved_values, seals
from experiments.run.disk import by_plain_name, read_items, read_record, target
from jaxpara import combine, split
from jaxpara.types import Params

FOLDER = "frozen"


def write(folder: Path, frozen: Params) -> None:
    """Writes the frozen parameters of a run once.

    Args:
      folder: the run's folder.
      frozen: the parameters that are not trained; nothing is written if there are none.
    """
    digests = seals.of_arrays(frozen)
    if digests:
        what = items.Composite(
            params=items.StandardSave(frozen), leaves=items.JsonSave({"digests": digests})
        )
        with (
            by_plain_name(folder) as place,
            ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer,
        ):
            writer.save(place / FOLDER, what, force=True)
        seals.seal(folder / FOLDER)


def _known(folder: Path) -> dict[str, str]:
    """Reads the digests of the frozen parameters; the files must be checked."""
    leaves = read_record(folder / FOLDER, "leaves")
    digests = leaves.get("digests") if isinstance(leaves, dict) else None
    if digests is None or not saved_values.is_digests(digests):
        raise seals.Damaged(f"{folder / FOLDER / 'leaves'} is damaged: it has no digests")
    return digests


def identity(folder: Path) -> str | None:
    """Computes what binds checkpoints to the frozen parameters: a digest of their values.

    Args:
      folder: the run's folder.

    Returns:
      Hexadecimal digits; None if no parameter is frozen.
    """
    return seals.of_text(_known(folder)) if (folder / FOLDER).is_dir() else None


def check_belongs(folder: Path, run: Mapping[str, Any], where: str) -> None:
    """Refuses frozen parameters that are not those that a checkpoint was trained with.

    Args:
      folder: the run's folder.
      run: the record of the checkpoint; one of an older version does not say.
      where: its place, for the message.

    Raises:
      Damaged: they are of another run, or missing.
    """
    if "frozen" in run and run["frozen"] != identity(folder):
        raise seals.Damaged(
            f"{folder / FOLDER} is not what {where} was trained with: "
            f"put the {FOLDER}/ of that run back"
        )


def apart(folder: Path, like: Params) -> tuple[Params, Params | None]:
    """Splits the parameters into those in checkpoints and those in `frozen/`.

    Args:
      folder: the run's folder.
      like: shapes of all parameters.

    Returns:
      Shapes of the trained and of the frozen parameters; None if none is frozen.

    Raises:
      Damaged: a file of `frozen/` is not what was written.
      ValueError: the model lacks some of the frozen parameters.
    """
    if not (folder / FOLDER).is_dir():
        return like, None
    seals.check(folder / FOLDER)
    known = set(_known(folder))
    paths = jax.tree_util.tree_map_with_path(lambda keys, _: jax.tree_util.keystr(keys), like)
    if missing := known - set(jax.tree.leaves(paths)):
        raise ValueError(f"{folder / FOLDER} has {sorted(missing)[0]}, which the model lacks")
    return split(like, jax.tree.map(lambda path: path not in known, paths))


def together(folder: Path, trained: Params, frozen: Params | None) -> Params:
    """Undoes `apart`.

    Args:
      folder: the run's folder.
      trained: parameters read from a checkpoint.
      frozen: shapes, from `apart`.

    Returns:
      All parameters.

    Raises:
      Damaged: the frozen parameters are not those that were written.
    """
    if frozen is None:
        return trained
    read = read_items(folder / FOLDER, params=items.StandardRestore(target(frozen)))["params"]
    seals.check_arrays(read, _known(folder), str(folder / FOLDER))
    return combine(trained, read)
