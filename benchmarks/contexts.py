"""Compares which uses of a weight libraries adapt: `python -m benchmarks.contexts`, from the root.

Every context of `tests/weights/kit.py` runs through jaxpara, qwix and quax. Each cell runs in its
own process, because qwix's patches outlive a call. The only question is whether the value is that
of the function on the adapted weight, `f(W + s A B, x)` or `f(Q(W), x)`:

    right      it is, "rule" without building the weight and "dense" by building it late
    silent     it is the value of the function on the plain weight, without a message
    wrong      it is neither
    refuses    an error, by its type

lorax has no column. Its newest version, jax-lorax 0.3.1, requires jax<0.5, so pip does not install
it with the others. Beside JAX 0.10.2 or 0.12 its import fails: `jax.tree_map` is gone.
"""

import argparse
import importlib
import importlib.metadata
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpara as jp
from tests.weights.kit import CONTEXTS, Context

OUTPUT = Path("benchmarks/results/contexts.md")
RANK = 2


def close(got: Any, wanted: Any) -> bool:
    """Whether two results are equal up to float32 rounding."""
    if jax.tree.structure(got) != jax.tree.structure(wanted):
        return False
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    return all(np.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs)


def verdict(got: Any, plain: Any, wanted: list[Any]) -> str:
    """Classifies a result."""
    if any(close(got, one) for one in wanted):
        return "right"
    return "silent" if close(got, plain) else "wrong"


def _numbers(shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(9).standard_normal(shape), jnp.float32)


def _arguments(context: Context) -> tuple[jax.Array, jax.Array]:
    x = np.asarray(context.x)
    return jnp.asarray(context.w, jnp.float32), jnp.asarray(
        x, jnp.int32 if x.dtype.kind == "i" else jnp.float32
    )


def _ours(transform: Any, context: Context) -> str:
    w, x = _arguments(context)
    state = transform.attach(jax.random.key(0), w)
    train, frozen = jp.split(state, transform.trainable(state))
    state = jp.combine(jax.tree.map(lambda leaf: leaf + 0.3, train), frozen)
    function = context.function
    got = jax.jit(jp.lift(function))(state, x)
    wanted = function(transform.effective(state), x)
    said = verdict(got, function(state.base, x), [wanted])
    ways = {use.how for use in transform.report(state, function, x).uses}
    return f"{said}, {'dense' if 'densified' in ways else 'rule'}" if ways else said


def our_lora(context: Context) -> str:
    """`jp.lift` with LoRA."""
    return _ours(jp.lora(rank=RANK, where=lambda path, leaf: True), context)


def our_int4(context: Context) -> str:
    """`jp.lift` with four bits."""
    return _ours(jp.fake_quant(bits=4, where=lambda path, leaf: True), context)


def quax_lora(context: Context) -> str:
    """quax with the LoRA of its examples; if it refuses, it may build the weight."""
    import equinox as eqx
    import quax
    from quax.examples.lora import LoraArray

    w, x = _arguments(context)

    def run(allow_materialise: bool) -> str:
        array = LoraArray(
            w, rank=RANK, scale=0.3, allow_materialise=allow_materialise, key=jax.random.key(0)
        )
        array = eqx.tree_at(lambda a: a.b, array, _numbers(array.b.shape))
        got = eqx.filter_jit(quax.quaxify(context.function))(array, x)
        if isinstance(got, LoraArray):
            got = got.materialise()
        wanted = context.function(w + array.a @ array.b, x)
        return verdict(got, context.function(w, x), [wanted])

    try:
        return f"{run(False)}, rule"
    except Exception:
        return f"{run(True)}, dense"  # its error is the refusal


def _module(context: Context) -> tuple[Any, jax.Array, jax.Array]:
    from flax import linen as nn

    w, x = _arguments(context)

    class Body(nn.Module):
        @nn.compact
        def __call__(self, x):
            return context.function(self.param("w", lambda key: w), x)

    return Body(), w, x


def qwix_int4(context: Context) -> str:
    """qwix's quantisation-aware training under `jax.jit`."""
    import qwix

    body, w, x = _module(context)
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype="int4")
    model = qwix.quantize_model(body, qwix.QtProvider([rule]))
    got = jax.jit(model.apply)({"params": {"w": w}}, x)
    axes = range(w.ndim)
    kinds = [kept for n in range(w.ndim + 1) for kept in itertools.combinations(axes, n)]
    wanted = []
    for kept in kinds:  # one scale for each index of these axes, whichever qwix chose
        quantised = qwix.quantize(w, "int4", channelwise_axes=kept)
        wanted.append(context.function(qwix.dequantize(quantised), x))
    return verdict(got, context.function(w, x), wanted)


def qwix_lora(context: Context) -> str:
    """qwix's LoRA, made and run under `jax.jit`."""
    import qwix

    body, w, x = _module(context)
    provider = qwix.LoraProvider(module_path=".*", rank=RANK, alpha=float(RANK))
    model = qwix.apply_lora_to_model(body, provider)
    params = dict(jax.jit(model.init)(jax.random.key(0), x)["params"])
    names = sorted(name for name in params if name.endswith("_lora_b"))
    if not names:
        return "silent"
    delta = jnp.zeros_like(w)
    for name in names:
        params[name] = _numbers(params[name].shape)
        product = params[name.replace("_lora_b", "_lora_a")] @ params[name]
        if product.size != w.size:
            return f"wrong: an adapter of {list(product.shape)} for {list(w.shape)}"
        delta = delta + product.reshape(w.shape)
    got = jax.jit(model.apply)({"params": params}, x)
    return verdict(got, context.function(w, x), [context.function(w + delta, x)])


CONTENDERS: dict[str, Callable[[Context], str]] = {
    "jaxpara LoRA": our_lora,
    "jaxpara int4": our_int4,
    "qwix LoRA": qwix_lora,
    "qwix int4": qwix_int4,
    "quax LoRA": quax_lora,
}


def apart(contender: Callable[[Context], str], context: Context, *, patience: float = 120) -> str:
    """Computes a cell in its own process.

    Args:
      contender: of the table.
      context: likewise.
      patience: seconds before it is abandoned.

    Returns:
      The verdict; errors and crashes are verdicts, too.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            jax.config.update("jax_num_cpu_devices", 2)
            text = contender(context)
        except BaseException as error:
            text = f"refuses: {type(error).__name__}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    began = time.monotonic()
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() - began > patience:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return f"no answer in {patience:.0f} s"
        time.sleep(0.01)
    with os.fdopen(reading, encoding="utf-8") as said:
        return said.read() or "crashes"


def write(output: Path, table: dict[str, dict[str, str]]) -> None:
    """Writes the table and the counts of each contender's verdicts.

    Args:
      output: a Markdown file; the same as JSON beside it.
      table: verdict by context and contender.
    """
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("jax", "qwix", "quax"))
    kinds = ("right", "silent", "wrong", "refuses")
    counts = {
        kind: [sum(row[name].startswith(kind) for row in table.values()) for name in CONTENDERS]
        for kind in kinds
    }
    lines = [["context", *CONTENDERS], ["---"] * (len(CONTENDERS) + 1)]
    lines += [[name, *(row[c] for c in CONTENDERS)] for name, row in table.items()]
    lines += [[f"**{kind}**", *map(str, numbers)] for kind, numbers in counts.items()]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    about = (__doc__ or "").partition("\n\n")[2]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(
        f"`python -m benchmarks.contexts`; {versions}; CPU.\n\n{about}\n{text}", encoding="utf-8"
    )
    output.with_suffix(".json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("contexts", nargs="*", help="names; none: all")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    # Imported before the children start, without starting a backend.
    for module in ("qwix", "quax", "equinox", "flax.linen", "quax.examples.lora"):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as missing:
            raise SystemExit(f"{missing}: pip install qwix quax equinox flax") from missing
    table: dict[str, dict[str, str]] = {}
    for name in given.contexts or CONTEXTS:
        table[name] = {c: apart(run, CONTEXTS[name]) for c, run in CONTENDERS.items()}
        print(name, *table[name].values(), sep=" | ", flush=True)
    write(given.output, table)


if __name__ == "__main__":
    main()
