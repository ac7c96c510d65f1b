"""The map that `jp.auto` looks up: speed-ups of each path over `lax.scan`, at points."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "jaxpara" / "recurrence"


def point(
    cell: str,
    *,
    block: int,
    steps: int,
    elements: int,
    inputs: float = 1,
    speedup: Mapping[str, float],
    spread_ms: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Makes a point for `jaxpara.recurrence.rule`, rounded to four digits to be readable.

    Args:
      cell: its name.
      block: of the step's Jacobian.
      steps: T.
      elements: of the state, over batch and channels.
      inputs: width of the widest input, in widths of the widest leaf of the state; 3 where three
        gates are cut out of one input.
      speedup: of each path, over `lax.scan`, with gradients.
      spread_ms: first quartile, median and third quartile of each, `scan` among them.

    Returns:
      The point.
    """
    return {
        "cell": cell,
        "block": block,
        "steps": steps,
        "elements": elements,
        "inputs": _short(inputs),
        "speedup": {name: _short(value) for name, value in speedup.items()},
        "spread": {name: [_short(v) for v in values] for name, values in spread_ms.items()},
    }


def default(platform: str, jax: str) -> Path:
    """The file that `jp.auto` reads.

    Args:
      platform: "cpu", "gpu" or "tpu".
      jax: the version.

    Returns:
      Its path.
    """
    return FOLDER / f"choice_{platform}_jax{'.'.join(jax.split('.')[:2])}.json"


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def write(
    points: Sequence[Mapping[str, Any]],
    output: Path | None,
    *,
    platform: str,
    device: str,
    jax: str,
    date: str,
) -> Path:
    """Writes a map, a line for each point.

    Args:
      points: from `point`, of one device.
      output: the file; None for the one that `jp.auto` reads.
      platform: "cpu", "gpu" or "tpu".
      device, jax, date: what was measured, with which version, when.

    Returns:
      The file.
    """
    output = output or default(platform, jax)
    record = {"platform": platform, "device": device, "jax": jax, "date": date}
    lines = ",\n".join(json.dumps(point) for point in points)
    text = json.dumps({**record, "points": []}).removesuffix("]}") + f"\n{lines}\n]}}\n"
    output.write_text(text, encoding="utf-8")
    return output
