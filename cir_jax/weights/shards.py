"""Weights in several files: an index says which tensor lies in which of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cir_jax.errors import WeightsError
from cir_jax.weights.lazy import Lazy, reader


def weight_map(index: Path, content: Mapping[str, Any]) -> dict[str, str]:
    """Tensor -> file, of the index file's content.

    Raises WeightsError when the map is malformed, or names anything but files beside the index.
    """
    found = content.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise WeightsError(
            f"{index}: expected a 'weight_map' of tensors and the files they lie in, found "
            f"{'no such field' if found is None else repr(found)[:80]}. Download or copy it again."
        )
    for tensor, shard in found.items():
        if not isinstance(shard, str) or not shard.strip(".") or set(shard) & set("/\\\0:"):
            raise WeightsError(
                f"{index}: {tensor} lies in {shard!r}, expected the plain name of a file beside "
                "the index. Download or copy the index again, from a source that you trust."
            )
    return found


def check_inside(shard: Path) -> Path:
    """The path. Raises WeightsError for a link that leaves its directory.

    Links of the hub's cache into its own blobs are none of those.
    """
    folder, target = shard.parent.resolve(), shard.resolve()
    # .../models--X/snapshots/REVISION/file -> .../models--X/blobs/HASH
    cached = folder.parent.name == "snapshots" and target.parent == folder.parents[1] / "blobs"
    if target.parent != folder and not cached:
        raise WeightsError(
            f"{shard}: a link out of its directory, to {target}. Copy the file to where the link "
            "is, or give the directory that holds all files."
        )
    return shard


def join(
    index: Path, where: Mapping[str, str], shards: Mapping[str, Mapping[str, np.ndarray]]
) -> Lazy:
    """The tensors of all files, read when asked for.

    where: the index's map. shards: file -> its tensors. Raises WeightsError unless each tensor of
    the map is in its own file and in no other.
    """
    readers: dict[str, Any] = {}
    found: dict[str, str] = {}
    for shard, tensors in shards.items():
        for name in tensors:
            other = found.get(name) or where.get(name, shard)
            if other != shard:
                raise WeightsError(
                    f"{index}: {name} lies in {shard}, but also in, or only in, {other}: the files "
                    "are of different models. Download or copy all of them again."
                )
            found[name] = shard
            readers[name] = reader(tensors, name)
    if missing := [name for name in where if name not in found]:
        raise WeightsError(
            f"{index.parent / where[missing[0]]}: {missing[0]} is not in it, as {index.name} says "
            f"({len(missing)} such tensors). Download or copy both again."
        )
    return Lazy(readers)
