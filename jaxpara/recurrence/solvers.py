"""The solvers, configured: `jp.shooting(tol=1e-6)` gives a solver for `newton_scan`."""

import numbers

from jaxpara.recurrence.choice import Auto
from jaxpara.recurrence.solve import records
from jaxpara.recurrence.solve.linear_recurrences import METHODS
from jaxpara.recurrence.structure.proof import Block, Dense, Diagonal, Structure, Unchecked
from jaxpara.recurrence.system import Settings, Solver
from jaxpara.sizes import flag, positive, whole

PLATFORMS = ("cpu", "gpu", "tpu")
IMPLEMENTATIONS = (
    "mosaic_gpu",
    "mosaic_tpu",
    "xla",
    "mosaic_gpu_interpret",
    "mosaic_tpu_interpret",
)


def _positive(value) -> bool:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number and float(value) > 0


def _settings(**given) -> Settings:
    sizes = {name: given[name] for name in ("chunks", "window", "max_iters") if name in given}
    for name, value in sizes.items():
        if value is not None or name == "max_iters":
            positive(**{name: value})
    given["debug"] = flag(debug=given["debug"])
    settings = Settings(**{**given, **{name: whole(**{name: n}) for name, n in sizes.items()}})
    if not isinstance(settings.axis, str | None):
        raise TypeError(
            f"axis is {settings.axis!r}; expected the name of a mesh axis, such as 'time', or None"
        )
    if settings.tol is not None and not _positive(settings.tol):
        raise ValueError(f"tol is {settings.tol!r}; expected a positive number, such as 1e-6")
    if not isinstance(settings.structure, Diagonal | Block | Dense | Unchecked | None):
        raise TypeError(
            f"structure is {settings.structure!r}; expected jp.structure.Diagonal(), "
            "jp.structure.Block(...), jp.structure.Dense(...), one of them in jp.unchecked(...), "
            "or None to have it proved"
        )
    if settings.implementation not in (None, *IMPLEMENTATIONS):
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation is {settings.implementation!r}; expected one of {known}")
    if settings.linear not in (*METHODS, "auto"):
        known = ", ".join(METHODS)
        raise ValueError(f"linear is {settings.linear!r}; expected None or one of {known}")
    if settings.limit is not None and not _positive(settings.limit):
        raise ValueError(
            f"limit is {settings.limit!r}; expected how many times the cost of lax.scan a solve "
            "may have, such as 4.0, math.inf for no limit, or None for the default"
        )
    return settings


def shooting(
    *,
    chunks: int | None = None,
    tol: float | None = None,
    max_iters: int = 8,
    axis: str | None = None,
    structure: Structure | Unchecked | None = None,
    debug: bool = False,
    limit: float | None = None,
) -> Solver:
    """Multiple shooting: Newton on the states at chunk starts, chunks rolled out exactly.

    The main parallel solver. It takes 2 to 4 iterations where pointwise Newton takes 5 to 50
    or diverges. Its sequential depth is about `2 iterations sqrt(T)`.

    Args:
      chunks: time chunks (per device); default about the square root of the length.
      tol: size of the next Newton correction at which a solve counts. It is relative to the
        magnitude of the element over the last few chunks or steps; there is no absolute part.
        The states are then corrected by it once more. Default: 80 ulp of float32 or float64. A
        value from 8 to 80 ulp means 80 ulp, because rounding may keep a correction there.
        Narrower states, and steps whose derivative is not proved, count by bitwise agreement
        only, whatever `tol`.
      max_iters: iterations before the rest is completed sequentially.
      axis: mesh axis over which time is sharded, inside `shard_map`: `xs` and `ys` are
        local shards, the initial and the final carry are replicated.
      structure: of the Jacobian, in place of the proved one. A sparser one may be wrong. It is
        refused unless it is written `jp.unchecked(jp.structure.Diagonal())`.
      debug: check the structure against one random vjp of the step, at the state that
        the solve ended in, and raise if it is too sparse.
      limit: where a block is larger than 8 x 8, how many times the estimated time and bytes of
        `lax.scan` the solve may take. Beyond it the call runs step by step, and one line in the
        log says so. Default: 4. A solve of less than 10 ms and 1 GiB always runs. With
        `math.inf` every solve runs.

    Returns:
      A `Solver` for `newton_scan` and `solve_scan`.

    Raises:
      ValueError: a setting out of range.
      TypeError: `structure` is no structure, or `axis` no name of a mesh axis.

    Examples:
      >>> import jax.numpy as jnp, jaxpara as jp
      >>> step, xs = lambda h, x: (jnp.tanh(0.5 * h + x), h), jnp.linspace(-1.0, 1.0, 1000)
      >>> solver = jp.shooting(chunks=20)
      >>> _, info = jp.solve_scan(step, jnp.zeros(()), xs, solver=solver)
      >>> bool(info.converged), info.starts.shape
      (True, (20,))

    References: [shooting], [pararnn]
    """
    settings = _settings(
        chunks=chunks,
        tol=tol,
        max_iters=max_iters,
        axis=axis,
        structure=structure,
        debug=debug,
        limit=limit,
    )
    return records.SHOOTING._replace(settings=settings)


def fused(
    *,
    chunks: int | None = None,
    window: int | None = None,
    tol: float | None = None,
    max_iters: int = 8,
    implementation: str | None = None,
    structure: Structure | Unchecked | None = None,
    debug: bool = False,
    limit: float | None = None,
) -> Solver:
    """Multiple shooting in one kernel that is generated from the step, for GPU and TPU.

    For steps that are elementwise over up to a few state leaves of one shape. Inputs are read
    once and states are written once. `shooting` solves a step that no kernel takes, and every step
    on other platforms. The reason is logged once, and `jp.explain_choice` names it. No kernel has
    run on a GPU or a TPU yet: its values are tested in simulators, and its speed is not known.

    Args:
      chunks: chunks of a window of time, rolled out side by side; None lets the kernel choose.
      window: steps that are solved together; the state between windows is exact.
      tol, max_iters: as for `shooting`, of each window.
      implementation: "mosaic_gpu", "mosaic_tpu", "xla" (the same functions by `lax.scan`), or
        None for the kernel of the platform; "mosaic_tpu_interpret" and "mosaic_gpu_interpret"
        run a kernel's body slowly on any platform.
      structure, debug, limit: as for `shooting`.

    Returns:
      A `Solver` for `newton_scan` and `solve_scan`.

    Raises:
      ValueError: a setting out of range.
      TypeError: `structure` is no structure.

    Examples:
      >>> import jax.numpy as jnp, jaxpara as jp
      >>> step, xs = lambda h, x: (jnp.tanh(0.5 * h + x), h), jnp.ones((64, 2, 8))
      >>> solver = jp.fused(implementation="xla")  # the kernel's own functions, on any platform
      >>> _, info = jp.solve_scan(step, jnp.zeros((2, 8)), xs, solver=solver)
      >>> bool(info.converged)
      True

    References: [shooting], [pararnn]
    """
    settings = _settings(
        chunks=chunks,
        window=window,
        tol=tol,
        max_iters=max_iters,
        linear="kernel",
        implementation=implementation,
        structure=structure,
        debug=debug,
        limit=limit,
    )
    return records.FUSED._replace(settings=settings)


def newton(
    *,
    tol: float | None = None,
    max_iters: int = 16,
    linear: str | None = None,
    axis: str | None = None,
    structure: Structure | Unchecked | None = None,
    debug: bool = False,
    limit: float | None = None,
) -> Solver:
    """Pointwise Newton over all states (DEER, ParaRNN), with the proved Jacobian.

    Args:
      tol, max_iters, axis, structure, debug, limit: as for `shooting`.
      linear: how the linear recurrence of an iteration, and of the adjoint, is solved:
        "sequential" (`lax.scan`), "associative", "chunked" or "kernel". None takes the best one
        measured on a CPU, and a guess on accelerators; see `jp.linear_recurrence`.

    Returns:
      A `Solver` for `newton_scan` and `solve_scan`.

    Raises:
      ValueError: a setting out of range.
      TypeError: `structure` is no structure, or `axis` no name of a mesh axis.

    Examples:
      >>> import jax.numpy as jnp, jaxpara as jp
      >>> weights, xs = jnp.full((3, 3), 0.2), jnp.sin(jnp.arange(600.0).reshape(200, 3))
      >>> step = lambda h, x: (jnp.tanh(h @ weights + x), h)
      >>> solver = jp.newton(linear="associative")
      >>> _, info = jp.solve_scan(step, jnp.zeros(3), xs, solver=solver)
      >>> bool(info.converged), int(info.fallback_steps)
      (True, 0)

    References: [deer], [pararnn]
    """
    settings = _settings(
        tol=tol,
        max_iters=max_iters,
        linear="auto" if linear is None else linear,
        axis=axis,
        structure=structure,
        debug=debug,
        limit=limit,
    )
    return records.NEWTON._replace(settings=settings)


def quasi_newton(
    *,
    tol: float | None = None,
    max_iters: int = 32,
    linear: str | None = None,
    axis: str | None = None,
    structure: Structure | Unchecked | None = None,
    debug: bool = False,
    limit: float | None = None,
) -> Solver:
    """Pointwise Newton with only the diagonal of the Jacobian.

    For dense cells. The linear recurrence of an iteration is diagonal, in exchange for more
    iterations. The diagonal is read off K tangents, where K is the size of a block. Once the
    updates are small, a few iterations of `newton` follow, which certify the states. For
    diagonal cells it is the same as `newton`. The adjoint always uses the full Jacobian.

    Args:
      tol, max_iters, linear, axis, structure, debug, limit: as for `newton`.

    Returns:
      A `Solver` for `newton_scan` and `solve_scan`.

    Raises:
      ValueError: a setting out of range.
      TypeError: `structure` is no structure, or `axis` no name of a mesh axis.

    Examples:
      >>> import jax.numpy as jnp, jaxpara as jp
      >>> weights, xs = jnp.full((3, 3), 0.2), jnp.sin(jnp.arange(600.0).reshape(200, 3))
      >>> step = lambda h, x: (jnp.tanh(h @ weights + x), h)
      >>> _, info = jp.solve_scan(step, jnp.zeros(3), xs, solver=jp.quasi_newton())
      >>> bool(info.converged), int(info.fallback_steps)
      (True, 0)

    References: [elk]
    """
    settings = _settings(
        tol=tol,
        max_iters=max_iters,
        linear="auto" if linear is None else linear,
        axis=axis,
        structure=structure,
        debug=debug,
        limit=limit,
    )
    return records.QUASI_NEWTON._replace(settings=settings)


def jacobi(
    *,
    tol: float | None = None,
    max_iters: int = 64,
    linear: str | None = None,
    axis: str | None = None,
    structure: Structure | Unchecked | None = None,
    debug: bool = False,
) -> Solver:
    """Jacobi (Picard) iteration: the step applied to all times at once.

    The number of iterations is about the length of the recurrence's memory. Once the updates are
    small, a few iterations of `newton` follow, which certify the states. They hold no Jacobians
    larger than 16 x 16. The adjoint takes a Jacobian.

    Args:
      tol, max_iters, axis, structure, debug: as for `shooting`.
      linear: how the adjoint is solved, see `newton`.

    Returns:
      A `Solver` for `newton_scan` and `solve_scan`.

    Raises:
      ValueError: a setting out of range.
      TypeError: `structure` is no structure, or `axis` no name of a mesh axis.

    Examples:
      >>> import jax.numpy as jnp, jaxpara as jp
      >>> step, xs = lambda h, x: (0.1 * jnp.tanh(h) + x, h), jnp.ones(1000)  # short memory
      >>> _, info = jp.solve_scan(step, jnp.zeros(()), xs, solver=jp.jacobi())
      >>> bool(info.converged), int(info.iterations) < 15
      (True, True)

    References: [deer]
    """
    settings = _settings(
        tol=tol,
        max_iters=max_iters,
        linear="auto" if linear is None else linear,
        axis=axis,
        structure=structure,
        debug=debug,
    )
    return records.JACOBI._replace(settings=settings)


def sequential(*, structure: Structure | Unchecked | None = None, debug: bool = False) -> Solver:
    """`lax.scan` forward, implicit adjoint backward.

    Often the fastest solver on a CPU. The backward pass evaluates all Jacobians side by side
    and then runs one tight linear recurrence.

    Args:
      structure, debug: as for `shooting`.

    Returns:
      A `Solver` for `newton_scan` and `solve_scan`.

    Raises:
      TypeError: `structure` is no structure.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxpara as jp
      >>> step, xs = lambda h, x: (jnp.tanh(0.5 * h + x), h), jnp.ones(1000)
      >>> scan = lambda init: jp.newton_scan(step, init, xs, solver=jp.sequential())[0]
      >>> bool(scan(0.0) == jax.lax.scan(step, 0.0, xs)[0])
      True

    References: [jax]
    """
    settings = _settings(linear="sequential", structure=structure, debug=debug)
    return records.SEQUENTIAL._replace(settings=settings)


def auto(*, platform: str | None = None) -> Auto:
    """Chooses by a map of measurements: the path that gained most over `lax.scan`.

    The nearest measured point decides, in block size, length, size of the state and width of the
    inputs beside the state. The maps of CPUs are of JAX 0.10, 0.11 and 0.12; another version takes
    the nearest older one. Plain `lax.scan` runs where no path gained beyond noise.

    Args:
      platform: "cpu", "gpu" or "tpu"; default the default backend. See
        `jp.explain_choice` for what is chosen and why.

    Returns:
      The value that `solver=None` means. Each call chooses from its platform, structure and
      shapes.

    Raises:
      ValueError: an unknown platform.

    Examples:
      >>> import jax.numpy as jnp, jaxpara as jp
      >>> step = lambda h, x: (jnp.tanh(0.5 * h + x), h)
      >>> h, ys = jp.newton_scan(step, jnp.zeros(4), jnp.ones((500, 4)), solver=jp.auto())
      >>> ys.shape
      (500, 4)
    """
    if platform not in (None, *PLATFORMS):
        known = ", ".join(map(repr, PLATFORMS))
        raise ValueError(f"platform is {platform!r}; expected one of {known}, or None for this one")
    return Auto(platform)
