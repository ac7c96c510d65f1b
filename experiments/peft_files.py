"""LoRA as Hugging Face PEFT reads it: `adapter_config.json` and `adapter_model.safetensors`.

PEFT keeps `lora_A.weight [r, in]` and `lora_B.weight [out, r]`, the transposes of our `a` and
`b`, for each module of a PyTorch model. A stacked leaf becomes a module for each of its slices.
Needs the extra `safetensors`.
"""

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.runs import RunError, write_json
from jaxpara import weights
from jaxpara.tree import matcher, path_of
from jaxpara.weights.weight import is_weight

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


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


def _loras(state: Any) -> dict[str, Any]:
    found = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_weight):
        if is_weight(leaf):
            path = path_of(keys)
            plain = leaf.method.name.startswith("lora(") and set(leaf.parts) == {"a", "b"}
            if not plain or is_weight(leaf.base):
                raise RunError(
                    f"{path} is reparameterised by {leaf.method.name}, and what PEFT reads here is "
                    "LoRA alone: save it with jp.weights.adapters, or merge it"
                )
            found[path] = leaf
    if not found:
        raise RunError("the state has no LoRA leaf")
    return found


def slots(state: Any, names: Mapping[str, str]) -> Iterator[Slot]:
    """The modules that the leaves of a state stand for.

    Args:
      state: from `jp.lora(...).attach`.
      names: glob of paths -> name of the module, with `{}` for each leading axis; for example
        `{"blocks/query/kernel": "model.layers.{}.self_attn.q_proj"}`. Without one it is the path
        without its last name, then the indices.

    Yields:
      A slot for each matrix.

    Raises:
      RunError: a leaf is no LoRA, or a name has another number of `{}`.
    """
    for path, leaf in _loras(state).items():
        lead = leaf.parts["a"].shape[:-2]
        template = ".".join([*path.split("/")[:-1], *("{}" for _ in lead)])
        template = next((t for glob, t in names.items() if matcher(glob)(path, leaf)), template)
        if template.count("{}") != len(lead):
            raise RunError(
                f"names: {path} has {len(lead)} leading axes {lead}, and {template!r} has "
                f"{template.count('{}')} pairs of braces: give one {{}} for each"
            )
        for index in np.ndindex(*lead):
            yield Slot(template.format(*index), path, index)


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
      RunError: a leaf is no LoRA, leaves differ in rank or scale, or safetensors is missing.
    """
    library, loras = _library(), _loras(state)
    ranks = {leaf.parts["a"].shape[-1] for leaf in loras.values()}
    scales = {leaf.method.settings.scale for leaf in loras.values()}
    if len(ranks) > 1 or len(scales) > 1:
        raise RunError(f"one file holds one rank and one scale, not {ranks} and {scales}")
    (rank,), (scale,) = ranks, scales
    tensors, modules = {}, []
    for slot in slots(state, names or {}):
        parts = loras[slot.path].parts
        for name, part in (("lora_A", "a"), ("lora_B", "b")):
            matrix = np.asarray(parts[part][slot.index]).T
            tensors[f"{PREFIX}{slot.module}.{name}.weight"] = np.ascontiguousarray(matrix)
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
            "lora_alpha": scale * rank,  # the rank-stabilised scale is in it already
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
      state: from `jp.lora(...).attach` with their rank and scale, on the weights they belong to.
      names: see `slots`.

    Returns:
      The state with them.

    Raises:
      RunError: another rank or scale, a module that is not there or has another shape, or one
        for which the state has no leaf.
    """
    config = json.loads((folder / CONFIG).read_text())
    tensors = _library().load_file(folder / TENSORS)
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
        for name, part in (("lora_A", "a"), ("lora_B", "b")):
            key = f"{PREFIX}{slot.module}.{name}.weight"
            if key not in tensors:
                raise RunError(f"{folder / TENSORS} has no {key}: see names=")
            into = parts[slot.path][part]
            if tensors[key].shape[::-1] != into.shape[-2:]:
                raise RunError(
                    f"{key} has shape {tensors[key].shape} and {slot.path} wants "
                    f"{into.shape[:-3:-1]}: it is not of this model"
                )
            into[slot.index] = tensors.pop(key).T
    if tensors:
        raise RunError(f"the state has no leaf for {', '.join(sorted(tensors))}: see names=")
    nested: dict[str, Any] = {}
    for path, arrays in parts.items():
        node = nested
        for name in path.split("/"):
            node = node.setdefault(name, {})
        node |= jax.tree.map(jnp.asarray, arrays)
    return weights.with_adapters(state, nested)
