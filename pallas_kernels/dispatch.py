"""The one place that picks an implementation: best first, `xla` last, every refusal kept.

An op offers a mapping from names to callables, in the order in which it would try them, and says
on which platforms each one runs. A name that carries no platform (`sequential`, `xla`) runs
anywhere. The caller either names what it wants or leaves the choice to `choose`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from pallas_kernels import compat

Implementation = Callable[..., Any]

# Which platforms an implementation's name promises to run on; other names run anywhere.
PLATFORMS: Mapping[str, tuple[str, ...]] = {
    "mosaic_gpu": ("cuda", "gpu"),
    "mosaic_tpu": ("tpu",),
}


# What the Mosaic GPU kernels are written for: Hopper's copy engine and barriers.
CAPABILITY = 9.0


def unfit(platform: str) -> str | None:
    """Why the devices at hand run no Mosaic kernel.

    Args:
      platform: `"cpu"`, `"cuda"`, `"gpu"` or `"tpu"`.

    Returns:
      One line, or None where kernels run: on any TPU, on Hopper and newer with JAX 0.11, and on a
      platform that is not here, which is compiled for.
    """
    if platform not in PLATFORMS["mosaic_gpu"]:
        return None
    try:
        compat.mosaic_gpu()
    except NotImplementedError as error:
        return str(error)
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError:
        return None
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability.replace(".", "", 1).isdigit() and float(capability) >= CAPABILITY:
        return None
    return (
        f"the GPU kernels need Hopper or newer (compute capability {CAPABILITY:.1f}); this is "
        f"{device.device_kind} ({capability})"
    )


class NoImplementation(NotImplementedError):
    """No implementation took the call; `reasons` holds one exception for each that was tried."""

    def __init__(self, message: str, reasons: Mapping[str, Exception]):
        lines = [f"  {name}: {type(e).__name__}: {e}" for name, e in reasons.items()]
        super().__init__("\n".join([message, *lines]))
        self.reasons = dict(reasons)


def _order(
    implementations: Mapping[str, Implementation],
    implementation: None | str | Sequence[str],
    platform: str,
) -> list[str]:
    """The names to try: the caller's own, or all that run on the platform with `xla` last."""
    if not implementations:
        raise ValueError("implementations is empty; expected at least one name -> callable.")
    if implementation is None:
        fits = [n for n in implementations if platform in PLATFORMS.get(n, (platform,))]
        return sorted(fits, key=lambda name: name == "xla")  # stable: the op's own order otherwise
    # What is neither a name nor names is refused below, as a name that is not known.
    one = isinstance(implementation, str) or not isinstance(implementation, Sequence)
    names: list[Any] = [implementation] if one else list(implementation)
    if not names:
        raise ValueError("implementation=() names nothing to try; pass None to let it be chosen.")
    for name in names:
        if name not in implementations:
            known = ", ".join(repr(n) for n in implementations)
            raise ValueError(
                f"implementation={name!r} is not known here; expected None or one of {known}."
            )
    return names


def choose(
    implementations: Mapping[str, Implementation],
    implementation: None | str | Sequence[str] = None,
    *,
    platform: str,
) -> tuple[str, Implementation]:
    """Picks the first implementation that runs on a platform.

    Args:
      implementations: name -> callable, best first.
      implementation: None (the best for the platform), a name, or names in order of preference.
      platform: `"cpu"`, `"cuda"`, `"gpu"` or `"tpu"`, as `jax.default_backend()` says.

    Returns:
      The name and the callable.

    Raises:
      ValueError: an unknown name; the message lists the names of `implementations`.
      NoImplementation: none of the named ones runs on the platform; one reason for each.
    """
    refused: dict[str, Exception] = {}
    for name in _order(implementations, implementation, platform):
        runs_on = PLATFORMS.get(name, (platform,))
        if platform in runs_on:
            return name, implementations[name]
        refused[name] = NotImplementedError(f"runs on {' or '.join(runs_on)}, not on {platform}")
    raise NoImplementation(
        f"No implementation for platform {platform!r}; add 'xla' to implementation=, or pass None.",
        refused,
    )


def first_that_works(
    implementations: Mapping[str, Implementation],
    implementation: None | str | Sequence[str] = None,
    *,
    platform: str,
) -> Implementation:
    """The implementations as one callable that moves on when one raises NotImplementedError.

    A kernel says that it cannot take a shape, a dtype or a cell by raising `NotImplementedError`
    while it is traced; any other exception is a defect and goes straight to the caller.

    Args:
      implementations: name -> callable, best first.
      implementation: None (all that run on the platform, `xla` last), a name, or names in order.
      platform: `"cpu"`, `"cuda"`, `"gpu"` or `"tpu"`.

    Returns:
      A callable of the implementations' own signature.

    Raises:
      ValueError: an unknown name.
      NoImplementation: when called, if every implementation refused; it lists every reason.
    """
    names = _order(implementations, implementation, platform)

    def call(*args: Any, **kwargs: Any) -> Any:
        refused: dict[str, Exception] = {}
        for name in names:
            try:
                _, function = choose(implementations, name, platform=platform)
                if name == "mosaic_gpu" and (why := unfit(platform)):
                    raise NotImplementedError(why)
                return function(*args, **kwargs)
            except NotImplementedError as error:
                refused[name] = getattr(error, "reasons", {}).get(name, error)
        raise NoImplementation(f"Every implementation refused this call on {platform!r}:", refused)

    return call
