"""Blocks of the TPU kernels fit the VMEM of the device that they are made for."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import tiles
from pallas_kernels.nonlinear_recurrence import tpu
from tests.kernels.kit import GRU


@pytest.mark.parametrize(("room", "leaves"), [(48, 1), (48, 4), (12, 4)])
def test_every_plan_covers_every_step_once_and_fits_in_vmem(room, leaves, monkeypatch):
    monkeypatch.setattr(tiles, "vmem", lambda: room * 2**20)
    for time in (1, 2, 31, 512, 1000, 131072):
        for batch, width in ((1, 1), (1, 2048), (8, 256), (12, 200), (64, 2048)):
            for asked in ({"chunks": None, "window": None}, {"chunks": 8, "window": 2 * room}):
                step_bytes = 4 * (2 * leaves + 12)
                plan = tiles.make_plan(
                    (time, batch, width), step_bytes, leaves, reverse=False, **asked
                )
                windows = plan.grid[2]
                assert (windows - 1) * plan.window < time <= windows * plan.window
                # No chunk of a single window is empty.
                assert windows > 1 or (plan.chunks - 1) * plan.length < time
                # As v5e and v6e lay blocks out: in tiles of 1, 2, 4 or 8 rows by 128 lanes.
                rows = next(r for r in (1, 2, 4, 8) if r >= plan.rows)
                lanes = -(-plan.lanes // 128) * 128
                blocks = 2 * plan.window * rows * lanes * step_bytes
                summaries = (2 * leaves + leaves**2) * plan.chunks * rows * lanes * 4
                assert blocks + summaries < 0.75 * room * 2**20


@pytest.mark.parametrize(
    ("kind", "mib"),
    [("TPU v3", 12), ("TPU v4", 12), ("TPU v5p", 48), ("TPU v5 lite", 48), ("TPU v6 lite", 48)],
)
def test_a_kernel_asks_for_no_more_vmem_than_the_device_has(kind, mib):
    row = [jax.ShapeDtypeStruct((8, 128), jnp.float32)]
    gates = [jax.ShapeDtypeStruct((4096, 8, 128), jnp.float32)] * 3
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        run = jax.jit(lambda *a: tpu.forward(GRU.cell, *a, tol=None, max_iters=8))
        text = run.trace(row, gates, row * 3).lower(lowering_platforms=("tpu",)).as_text()
    assert re.findall(r"scoped_memory_configs.*?size\D*22: (\d+)", text) == [str(mib * 2**20)]
