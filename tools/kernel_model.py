"""Expected times of the GPU forward kernels, computed from their machine code without a device.

    python tools/kernel_model.py

A block of threads rolls out, goes from chunk to chunk, and rolls out again, while the copy engine
brings its next window. A window therefore takes the longer of two times: its bytes at the device's
bandwidth, and its instructions at one a clock for each of the four schedulers of a multiprocessor
(special functions: one of 32 lanes in eight clocks), but at least the latency of its steps.
Instructions are counted in the machine code: `COUNTS`. The passes over a window come from the same
algorithm on a CPU: `PASSES`. The clocks of barriers and of the chain over chunks, with its test of
boundaries, are estimates. Nothing here was measured on a GPU. The launch, about 3 microseconds, is
not counted.
"""

import argparse
import pathlib
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a file

from pallas_kernels.nonlinear_recurrence import windows  # noqa: E402
from pallas_kernels.shapes import Leaves, Shape, traffic  # noqa: E402

# An H100 SXM: multiprocessors, clock under load, bytes a second that a copy gets; 32-bit registers
# and bytes of shared memory of one multiprocessor.
PROCESSORS, CLOCK, BANDWIDTH = 132, 1.755e9, 3.0e12
SHARED = 228 * 1024
# Clocks of a barrier of the block.
BARRIER = 60


class Roll(NamedTuple):
    """One step of a rollout, a warp: instructions, special functions of these, clocks from one
    state to the next."""

    issued: float
    special: int
    latency: int


class Counts(NamedTuple):
    """A kernel: its kinds of rollouts, and clocks from one chunk's start to the next one's.

    `guess` is on rough functions, `full` exact with Jacobians, `last` exact without.
    """

    leaves: Leaves
    guess: Roll
    full: Roll
    last: Roll
    link: int


# From nvdisasm of what ptxas 13.5 makes of the PTX at T, B, D = 2048, 8, 256 (loops of four steps),
# and one instruction more for the largest magnitude of each entry of the product, and of an affine
# state: later sources, not counted in machine code. `link` is that of the earlier sources. Not
# counted: the addition that keeps each entry of the product from vanishing.
COUNTS = {
    ("gru", "f32"): Counts(
        Leaves(1, 3), Roll(33.8, 3, 80), Roll(51.0, 6, 150), Roll(34.0, 6, 150), 45
    ),
    ("gru", "bf16"): Counts(
        Leaves(1, 3), Roll(36.8, 3, 80), Roll(54.8, 6, 150), Roll(37.0, 6, 150), 45
    ),
    ("lstm", "f32"): Counts(
        Leaves(2, 3), Roll(54.8, 4, 120), Roll(88.8, 8, 220), Roll(50.8, 8, 220), 85
    ),
    ("lstm", "bf16"): Counts(
        Leaves(2, 3), Roll(57.8, 4, 120), Roll(92.0, 8, 220), Roll(53.5, 8, 220), 85
    ),
    ("linear", "f32"): Counts(Leaves(1, 2), Roll(8.0, 0, 8), Roll(0, 0, 0), Roll(10.0, 0, 8), 10),
    ("linear", "bf16"): Counts(Leaves(1, 2), Roll(8.3, 0, 8), Roll(0, 0, 0), Roll(10.3, 0, 8), 10),
}
# Mean passes over a window of 32 chunks of 16 and of 32 steps, at the default tolerance and weights
# within 1: guesses, full ones, last ones. Underestimates full passes, see docs/measured/kernels.md.
PASSES = {"gru": (1.0, 2.34, 0.95), "lstm": (1.0, 2.41, 1.77), "linear": (1.0, 0.0, 1.0)}


class Estimate(NamedTuple):
    """Seconds: of memory alone, and expected; blocks of threads, and on one multiprocessor."""

    floor: float
    expected: float
    blocks: int
    together: int


def estimate(shape: Shape, name: str, storage: str) -> Estimate:
    """Computes the expected time of a forward pass.

    Args:
      shape: T, B, D.
      name: `gru`, `lstm` or `linear`.
      storage: `f32` or `bf16`, of inputs and states.

    Returns:
      The estimate.
    """
    counts, passes = COUNTS[name, storage], PASSES[name]
    size, affine = {"f32": 4, "bf16": 2}[storage], name == "linear"
    leaves = counts.leaves
    problem = windows.Problem(*shape, leaves.states, (size,) * leaves.inputs, affine, True)
    plan = windows.choose(problem)
    taken = windows.shared_bytes(problem, plan.block, plan.chunks, plan.length, plan.slots) + 4096
    blocks = shape.batch * -(-shape.width // plan.block)
    # A second block runs if there is one; 64 warps fit.
    together = min(SHARED // taken, 16 // plan.warpgroups, -(-blocks // PROCESSORS))
    warps = plan.window * plan.block / 32 / 4  # of steps, for each scheduler

    def rolled(roll: Roll, many: int) -> float:
        busy = many * warps * max(roll.issued, 8 * roll.special)
        return max(busy, plan.length * roll.latency)

    def rolls(many: int) -> float:
        kinds = (counts.guess, counts.full, counts.last)
        return sum(p * rolled(roll, many) for p, roll in zip(passes, kinds, strict=True))

    linked = 1.0 if affine else sum(passes)  # passes whose starts are corrected
    chain = linked * plan.chunks * counts.link + (2 * sum(passes) + 1) * BARRIER
    # Blocks that share a multiprocessor roll out in turn; each one's chain hides behind the other.
    clocks = max(rolls(together), rolls(1) + chain)
    moved = traffic(Shape(plan.window, 1, plan.block), leaves, size, "forward")
    memory = together * moved * CLOCK * PROCESSORS / BANDWIDTH
    waves = -(-blocks // (together * PROCESSORS))
    # The first window waits for its inputs.
    total = waves * plan.windows * max(clocks, memory) + memory
    floor = traffic(shape, leaves, size, "forward") / BANDWIDTH
    return Estimate(floor, max(total / CLOCK, floor), blocks, together)


SHAPES = tuple(
    Shape(steps, batch, width)
    for steps in (2048, 8192, 65536)
    for batch, width in ((1, 2048), (8, 256), (8, 1024), (8, 2048), (64, 1024), (64, 2048))
    if steps < 65536 or batch * width <= 16384
)


def table() -> str:
    """Formats every kernel at the shapes that have a target, in Markdown.

    Returns:
      The table.
    """
    rows = ["| kernel | storage | T, B, D | blocks | floor us | expected us | times the floor |"]
    rows.append("|---" * 7 + "|")
    for name, storage in COUNTS:
        for shape in SHAPES:
            found = estimate(shape, name, storage)
            sizes = ", ".join(map(str, shape))
            times = found.expected / found.floor
            rows.append(
                f"| {name} | {storage} | {sizes} | {found.blocks} | {1e6 * found.floor:.0f} "
                f"| {1e6 * found.expected:.0f} | {times:.2f} |"
            )
    return "\n".join(rows)


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    print(table())
