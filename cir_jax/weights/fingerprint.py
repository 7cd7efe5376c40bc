"""What tells one set of parameters from another."""

import hashlib
from typing import Any

import jax

from cir_jax.sharding.placement import to_host

SAMPLES = 4096
"""Values of each leaf that are read."""


def fingerprint(tree: Any) -> str:
    """Hash of a parameter tree: names, shapes, dtypes and up to SAMPLES values of each leaf.

    A name of the weights is not enough: fine-tuned parameters keep the name they started from. Any
    optimiser step moves all values of the leaves it trains, so a sample of each leaf tells.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        stride = -(-max(1, leaf.size) // SAMPLES)
        digest.update(to_host(leaf).reshape(-1)[::stride].tobytes())
    return digest.hexdigest()[:24]
