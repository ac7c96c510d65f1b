"""Adapting a trained language model as a Task: trains a reparameterisation of it."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.adapt import adapter_files
from experiments.adapt.storage import bits_per_weight
from experiments.data.baselines import baselines
from experiments.data.corpus import Data
from experiments.run import folders, tables, trust
from experiments.run.checkpoints import load_params
from experiments.run.task import Task
from experiments.shell.build import build_transform
from experiments.text.judging import bits_per_byte
from experiments.text.language_model import (
    BITS,
    batch_like,
    check_vocabulary,
    cut_held_out,
    loss_of,
)
from jaxpara import Reparam, split
from jaxpara.tree import path_of
from jaxpara.types import Model, Params
from jaxpara.weights.weight import is_weight, shape_of

MERGED = "merged_bits_per_byte"


# Parts of quantisers: scales and offsets, and the parts from which scales in bytes are made.
GRID_PARTS = ("scale", "offset", "step", "mean")


def slow_scales(
    *, optimizer: optax.GradientTransformation, factor: float
) -> optax.GradientTransformation:
    """Makes an optimiser with smaller steps for the scales and offsets of quantisers.

    A step of Adam's size, which suits a weight, would change a scale by a large part of itself.

    Args:
      optimizer: for everything.
      factor: its updates of the parts in `GRID_PARTS` are multiplied by it.

    Returns:
      The optimiser.
    """

    def of_a_grid(path, leaf):
        del leaf
        names = [getattr(step, "key", getattr(step, "name", None)) for step in path]
        return names[-2:-1] == ["parts"] and names[-1] in GRID_PARTS

    def mask(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(of_a_grid, params)

    return optax.chain(optimizer, optax.masked(optax.scale(factor), mask))


def started_from(model: Model, run: str | None) -> Model:
    """Makes a model start from a run's parameters; from an adapted run's effective weights.

    Args:
      model: that of the run, without its transforms.
      run: its folder; None leaves the model as it is.

    Returns:
      The model.

    Raises:
      RunError: there is no such run, it has no checkpoint, or its parameters differ.
    """
    if run is None:
        return model
    folder = folders.find_run(run, key="from")
    trained = trust.open_config(folder)
    before = build_transform(trained)
    adapted = model if before is None else before(model)
    try:
        params = load_params(folder, jax.eval_shape(adapted.init, jax.random.key(0)))
    except ValueError as error:
        raise folders.RunError(
            f"from={run!r} has other parameters than its model: give a run of "
            "`python -m experiments.train experiment=lm`"
        ) from error
    if before is not None:
        params = jax.jit(before.effective)(params)
    return model._replace(init=lambda key: params)


def check_ranks(shapes: Any) -> None:
    """Refuses a rank that is larger than its matrix.

    Args:
      shapes: of a state of transforms.

    Raises:
      RunError: gives the leaf and its size.
    """
    for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes, is_leaf=is_weight):
        inner = leaf
        while is_weight(inner):
            if {"a", "b"} <= set(inner.parts):
                rank = inner.parts["a"].shape[-1]
                size = shape_of(inner.base).shape[-2:]
                if rank > min(size):
                    raise folders.RunError(
                        f"rank={rank} is too large for {path_of(keys)}, whose matrices are "
                        f"{size[0]} x {size[1]}:\n"
                        f"give rank={min(size)} or less, or leave that leaf out with where=GLOB"
                    )
            inner = inner.base


def finetuned(
    *,
    model: Model,
    transform: Reparam | None,
    base: str | None,
    rounding: Mapping[str, Reparam],
    data: Data,
    seed: int,
    batch_size: int,
    window: int,
    evaluation: Mapping[str, Any],
) -> Task:
    """Trains the trainable parts of a reparameterised language model.

    Args:
      model: a language model.
      transform: of it; None trains every parameter.
      base: folder of the run whose parameters it starts from; None: fresh ones.
      rounding: the grids to which dense merged weights are rounded at the end, by name.
      data: training and held-out text.
      seed: of the order of the data.
      batch_size: sequences in a step.
      window: tokens predicted in each.
      evaluation: `windows, length, batch_size`, held-out windows at each evaluation.

    Returns:
      The task.

    Raises:
      RunError: a number does not fit the data or the model.
    """
    try:
        check_vocabulary(model, data)
    except folders.RunError as error:
        if base is None:
            raise
        raise folders.RunError(
            f"from={base!r} is not of a language model that reads this data, which has "
            f"{data.tokenizer.vocab_size} tokens: give a run of\n  {folders.MAKE} data=stdlib_base"
        ) from error
    begun = started_from(model, base)
    tuned = begun if transform is None else transform(begun)
    try:
        batches = data.batches(seed=seed, batch_size=batch_size, length=window)
        with warnings.catch_warnings(record=True) as told:
            shapes = jax.eval_shape(tuned.init, jax.random.key(0))
    except ValueError as error:
        raise folders.RunError(str(error)) from error
    check_ranks(shapes)  # first: one error instead of a warning for every leaf before it
    for warning in told:
        warnings.warn(warning.message, stacklevel=2)
    judged = cut_held_out(data, count=evaluation["windows"], length=evaluation["length"])

    def scorer(of: Model):
        size = evaluation["batch_size"]
        return bits_per_byte(of, judged, batch_size=size, bytes_per_token=data.bytes_per_token)

    score = scorer(tuned)
    trained = jax.tree.leaves(shapes)
    bits = float(32)
    if transform is not None:
        trained = jax.tree.leaves(split(shapes, transform.trainable(shapes))[0])
        bits = bits_per_weight(shapes)
        tokens = jax.ShapeDtypeStruct((1, window), jnp.int32)
        print(transform.report(shapes, model.apply, tokens))
    rulers = baselines(data.validation)
    nats = loss_of(tuned)

    def loss(params: Params, batch: Any, key: jax.Array):
        value, metrics = nats(params, batch, key)
        return value + (0 if transform is None else transform.penalty(params)), metrics

    def finish(folder: Path, params: Params, summary: dict[str, Any]) -> None:
        key = jax.random.key(0)
        merged = params if transform is None else jax.jit(transform.merge)(params)
        merged_bits = scorer(tuned)(merged) if transform is not None else summary[BITS]
        summary[MERGED] = merged_bits
        shown = {"trained": summary[BITS], "merged": merged_bits}
        if jax.tree.structure(merged) == jax.tree.structure(jax.eval_shape(model.init, key)):
            plain = scorer(model)
            for name, rounded in rounding.items():
                weights = rounded.effective(rounded.attach(key, merged))
                summary[f"rounded_{name}_bits_per_byte"] = plain(weights)
                summary[f"rounded_{name}_bits_per_weight"] = bits_per_weight(
                    jax.eval_shape(rounded.attach, key, merged)
                )
                kind = f"{name} bits" if name.isdigit() else name
                shown[f"merged, then {kind}"] = summary[f"rounded_{name}_bits_per_byte"]
        if transform is not None:
            adapter_files.save(folder, params)
        where = f"{evaluation['windows']} windows of held-out files"
        tables.show_quality(shown, rulers, where=where)

    size = "" if data.train_bytes is None else f"{data.train_bytes:,} bytes to train on, "
    count = sum(leaf.size for leaf in trained)
    return Task(
        model=tuned,
        loss=loss,
        batches=batches,
        tokens_per_step=batch_size * window,
        batch_like=batch_like(judged, batch_size, window),
        columns=(BITS,),
        evaluate=lambda step, params: {BITS: score(params)},
        best=(BITS, "min"),
        describe=lambda values: f"validation {values[BITS]:.3f} bits/byte",
        finish=finish,
        about=f"{count:,} of them trained, {bits:.3g} bits a weight; {size}"
        f"{len(data.validation):,} held out, from the {data.source}",
        summary={
            "trainable_parameters": count,
            "bits_per_weight": bits,
            "baselines": rulers,
        },
        bytes_per_token=data.bytes_per_token,
        trainable=None if transform is None else transform.trainable,
    )
