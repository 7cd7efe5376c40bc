"""Other people's tensors <-> our parameter trees, by explicit bidirectional name tables.

A family gives one table {source name: (target path, layout)}; every source tensor is used once, every
target parameter is filled once, and leftovers on either side are an error that lists them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cir_jax.errors import WeightsError

Target = tuple[tuple[str, ...], str]
"""Path in our tree, and the layout of the source tensor."""

# layout -> axes of our array in the source array; PyTorch stores Linear [out, in], Conv2d [out, in, h, w]
_TO_OURS = {"same": None, "linear": (1, 0), "conv": (2, 3, 1, 0)}
_TO_SOURCE = {"same": None, "linear": (1, 0), "conv": (3, 2, 0, 1)}


def to_ours(
    tensors: Mapping[str, np.ndarray],
    names: Mapping[str, Target],
    *,
    ignore: Sequence[str] = (),
    what: str = "weights",
) -> dict[str, Any]:
    """Nested parameter tree from source tensors.

    ignore: patterns of source names that are known and not parameters.
    Raises WeightsError listing tensors that no parameter takes, and parameters without a tensor.
    """
    unused = [n for n in tensors if n not in names and not any(re.fullmatch(p, n) for p in ignore)]
    missing = [n for n in names if n not in tensors]
    if unused or missing:
        raise WeightsError(
            f"{what}: does not fit this model. "
            f"Missing tensors ({len(missing)}): {_some(missing)}. "
            f"Tensors nothing takes ({len(unused)}): {_some(unused)}."
        )
    tree: dict[str, Any] = {}
    for name, (path, layout) in names.items():
        axes = _TO_OURS[layout]
        array = np.asarray(tensors[name])
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = array if axes is None else np.ascontiguousarray(array.transpose(axes))
    return tree


def to_source(params: Mapping[str, Any], names: Mapping[str, Target]) -> dict[str, np.ndarray]:
    """The inverse: source tensors from our tree. Raises WeightsError for parameters without a name."""
    flat = flatten(params)
    paths = {path for path, _ in names.values()}
    if extra := ["/".join(path) for path in flat if path not in paths]:
        raise WeightsError(f"parameters without a name in this format: {_some(extra)}.")
    tensors = {}
    for name, (path, layout) in names.items():
        axes = _TO_SOURCE[layout]
        array = np.asarray(flat[path])
        tensors[name] = array if axes is None else np.ascontiguousarray(array.transpose(axes))
    return tensors


def check_shapes(params: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Raises WeightsError naming the parameters whose shape is not that of `expected`."""
    ours, theirs = flatten(params), flatten(expected)
    if wrong := [
        f"{'/'.join(path)} {np.shape(ours[path])}, expected {np.shape(theirs[path])}"
        for path in ours
        if path in theirs and np.shape(ours[path]) != np.shape(theirs[path])
    ]:
        raise WeightsError(f"{what}: wrong shapes: {_some(wrong)}.")
    if leftover := ["/".join(path) for path in set(ours) ^ set(theirs)]:
        raise WeightsError(f"{what}: parameters on one side only: {_some(sorted(leftover))}.")


def flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Nested dict -> {path: leaf}."""
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, (*prefix, key))
        else:
            flat[(*prefix, key)] = value
    return flat


def _some(names: Sequence[str], limit: int = 12) -> str:
    shown = ", ".join(names[:limit]) or "none"
    return shown + (f" ... and {len(names) - limit} more" if len(names) > limit else "")
