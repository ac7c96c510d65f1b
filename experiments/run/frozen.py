"""Parameters that are not trained: written once, to `folder/frozen/`, not to checkpoints."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import args as items

from experiments.run import seals
from experiments.run.disk import by_plain_name, read_items, target
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
    known = set(read_items(folder / FOLDER, leaves=items.JsonRestore())["leaves"]["digests"])
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
    what = {
        "params": items.StandardRestore(target(frozen)),
        "leaves": items.JsonRestore(),
    }
    read = read_items(folder / FOLDER, **what)
    seals.check_arrays(read["params"], read["leaves"]["digests"], str(folder / FOLDER))
    return combine(trained, read["params"])
