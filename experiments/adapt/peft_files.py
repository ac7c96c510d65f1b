"""LoRA in the files of Hugging Face PEFT: `adapter_config.json`, `adapter_model.safetensors`.

PEFT keeps `lora_A.weight [r, in]` and `lora_B.weight [out, r]`, the transposes of our `a` and
`b`, for each module of a PyTorch model. For a convolution (`jp.lora(window=..)`) they are
`[r, in, *window]` and `[out, r, 1, ..]`; for an embedding they have other names. A stacked leaf
becomes a module for each of its slices. Needs the extra `safetensors`.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.run.folders import RunError, read_json, write_json
from jaxpara import weights
from jaxpara.tree import matcher, path_of
from jaxpara.weights.weight import is_weight

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
EMBEDDINGS = ("table", "embedding")
"""Names of the leaves of embeddings, here and in Flax; PEFT names their adapters differently."""
OTHERWISE = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "alora_invocation_tokens",
    "target_parameters",
    "trainable_token_indices",
    "modules_to_save",
)
"""Settings of PEFT with which an adapter of type LORA is not plain LoRA."""


class Slot(NamedTuple):
    """One module of the PyTorch model.

    Attributes:
      module: its name there.
      path: of our leaf.
      index: of the slice, for a stacked leaf.
    """

    module: str
    path: str
    index: tuple[int, ...]

    def keys(self) -> dict[str, str]:
        """PEFT's names of our parts."""
        embedding = self.path.split("/")[-1] in EMBEDDINGS
        form = "lora_embedding_{}" if embedding else "lora_{}.weight"
        return {part: f"{PREFIX}{self.module}.{form.format(part.upper())}" for part in ("a", "b")}


def _theirs(part: str, array: np.ndarray, window: int) -> np.ndarray:
    """Converts `a[*window, in, r]` or `b[r, out]` to PyTorch's layout."""
    if part == "a":
        return np.ascontiguousarray(array.transpose(-1, -2, *range(window)))
    return np.ascontiguousarray(array.T).reshape(*array.T.shape, *(1,) * window)


def _ours(part: str, array: np.ndarray) -> np.ndarray:
    """Undoes `_theirs`."""
    if part == "a":
        return array.transpose(*range(2, array.ndim), 1, 0)
    return array.reshape(array.shape[:2]).T


def _loras(state: Any) -> dict[str, Any]:
    found = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_weight):
        if is_weight(leaf):
            path = path_of(keys)
            plain = leaf.method.name.startswith("lora(") and set(leaf.parts) == {"a", "b"}
            if not plain or is_weight(leaf.base):
                chain = [leaf.method.name]
                while is_weight(leaf.base):
                    leaf = leaf.base
                    chain.insert(0, leaf.method.name)
                raise RunError(
                    f"{path} is reparameterised by {' > '.join(chain)}, and PEFT reads only "
                    "LoRA: save it with jp.weights.adapters, or merge it"
                )
            found[path] = leaf
    if not found:
        raise RunError(
            "no weight has LoRA: give a state of jp.lora(..), or a run of "
            "`python -m experiments.finetune transform=[lora]`"
        )
    return found


def slots(state: Any, names: Mapping[str, str]) -> Iterator[Slot]:
    """Yields the modules that the leaves of a state belong to.

    Args:
      state: from `jp.lora(...).attach`.
      names: glob of paths -> name of the module, with `{}` for each leading axis; for example
        `{"blocks/query/kernel": "model.layers.{}.self_attn.q_proj"}`. The default is the path
        without its last name, then the indices.

    Yields:
      A slot for each matrix.

    Raises:
      RunError: a leaf is not LoRA, a name has a wrong number of `{}`, a glob selects no leaf, or
        two slices get the same name.
    """
    loras, known = _loras(state), {}
    for glob in names:
        if not any(matcher(glob)(path, leaf) for path, leaf in loras.items()):
            raise RunError(
                f"names: {glob!r} selects no leaf with LoRA; choose from {', '.join(loras)}"
            )
    for path, leaf in loras.items():
        lead = leaf.parts["b"].shape[:-2]  # only a has the axes of a window
        template = ".".join([*path.split("/")[:-1], *("{}" for _ in lead)])
        template = next((t for glob, t in names.items() if matcher(glob)(path, leaf)), template)
        if template.count("{}") != len(lead):
            raise RunError(
                f"names: {path} has {len(lead)} leading axes {lead}, and {template!r} has "
                f"{template.count('{}')} pairs of braces: give one {{}} for each"
            )
        for index in np.ndindex(*lead):
            slot = Slot(template.format(*index), path, index)
            if slot.module in known:
                raise RunError(
                    f"names: {known[slot.module]} and {path} are both called {slot.module}: "
                    "give each its own glob"
                )
            known[slot.module] = path
            yield slot


def _library() -> Any:
    if importlib.util.find_spec("safetensors") is None:
        raise RunError("this needs safetensors: pip install -e '.[safetensors]'")
    import safetensors.numpy

    return safetensors.numpy


def save(folder: Path, state: Any, *, names: Mapping[str, str] | None = None) -> None:
    """Writes the LoRA adapters of a state.

    Args:
      folder: made if missing.
      state: from `jp.lora(...).attach`, trained.
      names: see `slots`.

    Raises:
      RunError: a leaf is not LoRA, leaves differ in rank or scale, or safetensors is missing.
    """
    library, loras = _library(), _loras(state)
    ranks = {leaf.parts["a"].shape[-1] for leaf in loras.values()}
    scales = {leaf.method.settings.scale for leaf in loras.values()}
    if len(ranks) > 1 or len(scales) > 1:
        raise RunError(f"one file holds one rank and one scale, not {ranks} and {scales}")
    (rank,), (scale,) = ranks, scales
    tensors, modules = {}, []
    for slot in slots(state, names or {}):
        leaf = loras[slot.path]
        for part, key in slot.keys().items():
            own = np.asarray(leaf.parts[part][slot.index])
            tensors[key] = _theirs(part, own, leaf.method.settings.window)
        modules.append(slot.module)
    folder.mkdir(parents=True, exist_ok=True)
    library.save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "r": rank,
            "lora_alpha": scale * rank,  # it already includes the rank-stabilised scale
            "use_rslora": False,
            "use_dora": False,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "target_modules": modules,
            "inference_mode": True,
        },
    )


def load(folder: Path, state: Any, *, names: Mapping[str, str] | None = None) -> Any:
    """Reads LoRA adapters that PEFT or `save` wrote.

    Args:
      folder: with the two files.
      state: from `jp.lora(...).attach` with their rank and scale, on their weights.
      names: see `slots`.

    Returns:
      The state with these adapters.

    Raises:
      RunError: the files are missing or not plain LoRA, rank or scale differ, a module is missing
        or has another shape, or the state has no leaf for one.
    """
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise RunError(
                f"{folder} has no {name}: give a folder that PEFT's model.save_pretrained(..) wrote"
            )
    config = read_json(folder / CONFIG)
    lacking = [name for name in ("peft_type", "r", "lora_alpha") if name not in config]
    numbers = [config.get("r"), config.get("lora_alpha")]
    if lacking or not all(isinstance(n, int | float) and n > 0 for n in numbers):
        raise RunError(
            f"{folder / CONFIG} has no {' and '.join(lacking)}: give the file that PEFT wrote"
            if lacking
            else f"{folder / CONFIG} has r={numbers[0]!r} and lora_alpha={numbers[1]!r}: both are "
            "numbers above 0 in what PEFT writes"
        )
    more = {name: config[name] for name in OTHERWISE if config.get(name)}
    if config.get("bias", "none") != "none":
        more["bias"] = config["bias"]
    if config["peft_type"] != "LORA" or more:
        settings = "".join(f" with {name}={value}" for name, value in more.items())
        raise RunError(
            f"{folder} holds {config['peft_type']}{settings}, and only plain LoRA can be read: "
            "merge it with PEFT"
        )
    library = _library()
    try:
        tensors = library.load_file(folder / TENSORS)
    except Exception as error:  # the library's own, not a ValueError
        raise RunError(
            f"{folder / TENSORS} is damaged ({error}): copy it again from where PEFT wrote it"
        ) from error
    loras = _loras(state)
    rank = config["r"]
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    for path, leaf in loras.items():
        have = leaf.parts["a"].shape[-1], leaf.method.settings.scale
        if have[0] != rank or not np.isclose(have[1], scale, rtol=1e-6):
            raise RunError(
                f"{folder} has r={rank} and alpha/r={scale:g}, and {path} rank {have[0]} and "
                f"{have[1]:g}: attach jp.lora(rank={rank}, alpha={scale * rank:g})"
            )
    parts = {path: {n: np.array(p) for n, p in leaf.parts.items()} for path, leaf in loras.items()}
    for slot in slots(state, names or {}):
        window = loras[slot.path].method.settings.window
        for part, key in slot.keys().items():
            if key not in tensors:
                raise RunError(f"{folder / TENSORS} has no {key}: see names=")
            into = parts[slot.path][part]
            wanted = _theirs(part, into[slot.index], window).shape
            if tensors[key].shape != wanted:
                raise RunError(
                    f"{key} has shape {tensors[key].shape} and {slot.path} needs {wanted}: "
                    "it belongs to another model"
                )
            into[slot.index] = _ours(part, tensors.pop(key))
    if tensors:
        raise RunError(f"the state has no leaf for {', '.join(sorted(tensors))}: see names=")
    nested: dict[str, Any] = {}
    for path, arrays in parts.items():
        node = nested
        for name in path.split("/"):
            node = node.setdefault(name, {})
        node |= jax.tree.map(jnp.asarray, arrays)
    return weights.with_adapters(state, nested)
