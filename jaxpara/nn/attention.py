"""Causal attention with rotary positions, and the keys and values seen so far as state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpara.nn.layers import linear
from jaxpara.sizes import needed, positive
from jaxpara.types import AnyArray


class AttentionState(NamedTuple):
    """What attention carries: O(max_length) memory.

    Attributes:
      keys: rotated keys, zero where nothing has been written yet.
      values: values.
      position: number of tokens seen, a scalar.
      first: index of the first token of the current document, for each sequence.
    """

    keys: Float[Array, "batch max_length heads size"]
    values: Float[Array, "batch max_length heads size"]
    position: Int[Array, ""]
    first: Int[Array, " batch"]


def rotate(
    x: Float[Array, "batch time heads size"], positions: Int[Array, " time"], base: float
) -> Float[Array, "batch time heads size"]:
    """Turns the pair `(x_i, x_{i + size/2})` by `position * base^(-2i/size)`, in float32.

    Scores of rotated queries and keys then depend on the difference of positions only.

    References: [rope].
    """
    half = x.shape[-1] // 2
    wide = jnp.promote_types(x.dtype, jnp.float32)
    angles = positions[:, None].astype(wide) * base ** -(jnp.arange(half, dtype=wide) / half)
    # A table, which XLA would otherwise compute anew for every batch and head.
    cos, sin = jax.lax.optimization_barrier((jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]))
    a, b = x[..., :half].astype(wide), x[..., half:].astype(wide)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _attend(q, keys, values, seen, raw, prefix, probabilities):
    """Attention of some queries to the cache and, not rotated, to trained keys and values."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bthd,bshd->bhts", q, keys, preferred_element_type=wide)
    scores, n = jnp.where(seen[:, None], scores, -jnp.inf), 0
    if prefix is not None:
        prefix = jax.tree.map(lambda p: p.astype(q.dtype), prefix)
        n = prefix["keys"].shape[0]
        first = jnp.einsum("bthd,phd->bhtp", raw, prefix["keys"], preferred_element_type=wide)
        scores = jnp.concatenate([first, scores], axis=-1)
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5)
    if probabilities is not None:
        weights = probabilities(weights)
    weights = weights.astype(q.dtype)
    mean = jnp.einsum("bhts,bshd->bthd", weights[..., n:], values)
    if prefix is None:
        return mean
    return mean + jnp.einsum("bhtp,phd->bthd", weights[..., :n], prefix["values"])


# Queries of a block, and blocks at most: more of them leave out more, and take longer to compile.
_BLOCK, _BLOCKS = 64, 8


def _in_blocks(q, keys, values, seen, raw, prefix, probabilities):
    """The same for all queries, block by block.

    Where the sequence fills the cache, its first token is in the first slot, and a block sees no
    slot behind its own: nearly half of the scores are not computed.
    """
    time, slots = q.shape[1], keys.shape[1]
    size = max(_BLOCK, -(-time // _BLOCKS))
    out = []
    for begin in range(0, time, size):
        end = min(begin + size, time)
        last = end if time == slots else slots
        rows = slice(begin, end)
        out.append(
            _attend(
                q[:, rows],
                keys[:, :last],
                values[:, :last],
                seen[:, rows, :last],
                raw[:, rows],
                prefix,
                probabilities,
            )
        )
    return jnp.concatenate(out, axis=1)


def rotary_attention(
    width: int,
    *,
    heads: int,
    base: float,
    prefix: int = 0,
    probabilities: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """`softmax(q k^T / sqrt(size) + mask) v` over the cache, without the output matrix.

    Args:
      width: size of the last axis of input and output.
      heads: number of heads.
      base: of the rotary angles.
      prefix: number of trained keys and values that every query also sees; they have no position,
        so each document sees them alike.
      probabilities: an elementwise function of the softmax before it is multiplied with the
        values, such as `jaxpara.weights.unit_grid(bits=6)`; None: the identity.

    Returns:
      `init(key)`, `start(params, batch_size, max_length, dtype)` and
      `run(params, state, x, reset)` as in `Mixer`. More tokens than `max_length` give NaN,
      because their number is not known while tracing.

    Raises:
      ValueError: if a size is not positive, the width does not split into heads of even size, or
        the prefix is negative; from `run`, if a single call is longer than `max_length`.

    References: [rope], [prefix_tuning].
    """
    positive(width=width, heads=heads)
    if needed(prefix=prefix) < 0:
        raise ValueError(f"prefix={prefix}: give the number of trained keys and values, 0 or more")
    if width % (2 * heads):
        raise ValueError(
            f"width={width} does not split into heads={heads} of even size (rotary positions "
            f"turn pairs): make width a multiple of {2 * heads}, or change heads"
        )
    size = width // heads
    project = linear(width, 3 * width)

    def init(key):
        params = project.init(key)
        if not prefix:
            return params
        begin = 0.02 * jax.random.normal(jax.random.fold_in(key, 1), (2, prefix, heads, size))
        return {**params, "prefix": {"keys": begin[0], "values": begin[1]}}

    def start(params, batch_size, max_length, dtype):
        del params
        shape = (batch_size, max_length, heads, size)
        return AttentionState(
            keys=jnp.zeros(shape, dtype),
            values=jnp.zeros(shape, dtype),
            position=jnp.zeros((), jnp.int32),
            first=jnp.zeros(batch_size, jnp.int32),
        )

    def run(
        params: dict,
        state: AttentionState,
        x: Float[AnyArray, "batch time width"],
        reset: Bool[Array, "batch time"] | None,
    ) -> tuple[AttentionState, Float[Array, "batch time width"]]:
        batch, time = x.shape[:2]
        max_length = state.keys.shape[1]
        if time > max_length:
            raise ValueError(
                f"a sequence of {time} tokens does not fit a state of max_length={max_length}: "
                "call start with a larger max_length"
            )
        q, k, v = (
            part.reshape(batch, time, heads, size)
            for part in jnp.split(project.apply(params, x), 3, axis=-1)
        )
        positions = state.position + jnp.arange(time, dtype=jnp.int32)
        raw, q, k = q, rotate(q, positions, base), rotate(k, positions, base)
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), state.position, 1)
            for old, new in ((state.keys, k), (state.values, v))
        )
        first = jnp.broadcast_to(state.first[:, None], (batch, time))
        if reset is not None:
            first = jnp.maximum(first, jax.lax.cummax(jnp.where(reset, positions, 0), axis=1))
        slots = jnp.arange(max_length, dtype=jnp.int32)
        seen = (slots <= positions[:, None]) & (slots >= first[:, :, None])
        cached = keys.astype(q.dtype), values.astype(q.dtype)
        with jax.named_scope("attention"):
            y = _in_blocks(q, *cached, seen, raw, params.get("prefix"), probabilities)
        # dynamic_update_slice would overwrite the newest slots in silence.
        y = jnp.where(state.position + time <= max_length, y, jnp.nan)
        state = AttentionState(keys, values, state.position + time, first[:, -1])
        return state, y.reshape(batch, time, width)

    return init, start, run
