"""Compiles the jobs on stdin for one target, and prints a line of JSON for each.

The report of ptxas comes from the files that Mosaic GPU dumps, VMEM from the text of the compiled
program. A job that takes too long ends the process; its parent continues with the next.
"""

import json
import os
import pathlib
import re
import signal
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# The description of an absent device that XLA needs; on a machine with one:
# jax.experimental.topologies.get_attached_topology().
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 2 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
TPUS = {"v5e": ("v5e:2x2", "TPU v5 lite"), "v6e": ("v6e:2x2", "TPU v6 lite")}


def ptxas_numbers(text: str) -> dict:
    """Reads the largest registers, spills and stack of the kernels in ptxas's report.

    Args:
      text: the output of ptxas with -v.

    Returns:
      `registers`, `spill_bytes`, `stack_bytes`.

    Raises:
      ValueError: it has no kernel.
    """
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
    )
    if not registers or not frames:
        raise ValueError(f"ptxas reported no kernel: {text[:200]!r}")
    return {
        "registers": max(registers),
        "spill_bytes": max(int(stores) + int(loads) for _, stores, loads in frames),
        "stack_bytes": max(int(stack) for stack, _, _ in frames),
    }


def vmem_kib(text: str) -> float:
    """Reads the VMEM of the largest Mosaic kernel in a compiled program.

    Args:
      text: `compiled.as_text()`.

    Returns:
      KiB.

    Raises:
      ValueError: it has no kernel, or one without this figure.
    """
    kernels = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    sizes = [
        int(size)
        for line in kernels  # XLA's own fusions have the same field
        for group in re.findall(r'"used_scoped_memory_configs":\[(.*?)\]', line)
        for size in re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', group)
    ]
    if not sizes:
        raise ValueError("the compiled program holds no Mosaic TPU kernel that states its VMEM")
    return max(sizes) / 1024


def main(target: str) -> None:
    """Reads `{"seconds": ..., "jobs": [...]}` from stdin.

    Args:
      target: `h100`, `v5e` or `v6e`.
    """
    asked = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as folder:
        # Read by Mosaic GPU when it compiles; ptxas's report and the resources are among the files.
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        compile_one = _compiler(target, pathlib.Path(folder))
        for job in asked["jobs"]:
            signal.alarm(asked["seconds"])  # not handled: the process ends
            try:
                result = compile_one(job)
            except Exception as error:  # whatever it is: that kernel does not compile
                first = (str(error).strip() or "no message").splitlines()[0]
                result = {"error": f"{type(error).__name__}: {first[:300]}"}
            signal.alarm(0)
            print(json.dumps(result), flush=True)


def _compiler(target: str, dumps: pathlib.Path):
    """Makes a function from a job to the result of its compilation."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

    from tools.kernel_calls import kernel_call

    if target in TPUS:
        name, kind = TPUS[target]
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
        platform, device = "tpu", AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    else:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=H100
        )
        platform = "cuda"
        device = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    one = NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())

    def compile_one(job: dict) -> dict:
        for file in dumps.iterdir():
            file.unlink()
        call, operands = kernel_call(**job)
        placed = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), operands
        )
        began = time.perf_counter()
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            lowered = (
                jax.jit(call, out_shardings=one)
                .trace(*placed)
                .lower(lowering_platforms=(platform,))
            )
            lower_s = time.perf_counter() - began
            compiled = lowered.compile()
        result = {"lower_s": lower_s, "compile_s": time.perf_counter() - began - lower_s}
        if platform == "tpu":
            return {**result, "vmem_kib": vmem_kib(compiled.as_text() or "")}
        shared = [
            int(n)
            for file in dumps.glob("*.resources.txt")
            for n in re.findall(r"smem_scratch_bytes=(\d+)", file.read_text(encoding="utf-8"))
        ]
        said = "".join(file.read_text(encoding="utf-8") for file in dumps.glob("*.ptxas"))
        return {**result, **ptxas_numbers(said), "shared_kib": max(shared) / 1024}

    return compile_one


if __name__ == "__main__":
    main(sys.argv[1])
