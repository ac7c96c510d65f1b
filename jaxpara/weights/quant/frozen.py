"""Weights rounded once and kept as integers: bases for adapters, and post-training quantisation.

The floats are gone after `attach`. A base that a later member of a chain freezes is not trained.
Without such a member the base trains only its scales, which is PEQA. [qlora], [peqa]
"""

import jax.numpy as jnp

from jaxpara.tree import Where
from jaxpara.weights.method import Method
from jaxpara.weights.quant.activations import check_activations
from jaxpara.weights.quant.array import Stored, packed_values, store, stored_method
from jaxpara.weights.quant.grid import check_group, integers, make_grid
from jaxpara.weights.quant.ranges import check_ranges, fit
from jaxpara.weights.reparam import Reparam, reparam
from jaxpara.weights.weight import dense


def _rounded(stored: Stored, key, base):
    w = jnp.asarray(dense(base))
    check_group(stored.grid, w.shape)
    parts = fit(stored.grid, w, stored.ranges or "absmax")
    kept = packed_values(stored.grid, integers(stored.grid, w, parts))
    return kept, parts, _method(stored._replace(dtype=w.dtype.name))


def _merge_rounded(stored: Stored, base, parts):
    return store(stored.grid, base, parts, stored.activations, dtype=stored.dtype)


def _method(stored: Stored) -> Method:
    return stored_method(f"rtn(bits={stored.grid.bits})", stored, _rounded, _merge_rounded)


def rtn(
    *,
    bits: int = 4,
    group: int | None = None,
    affine: bool = False,
    ranges: str = "absmax",
    activations: int | None = None,
    where: Where = None,
) -> Reparam:
    """Rounds a weight to the nearest point of an integer grid, once, and keeps the integers.

    Post-training quantisation without data, and an integer base for adapters:
    `chain(rtn(), lora())` is QLoRA on integers. Integers are packed where the rows allow it.

    Args:
      bits, group, affine, ranges, activations: as for `fake_quant`.
      where: the leaves: a glob (`*` within a name, `**` across names), a compiled regular
        expression, or a function of (path, leaf); None: floating leaves of two or more axes.

    Returns:
      The reparameterisation; only scales and offsets can be trained.

    Raises:
      ValueError: as for `fake_quant`.

    References: [qlora], [peqa].
    """
    check_ranges(ranges)
    activations = check_activations(activations)
    stored = Stored(make_grid(bits, group, False, affine), activations, ranges)
    return reparam(_method(stored), where)
