"""Large batches on CPU, in chunks whose activations stay in the cache.

A layer over 256 images writes hundreds of MB to memory for the next one to read back, and waits for
them longer than it computes: per image, ViT-B/32 takes a quarter more time than in chunks, ViT-L/14
nearly half more. The features are the same, rows being independent of one another.

It happens on one CPU device, with weights in float32. Elsewhere the batch is left alone:
accelerators want it whole, several devices share it, and XLA would convert weights of another type
again for each chunk.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from cir_jax.sharding.constraints import target
from cir_jax.sharding.cores import cores

CACHE_PER_CORE = 5 * 2**20
"""Bytes: 1 MiB of each core and 4 of those it shares, as in AMD's EPYC; Intel's Xeons have 4."""

OVERHEAD = 0.25
"""Rows that a chunk costs beside its own: it reads all weights again. Measured, ViT-B/32."""

_whole = contextvars.ContextVar("whole", default=False)


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """Inside, batches are not cut: for training, where chunks cost memory and gain nothing."""
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


def activation_bytes(tokens: int, hidden: int) -> int:
    """What a row of `tokens` takes at its widest: the MLP's hidden layer, going in and out."""
    return 2 * tokens * hidden * 4


def chunk_size(batch: int, row_bytes: int) -> int:
    """Rows to compute at a time; `batch` where there would be less than two chunks."""
    limit = max(1, CACHE_PER_CORE * cores() // row_bytes)
    if batch < 2 * limit:
        return batch

    def cost(size: int) -> float:
        # the last chunk is as large as the others: it computes some rows again
        return -(-batch // size) * (size + OVERHEAD)

    return min(range(limit, limit // 2, -1), key=cost)


def over_rows(encode: Callable[..., jax.Array], params: Any, rows: Any, row_bytes: int) -> Any:
    """encode(params, *rows), all of `rows` (or None) having the batch first, as the result has."""
    batch = len(jax.tree.leaves(rows)[0])
    size = chunk_size(batch, row_bytes) if _wanted(params) else batch
    if size == batch:
        return encode(params, *rows)
    # the last chunk ends with the batch; it may begin before the end of the one before
    starts = [*range(0, batch - size, size), batch - size]

    def chunk(start: Any) -> jax.Array:
        piece = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), rows)
        return encode(params, *piece)

    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, rows))):
        pieces = jax.lax.map(chunk, jnp.asarray(starts))
    else:
        pieces = jnp.stack([chunk(start) for start in starts])
    last = batch - size * (len(starts) - 1)
    first = pieces[:-1].reshape(-1, *pieces.shape[2:])
    return jnp.concatenate([first, pieces[-1, size - last :]])


def _wanted(params: Any) -> bool:
    alone = target() == ("cpu", 1)
    exact = all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    return alone and exact and not _whole.get()
