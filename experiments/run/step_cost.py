"""The cost of a training step: compile time, memory, and the model's arithmetic.

Model FLOPs are those of the matrix products and convolutions of the loss, times three: a
backward pass takes two products for each one of the forward pass. Recomputation and a solver's
further iterations add nothing, so they measure the model, not the program.
"""

import math
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr

from jaxpara.jaxprs import subjaxprs
from jaxpara.types import Loss, Step

BACKWARD_AND_FORWARD = 3


class StepCost(NamedTuple):
    """The cost of a compiled step.

    Attributes:
      compile_seconds: of tracing, lowering and compiling.
      model_flops: of one step, see above.
      text: the optimised program, in which a trace's operations are found by name.
      step_bytes: memory of the step by XLA's account: state, activations, gradients; None if the
        backend gives none.
    """

    compile_seconds: float
    model_flops: float
    text: Callable[[], str]
    step_bytes: int | None = None


def measured(step: Step, loss: Loss, report: Callable[[StepCost], None]) -> Step:
    """Wraps a jitted step so that compiling before its first call is timed separately.

    Args:
      step: from `jax.jit`.
      loss: the loss that it minimises.
      report: called once, before the first step runs.

    Returns:
      A step that does the same; JAX reuses the compiled code.
    """
    known = False

    def call(state, batch):
        nonlocal known
        if not known:
            known = True
            began = time.perf_counter()
            program = step.lower(state, batch).compile()
            seconds = time.perf_counter() - began
            flops = model_flops(loss, state.params, batch, state.key)
            report(StepCost(seconds, flops, program.as_text, program_bytes(program)))
        return step(state, batch)

    return call


def program_bytes(program: Any) -> int | None:
    """Reads the memory of a running compiled program, inputs and outputs included.

    Args:
      program: from `jax.jit(f).lower(...).compile()`.

    Returns:
      Bytes, by XLA's account; None if the backend gives none.
    """
    account = program.memory_analysis()
    if account is None:
        return None
    held = account.argument_size_in_bytes + account.temp_size_in_bytes
    return held + account.output_size_in_bytes - account.alias_size_in_bytes


def figures(
    cost: StepCost | None, *, tokens_per_step: int, tokens_per_second: float, peak: float | None
) -> dict[str, float]:
    """Computes the cost figures for a run's summary.

    Args:
      cost: of its step; None before the first one.
      tokens_per_step: predicted tokens in a batch.
      tokens_per_second: of training.
      peak: FLOP/s of all devices together; None if not known.

    Returns:
      Peak memory and, if known, compile time, model FLOPs for each token and second, and their
      share of the peak.
    """
    found: dict[str, float] = {"memory_bytes": peak_memory()}
    if cost is not None:
        speed = cost.model_flops / tokens_per_step * tokens_per_second
        found["compile_seconds"] = cost.compile_seconds
        found["model_flops_per_token"] = cost.model_flops / tokens_per_step
        found["model_flops_per_second"] = speed
        if cost.step_bytes is not None:
            found["step_memory_bytes"] = cost.step_bytes
        if peak is not None:
            found["model_flops_utilization"] = speed / peak
    return found


def matmul_flops(jaxpr: Any) -> float:
    """Counts additions and multiplications in matrix products and convolutions.

    The body of a scan counts once for each step. Of the branches of a `cond` the most expensive
    counts. The body of a `while_loop` counts once, because its number of rounds is unknown.

    Args:
      jaxpr: open or closed.

    Returns:
      Two for each multiplication that is added up.
    """
    opened: Jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0.0
    for eqn in opened.eqns:
        name, inner = eqn.primitive.name, [matmul_flops(j) for j in subjaxprs(eqn)]
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * eqn.outvars[0].aval.size * kernel.size / outputs
        elif name == "scan":
            total += eqn.params["length"] * sum(inner)
        elif name == "cond":
            total += max(inner)
        else:
            total += sum(inner)
    return total


def model_flops(loss: Loss, params: Any, batch: Any, key: jax.Array) -> float:
    """Counts the model FLOPs of a training step on a batch.

    Args:
      loss: of a task.
      params: arrays, or their shapes and dtypes.
      batch: as the loss takes it.
      key: for the loss.

    Returns:
      Floating-point operations, forward and backward.
    """
    return BACKWARD_AND_FORWARD * matmul_flops(jax.make_jaxpr(loss)(params, batch, key))


def peak_memory() -> int:
    """Reads the peak memory of this process.

    Returns:
      Bytes: the largest peak of its devices if the backend reports one, as GPUs and TPUs do;
      otherwise, on a CPU, the peak of the process's resident set, Python and compiler included.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    if peaks:
        return max(peaks)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
