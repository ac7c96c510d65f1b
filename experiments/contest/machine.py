"""The machine on which something was timed."""

import time
from pathlib import Path

import jax

from experiments.run import folders


def machine() -> str:
    """Describes the machine in one line, shown above every table.

    Returns:
      Device, cores, versions, commit.
    """
    known = folders.environment()
    dirty = " with uncommitted changes" if known["git_dirty"] else ""
    commit = (known["git_commit"] or "unknown")[:10] + dirty
    return (
        f"{_processor()} ({known['device']}, {known['cpu_count']} cores), "
        f"Python {known['python']}, JAX {known['packages']['jax']}, float32, commit {commit}; "
        f"{time.strftime('%Y-%m-%d')}."
    )


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return jax.devices()[0].platform
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else jax.devices()[0].platform
