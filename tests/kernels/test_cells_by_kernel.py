"""Every elementwise cell of `jp.cells` through a kernel's body: values and gradients of float64.

Interpreted on a CPU, at the shapes that the benchmark's list keeps for it (`INTERPRETED`): T is 1,
31, 512 and 1000. Storage is that of the gates; the carry is float32, as in the layers of `jp.nn`.
Oracle: `lax.scan` of the same cell on the same stored gates, and backpropagation, in float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from pallas_kernels.shapes import INTERPRETED
from tests.recurrence.kit import QUICK, in_float64

ONE, PRIME, POWER, PADDED = INTERPRETED
HARD = 4.0  # of recurrent weights, uniform within; training gives about 1
ROWS = {
    "gru, one step": ("para_gru", ONE, "float32", 1.0, False),
    "gru, padded": ("para_gru", PADDED, "float32", 1.0, False),
    "gru, hard": ("para_gru", POWER, "float32", HARD, False),
    "gru, hard, bfloat16, resets": ("para_gru", PRIME, "bfloat16", HARD, True),
    "lstm, hard, bfloat16, resets": ("para_lstm", PRIME, "bfloat16", HARD, True),
    "slstm": ("slstm", PRIME, "float32", 1.0, False),
    "elman, hard, bfloat16": ("elman", PRIME, "bfloat16", HARD, False),
    "mingru, resets": ("min_gru", PADDED, "float32", 1.0, True),
    "linear, bfloat16": ("linear", POWER, "bfloat16", 1.0, False),
}


def close(found, wanted, tolerance, what):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    worst, size = np.max(np.abs(found - wanted)), np.max(np.abs(wanted))
    assert worst <= tolerance * size, f"{what}: {worst:.1e} off, size {size:.1e}"


def test_the_rows_hold_every_elementwise_cell_and_every_length_of_the_list():
    names, lengths, storages, scales, resets = zip(*ROWS.values(), strict=True)
    # What is public and makes a cell; those with heads have blocks, which no kernel takes.
    made = {n for n in dir(jp.cells) if n[0] != "_" and callable(getattr(jp.cells, n))}
    assert set(names) == {n for n in made - {"run", "clip_recurrent"} if not n.endswith("_heads")}
    assert {shape.steps for shape in lengths} == {1, 31, 512, 1000}
    assert set(storages) == {"float32", "bfloat16"} and set(resets) == {True, False}
    assert max(scales) == HARD


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_a_cell_by_kernel_has_the_values_and_gradients_of_lax_scan_in_float64(row):
    name, (steps, batch, width), storage, scale, resets = ROWS[row]
    more = {} if name in ("min_gru", "linear") else {"scale": scale}
    cell = getattr(jp.cells, name)(4, width, **more)
    params = jax.tree.map(np.asarray, cell.init(jax.random.key(0)))
    draw = np.random.default_rng(1)
    x = draw.standard_normal((steps, batch, 4)).astype(np.float32)
    gates = [np.asarray(g.astype(storage)) for g in cell.project(params, x)]
    start = jax.tree.map(
        lambda s: np.asarray(s) + np.abs(draw.standard_normal(s.shape)).astype(np.float32),
        cell.start(params, (batch,)),
    )
    weights = draw.standard_normal((steps, batch, width)).astype(np.float32)
    reset = np.arange(steps)[:, None] % 9 == 4 + np.arange(batch) % 2

    def run(scan):
        def loss(recurrent, start, gates):
            step = functools.partial(cell.step, params | recurrent)
            xs = tuple(gates)
            if resets:
                step, xs = jp.with_reset(step, start), (reset, xs)
            carry, ys = scan(step, start, xs)
            total = sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(carry))
            return jnp.sum(weights * ys) + total, (carry, ys)

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)

    solver = jp.fused(implementation="mosaic_tpu_interpret", chunks=4)
    scan = functools.partial(jp.newton_scan, solver=solver, derivative="reverse")
    args = ({k: v for k, v in params.items() if k == "recurrent"}, start)
    found = jax.jit(run(scan), compiler_options=QUICK)(*args, gates)
    wide = [g.astype(np.float32) for g in gates]
    (_, states), gradients = in_float64(run(lax.scan), *args, wide)
    (_, got), (d_recurrent, d_start, d_gates) = found
    # What a residual of 1e-6 leaves. Hard weights amplify it from step to step, as they amplify
    # rounding: over 512 steps `lax.scan` in float32 is itself 8e-5 off.
    tolerance = 3e-6 if scale < HARD else 2e-5 if steps < 512 else 3e-4
    for f, w in zip(jax.tree.leaves(got), jax.tree.leaves(states), strict=True):
        close(f, w, tolerance, "states")
    for f, w in zip(jax.tree.leaves(d_recurrent), jax.tree.leaves(gradients[0]), strict=True):
        close(f, w, tolerance, "recurrent weights")
    for f, w in zip(jax.tree.leaves(d_start), jax.tree.leaves(gradients[1]), strict=True):
        close(f, w, tolerance, "start")
    for f, w in zip(d_gates, gradients[2], strict=True):
        assert f.dtype == storage
        # Gradients of narrow gates are rounded once, on their way out.
        close(f, w, tolerance + (2.0**-8 if storage == "bfloat16" else 0.0), "gates")
