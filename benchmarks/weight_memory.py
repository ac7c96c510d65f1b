"""Compares the memory of gradients of reparameterised layers: `python -m benchmarks.weight_memory`.

The function is a scan over 16 layers `h <- tanh(h W)` with W [1024, 1024] in float32, 256 rows of
inputs, rank 8. The figure is the memory that XLA allocates besides inputs and outputs
(`temp_size_in_bytes`); nothing is run. `jp.lift` is compared with versions written by hand.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import jaxpara as jp

OUTPUT = Path("benchmarks/results/weight-memory.md")
LAYERS, WIDTH, ROWS, RANK = 16, 1024, 256, 8
MIB = 2**20
METHODS: dict[str, jp.Reparam] = {
    "jp.lora": jp.lora(rank=RANK),
    "jp.chain(fake_quant, lora)": jp.chain(jp.fake_quant(), jp.lora(rank=RANK)),
    "jp.chain(lora, fake_quant)": jp.chain(jp.lora(rank=RANK), jp.fake_quant()),
    "jp.l4q": jp.l4q(rank=RANK),
    "jp.lr_qat": jp.lr_qat(rank=RANK),
    "jp.lr_qat, a byte a weight": jp.lr_qat(rank=RANK, downcast="fixed8"),
    "jp.dora": jp.dora(rank=RANK),
    "jp.paca": jp.paca(rank=RANK),
    "jp.fake_quant, W trained": jp.fake_quant(),
}


def model(weights: jax.Array, x: jax.Array) -> jax.Array:
    """The layers, written without adapters."""
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0]


def by_hand(parts: Any, x: jax.Array) -> jax.Array:
    """`x W + s (x A) B` in the body."""

    def layer(h, each):
        w, a, b = each
        return jnp.tanh(h @ w + 2 * ((h @ a) @ b)), None

    return lax.scan(layer, x, parts)[0]


def built_inside(parts: Any, x: jax.Array) -> jax.Array:
    """`W + s A B` in the body, kept for the backward pass."""

    def layer(h, each):
        w, a, b = each
        return jnp.tanh(h @ (w + 2 * (a @ b))), None

    return lax.scan(layer, x, parts)[0]


def built_again(parts: Any, x: jax.Array) -> jax.Array:
    """`W + s A B` in the body, and again in the backward pass."""

    def layer(h, each):
        w, a, b = each
        return jnp.tanh(jax.checkpoint(lambda h, w, a, b: h @ (w + 2 * (a @ b)))(h, w, a, b)), None

    return lax.scan(layer, x, parts)[0]


def mebibytes(function: Callable[[Any, jax.Array], jax.Array], train: Any, frozen: Any) -> float:
    """Computes the temporary memory of a gradient.

    Args:
      function: of `(params, x)`.
      train: shapes of the differentiated leaves, with holes for the others.
      frozen: the rest.

    Returns:
      MiB.
    """

    def loss(train, frozen, x):
        return jnp.sum(function(jp.combine(train, frozen), x) ** 2)

    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    program = jax.jit(jax.grad(loss)).lower(train, frozen, x).compile()
    return program.memory_analysis().temp_size_in_bytes / MIB


def table() -> dict[str, tuple[float, float]]:
    """Computes all rows.

    Returns:
      Name -> MiB of temporary memory, and MiB of the gradient itself.
    """
    weights = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
    a = jax.ShapeDtypeStruct((LAYERS, WIDTH, RANK), jnp.float32)
    b = jax.ShapeDtypeStruct((LAYERS, RANK, WIDTH), jnp.float32)
    held, thin = (weights, None, None), (None, a, b)

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / MIB

    def row(function, train, frozen):
        return mebibytes(function, train, frozen), size(train)

    found = {
        "full fine-tuning": row(model, weights, None),
        "by hand, x W + s (x A) B": row(by_hand, thin, held),
        "by hand, W + s A B before the scan": row(
            lambda p, x: model(p[0] + 2 * (p[1] @ p[2]), x), thin, held
        ),
        "by hand, W + s A B in the body": row(built_inside, thin, held),
        "by hand, the same under remat": row(built_again, thin, held),
    }
    lifted = jp.lift(model)
    for name, t in METHODS.items():
        state = jax.eval_shape(lambda w, t=t: t.attach(jax.random.key(0), w), weights)
        found[name] = row(lifted, *jp.split(state, t.trainable(state)))
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    output = parser.parse_args().output
    lines = ["| gradient of | temporary, MiB | the gradient, MiB |", "| --- | --- | --- |"]
    lines += [f"| {name} | {temp:.0f} | {own:.1f} |" for name, (temp, own) in table().items()]
    about = (__doc__ or "").partition("\n\n")[2]
    head = f"`python -m benchmarks.weight_memory`; jax {jax.__version__}; {jax.default_backend()}."
    output.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines)
    output.write_text(f"{head}\n\n{about}\n{text}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
