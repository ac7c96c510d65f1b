"""Paths of a tree, the leaves that a pattern selects, and trees taken apart and put together."""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpara import compat

Where = str | re.Pattern[str] | Callable[[str, Any], bool] | None
IsLeaf = Callable[[Any], bool] | None


def path_of(keys: Sequence[Any]) -> str:
    """A path as text: the names of its steps joined by `/`.

    Args:
      keys: as `jax.tree_util` gives them.

    Returns:
      For example `blocks/0/kernel`.
    """

    def name(key: Any) -> str:
        for attribute in ("key", "idx", "name"):
            if hasattr(key, attribute):
                return str(getattr(key, attribute))
        return str(key)

    return "/".join(map(name, keys))


def is_matrix(leaf: Any) -> bool:
    """Whether a leaf is a floating array of two or more axes.

    Args:
      leaf: any node of a tree.

    Returns:
      False for numbers, functions and whatever else has no shape and dtype.
    """
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return False
    return len(leaf.shape) >= 2 and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def shapes_of(tree: Any) -> Any:
    """The tree with shapes in place of its arrays.

    Args:
      tree: any; leaves that are not arrays do not change.

    Returns:
      The tree.
    """

    def one(leaf):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    return jax.tree.map(one, tree)


class _Text(str):
    """Text that prints without quotes."""

    __repr__ = str.__str__


def _has_numbers(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array | np.ndarray) or compat.is_tracer(leaf):
        return False
    gone = isinstance(leaf, jax.Array) and leaf.is_deleted()
    return not gone and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def short(tree: Any, most: int = 0) -> str:
    """A tree as text, with types such as `float32[8,3]` in place of arrays.

    Args:
      tree: any pytree.
      most: arrays of up to this many numbers are printed as they are.

    Returns:
      The text.
    """

    def one(leaf):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            return leaf
        if _has_numbers(leaf) and leaf.size <= most:
            return _Text(np.asarray(leaf))
        return _Text(f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]")

    return repr(jax.tree.map(one, tree))


def matcher(where: Where) -> Callable[[str, Any], bool]:
    """The selection of a `where=`, as a predicate on (path, leaf).

    Args:
      where: a glob on the whole path (`*` within one name, `**` across names), a compiled
        regular expression that must match the whole path, a predicate, or None for floating
        leaves with two or more axes.

    Returns:
      The predicate.

    Raises:
      TypeError: `where` is none of these.
    """
    if where is None:
        return lambda path, leaf: is_matrix(leaf)
    if isinstance(where, str):
        translated = re.escape(where).replace(r"\*\*", ".*").replace(r"\*", "[^/]*")
        where = re.compile(translated)
    if isinstance(where, re.Pattern):
        pattern = where
        return lambda path, leaf: pattern.fullmatch(path) is not None
    if callable(where):
        return where
    raise TypeError(
        f"where={where!r}: expected a glob such as 'blocks/*/kernel', a compiled regular "
        "expression, or a function of (path, leaf)"
    )


def by_path(tree: Any, *, is_leaf: IsLeaf = None) -> dict[str, Any]:
    """The leaves of a tree by their paths.

    Args:
      tree: any pytree.
      is_leaf: as for `jax.tree.map`.

    Returns:
      Leaf by path, in the order of the tree.

    Raises:
      ValueError: two leaves have the same path, as those of `{"a": {"b": x}, "a/b": y}` do.
    """
    found: dict[str, Any] = {}
    places: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        path = path_of(keys)
        if path in found:
            both = map(jax.tree_util.keystr, (places[path], keys))
            raise ValueError(
                f"the leaves {' and '.join(both)} have the same path {path!r}: rename one"
            )
        found[path], places[path] = leaf, keys
    return found


def select(tree: Any, where: Where, *, is_leaf: IsLeaf = None) -> dict[str, Any]:
    """The leaves that a pattern selects.

    Args:
      tree: any pytree.
      where: see `matcher`.
      is_leaf: as for `jax.tree.map`.

    Returns:
      Leaf by path, in the order of the tree.

    Raises:
      ValueError: nothing is selected (names the paths that come nearest), or two leaves have the
        same path.
    """
    wanted = matcher(where)
    known = by_path(tree, is_leaf=is_leaf)
    found = {path: leaf for path, leaf in known.items() if wanted(path, leaf)}
    if found:
        return found
    text = where if isinstance(where, str) else getattr(where, "pattern", "")
    near = difflib.get_close_matches(text, known, n=3, cutoff=0.3) or list(known)[:3]
    default = " (floating leaves of two or more axes)" if where is None else ""
    raise ValueError(
        f"where={where!r}{default} selects none of the {len(known)} leaves; "
        + (f"near it are {', '.join(map(repr, near))}" if near else "the tree is empty")
    )


def marked(tree: Any, where: Where) -> Any:
    """A mask for `split` of the leaves that a pattern selects.

    Args:
      tree: any pytree.
      where: the leaves: a glob (`*` within a name, `**` across names), a compiled regular
        expression, or a function of (path, leaf); None: floating leaves of two or more axes.

    Returns:
      Booleans in the structure of the tree.

    Raises:
      ValueError: as for `select`.
    """
    found = select(tree, where)
    return jax.tree_util.tree_map_with_path(lambda keys, _: path_of(keys) in found, tree)


def _differ(first: Any, second: Any, is_leaf: IsLeaf = None) -> str:
    """Where the structures of two trees differ."""
    one, other = (
        [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]
        for tree in (first, second)
    )
    for path in [*one, *other]:
        if (path in one) != (path in other):
            return f"only the {'first' if path in one else 'second'} has a leaf at {path!r}"
    return "in the types of their nodes"


def split(tree: Any, mask: Any) -> tuple[Any, Any]:
    """Takes a tree apart by a mask, so that gradients see only one part.

    Args:
      tree: any pytree of arrays.
      mask: booleans in the same structure.

    Returns:
      `(true part, false part)`: both have the structure of `tree` with None for what is in the
      other.

    Raises:
      ValueError: the structures differ, or the mask holds something else.
    """
    have, want = jax.tree.structure(tree), jax.tree.structure(mask)
    if have != want:
        raise ValueError(
            f"split got a tree and a mask that differ in structure ({_differ(tree, mask)}): give a "
            "mask of booleans in the structure of the tree, such as t.trainable(state)"
        )
    for keys, take in jax.tree_util.tree_leaves_with_path(mask):
        if getattr(take, "dtype", type(take)) not in (bool, jnp.bool_):
            where = path_of(keys)
            raise ValueError(
                f"split got {short(take)} at {where!r} of the mask: give split(tree, mask), with "
                "True or False in the mask"
            )
    return (
        jax.tree.map(lambda leaf, take: leaf if take else None, tree, mask),
        jax.tree.map(lambda leaf, take: None if take else leaf, tree, mask),
    )


def combine(first: Any, second: Any) -> Any:
    """Undoes `split`.

    Args:
      first, second: trees of one structure, each with None where the other has a leaf.

    Returns:
      The tree. Where neither has a leaf there is None, as in a tree that `split` was given so.

    Raises:
      ValueError: both have a leaf in one place, or the structures differ.
    """

    def one(keys, a, b):
        if a is not None and b is not None:
            raise ValueError(f"combine: both parts have a leaf at {path_of(keys)!r}")
        return b if a is None else a

    def hole(x):
        return x is None

    have, other = (jax.tree.structure(tree, is_leaf=hole) for tree in (first, second))
    if have != other:
        raise ValueError(
            f"combine got trees that differ in structure ({_differ(first, second, hole)}): give "
            "the two that split returned"
        )
    return jax.tree_util.tree_map_with_path(one, first, second, is_leaf=hole)
