"""Where each primitive carries the axes of its operands.

`moves(eqn)[out][operand]` is a tuple with one entry for each axis of the output:
the axis of the operand with the same index there, or None where output entries
may depend on every index of the operand. `None` in place of the tuple: the
operand is not followed (a predicate, an index). A primitive that is not listed
has no axis in common with anything, which is always safe.
"""

from collections.abc import Sequence
from typing import Any

Sources = tuple[int | None, ...]

ELEMENTWISE = frozenset(
    """abs acos acosh add add_any asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
    conj convert_element_type copy copy_p cos cosh digamma div erf erf_inv erfc exp exp2 expm1
    floor igamma igamma_grad_a igammac imag integer_pow lgamma log log1p log2 logistic max min mul
    name neg nextafter one_minus_square pbroadcast pcast polygamma polynomial pow preduced pvary
    random_gamma_grad real reduce_precision reduced_vary_cast reduced_vary_cast_p
    regularized_incomplete_beta relayout rem reshard round rsqrt sharding_constraint sign sin sinh
    sqrt square stop_gradient sub tan tanh vary_unreduced_cast vary_unreduced_cast_p
    with_memory_space_constraint zeta complex layout_constraint""".split()
)
PAIRWISE = frozenset({"optimization_barrier", "device_put"})
CUMULATIVE = frozenset({"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"})


def _aligned(inner, outer) -> Sources:
    """Axis i from axis i where the sizes agree; size one may have been broadcast."""
    if len(inner) != len(outer):
        return (None,) * len(outer)
    return tuple(i if a == b else None for i, (a, b) in enumerate(zip(inner, outer, strict=True)))


def _nothing(shape) -> Sources:
    return (None,) * len(shape)


def _but(shape, *dropped: int) -> Sources:
    return tuple(None if i in dropped else i for i in range(len(shape)))


def _inverse(sources_of_operand: dict[int, int], out_ndim: int) -> Sources:
    """From {operand axis: output axis} to one source for each output axis."""
    back = {out: axis for axis, out in sources_of_operand.items()}
    return tuple(back.get(i) for i in range(out_ndim))


def _dot_general(eqn, shapes, out):
    (contract_l, contract_r), (batch_l, batch_r) = eqn.params["dimension_numbers"]
    free_l = [i for i in range(len(shapes[0])) if i not in (*contract_l, *batch_l)]
    free_r = [i for i in range(len(shapes[1])) if i not in (*contract_r, *batch_r)]
    left = {a: i for i, a in enumerate([*batch_l, *free_l])}
    right = {a: i for i, a in enumerate(batch_r)}
    right |= {a: len(batch_l) + len(free_l) + i for i, a in enumerate(free_r)}
    return [_inverse(left, len(out)), _inverse(right, len(out))]


def _gather(eqn, shapes, out):
    dims, sizes, shape = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], shapes[0]
    gone = {*dims.collapsed_slice_dims, *dims.operand_batching_dims}
    windows = [i for i in range(len(shape)) if i not in gone]
    kept = {
        axis: place
        for axis, place in zip(windows, dims.offset_dims, strict=True)
        if sizes[axis] == shape[axis] and axis not in dims.start_index_map
    }
    rest = [i for i in range(len(out)) if i not in dims.offset_dims]
    for axis, batch in zip(
        dims.operand_batching_dims, dims.start_indices_batching_dims, strict=True
    ):
        kept[int(axis)] = rest[batch]
    return [_inverse(kept, len(out)), None]


def _scatter(eqn, shapes, out):
    dims = eqn.params["dimension_numbers"]
    updates = shapes[2]
    gone = {*dims.inserted_window_dims, *dims.operand_batching_dims}
    windows = [i for i in range(len(out)) if i not in gone]
    sources: list[int | None] = [None] * len(out)
    for axis, place in zip(windows, dims.update_window_dims, strict=True):
        if updates[place] == out[axis] and axis not in dims.scatter_dims_to_operand_dims:
            sources[axis] = place
    rest = [i for i in range(len(updates)) if i not in dims.update_window_dims]
    for axis, batch in zip(
        dims.operand_batching_dims, dims.scatter_indices_batching_dims, strict=True
    ):
        sources[axis] = rest[batch]
    return [tuple(range(len(out))), None, tuple(sources)]


def _conv(eqn, shapes, out):
    """The batch axis of the left operand; its channels too when convolved one by one."""
    dims, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    (batch, channel), (out_batch, out_channel) = dims.lhs_spec[:2], dims.out_spec[:2]
    kept = {batch: out_batch} if eqn.params["batch_group_count"] == 1 else {}
    if kept and groups == shapes[0][channel] == out[out_channel]:
        kept[channel] = out_channel
    return [_inverse(kept, len(out)), _nothing(out)]


def _reduce_window(eqn, shapes, out):
    window, padding = eqn.params["window_dimensions"], eqn.params["padding"]
    touched = [i for i, w in enumerate(window) if w != 1 or tuple(padding[i]) != (0, 0)]
    kept = _aligned(shapes[0], out)
    return [tuple(None if i in touched else s for i, s in enumerate(kept))]


def _pooled_back(eqn, shapes, out):
    """Windows of the second operand, into or out of which the first one goes."""
    return [*_reduce_window(eqn, shapes[:1], out), _reduce_window(eqn, shapes[1:], out)[0]]


def _reduce(eqn, shapes, out):
    """Several operands at once, then as many initial values."""
    kept = _without(eqn, shapes, out, eqn.params["dimensions"])[0]
    operands = len(shapes) // 2
    return [kept] * operands + [_nothing(out)] * operands


def _matrices(eqn, shapes, out):
    """Functions of matrices: all axes but the last two number them."""
    batch = len(shapes[0]) - 2
    sources = tuple(i if i < batch else None for i in range(len(out)))
    return [sources if len(s) >= batch else _nothing(out) for s in shapes]


def _triangular_solve(eqn, shapes, out):
    """Each column of the right-hand side (row, from the right) has a solution of its own."""
    mixed = len(out) - (2 if eqn.params["left_side"] else 1)
    return [_matrices(eqn, shapes, out)[0], _but(out, mixed)]


def _tridiagonal_solve(eqn, shapes, out):
    batch = tuple(i if i < len(out) - 2 else None for i in range(len(out)))
    return [batch, batch, batch, _but(out, len(out) - 2)]


def _fft(eqn, shapes, out):
    last = len(out) - len(eqn.params["fft_lengths"])
    return [tuple(i if i < last else None for i in range(len(out)))]


def _stack(eqn, shapes, out):
    new = eqn.params["axis"] % len(out)
    return [tuple(None if i == new else i - (i > new) for i in range(len(out)))] * len(shapes)


def _reshape(eqn, shapes, out):
    """Axes that are single between equal products of sizes; axes of size one come and go."""
    order = reshape_order(eqn)
    kept: dict[int, int] = {}
    for inner, outer in reshape_groups([shapes[0][i] for i in order], out):
        if len(inner) == len(outer) == 1:
            kept[order[inner[0]]] = outer[0]
    return [_inverse(kept, len(out)), *[None] * (len(shapes) - 1)]


def reshape_order(eqn) -> tuple[int, ...]:
    """In which order a reshape reads the axes of its operand."""
    return tuple(eqn.params["dimensions"] or range(eqn.invars[0].aval.ndim))


def reshape_groups(before, after) -> list[tuple[list[int], list[int]]]:
    """The finest split of a reshape into runs of axes that become runs of axes.

    Axes of size one are left out; an empty array has no groups.
    """
    old = [i for i, n in enumerate(before) if n != 1]
    new = [i for i, n in enumerate(after) if n != 1]
    if any(n == 0 for n in before):
        return []
    groups, i, j = [], 0, 0
    while i < len(old) and j < len(new):
        inner, outer = [old[i]], [new[j]]
        a, b, i, j = before[old[i]], after[new[j]], i + 1, j + 1
        while a != b:
            if a < b:
                inner.append(old[i])
                a, i = a * before[old[i]], i + 1
            else:
                outer.append(new[j])
                b, j = b * after[new[j]], j + 1
        groups.append((inner, outer))
    return groups


def _broadcast_in_dim(eqn, shapes, out):
    places = eqn.params["broadcast_dimensions"]
    kept = {i: p for i, p in enumerate(places) if shapes[0][i] == out[p]}
    return [_inverse(kept, len(out)), *[None] * (len(shapes) - 1)]


def _without(eqn, shapes, out, dropped):
    kept = [i for i in range(len(shapes[0])) if i not in dropped]
    return [tuple(kept)] if len(kept) == len(out) else [_nothing(out)]


def _pad(eqn, shapes, out):
    config = eqn.params["padding_config"]
    return [
        tuple(i if tuple(c) == (0, 0, 0) else None for i, c in enumerate(config)),
        _nothing(out),
    ]


_RULES = {
    "dot_general": _dot_general,
    "gather": _gather,
    "conv_general_dilated": _conv,
    "reduce_window_sum": _reduce_window,
    "reduce_window_max": _reduce_window,
    "reduce_window_min": _reduce_window,
    "select_and_gather_add": _pooled_back,
    "select_and_scatter_add": _pooled_back,
    "reduce": _reduce,
    "fft": _fft,
    "triangular_solve": _triangular_solve,
    "tridiagonal_solve": _tridiagonal_solve,
    "stack": _stack,
    "tie": lambda e, s, o: [None, _but(o)],
    "unstack": lambda e, s, o: _without(e, s, o, [e.params["axis"] % len(s[0])]),
    "approx_top_k": lambda e, s, o: [_but(o, e.params["reduction_dimension"] % len(o))],
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast_in_dim,
    "pad": _pad,
    "squeeze": lambda e, s, o: _without(e, s, o, [d % len(s[0]) for d in e.params["dimensions"]]),
    "transpose": lambda e, s, o: [tuple(e.params["permutation"])],
    "select_n": lambda e, s, o: [None, *[_aligned(t, o) for t in s[1:]]],
    "slice": lambda e, s, o: [_aligned(s[0], o)],
    "rev": lambda e, s, o: [_but(o, *e.params["dimensions"])],
    "concatenate": lambda e, s, o: [_but(o, e.params["dimension"])] * len(s),
    "dynamic_slice": lambda e, s, o: [_aligned(s[0], o), *[None] * (len(s) - 1)],
    "dynamic_update_slice": lambda e, s, o: [
        _but(o),
        _aligned(s[1], o),
        *[None] * (len(s) - 2),
    ],
    "tile": lambda e, s, o: [_aligned(s[0], o)],
    "top_k": lambda e, s, o: [_but(o, e.params["axis"] % len(o))],
    "split": lambda e, s, o: [_but(o, e.params["axis"])],
    "sort": lambda e, s, o: [_but(o, e.params["dimension"])] * len(s),
}


_RULES |= dict.fromkeys(
    """cholesky eig eigh geqrf hessenberg householder_product lu qr schur svd symmetric_product
    tridiagonal""".split(),
    _matrices,
)


def moves(eqn: Any) -> Sequence[Sequence[Sources | None]]:
    """For each output and operand of an equation, where the output's axes come from.

    Args:
      eqn: an equation of a jaxpr; control flow and calls are not for this table.

    Returns:
      `[output][operand]`, as in the docstring of this module.
    """
    name = eqn.primitive.name
    shapes = [v.aval.shape for v in eqn.invars]
    outs = [v.aval.shape for v in eqn.outvars]
    if name in PAIRWISE and len(shapes) == len(outs):
        return [
            [_but(out) if i == o else None for i in range(len(shapes))]
            for o, out in enumerate(outs)
        ]
    if name in ELEMENTWISE:
        return [[_aligned(s, out) for s in shapes] for out in outs]
    if name in CUMULATIVE:
        return [[_but(out, eqn.params["axis"])] for out in outs]
    if name.startswith("reduce_") and "axes" in eqn.params:
        return [_without(eqn, shapes, out, eqn.params["axes"]) for out in outs]
    if name.startswith("scatter"):
        return [_scatter(eqn, shapes, out) for out in outs]
    if name in _RULES:
        return [_RULES[name](eqn, shapes, out) for out in outs]
    return [[_nothing(out)] * len(shapes) for out in outs]
