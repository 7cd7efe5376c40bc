"""Global batches of records over a mesh: each row exactly once, whatever the number of devices.

Grain's samplers drop or repeat rows when processes do not divide them; an evaluation must not. Here
the last batch is padded, padding is cut from the replicated output, and each process loads only the
rows that its own devices hold.
"""

import collections
import concurrent.futures
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cir_jax.progress import Progress
from cir_jax.sharding.cores import cores
from cir_jax.sharding.mesh import batch_sharding, row_shards

AHEAD = 2
"""Batches loaded ahead of the device: host memory holds at most AHEAD + 2 of them."""


def round_up(mesh: Mesh, batch_size: int, n: int) -> int:
    """Rows of a batch, for n rows: batch_size, or the next power of two where n is smaller, so that
    sets of about one size share a compiled program; rounded up to mesh and processes."""
    unit = int(np.lcm(row_shards(mesh), jax.process_count()))
    wanted = min(batch_size, 1 << (max(1, n) - 1).bit_length())
    return -(-max(1, wanted) // unit) * unit


def map_rows(
    step: Callable[[Any], jax.Array],
    load: Callable[[int], dict[str, np.ndarray]],
    n: int,
    *,
    mesh: Mesh,
    batch_size: int,
    first: int = 0,
    description: str = "",
    unit: str = "image",
) -> Generator[np.ndarray, None, None]:
    """Outputs for rows first..n-1 in order, each row once, in pieces of at most a batch.

    step: one global batch of named arrays (rows over data and fsdp) -> replicated [batch, ...].
    load: one row -> named arrays; called in threads, at most AHEAD batches ahead of the device.
    """
    size = round_up(mesh, batch_size, n - first)
    rows = _local_rows(mesh, size)
    workers = min(8, cores())
    pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="load")
    progress = Progress(
        total=n, initial=first, desc=description, unit=unit, delay=1, smoothing=0.1,
        disable=not description or jax.process_index() != 0,
    )  # fmt: skip
    starts = collections.deque(range(first, n, size))
    loading: collections.deque[tuple[int, list[concurrent.futures.Future[Any]], np.ndarray]]
    loading, running = collections.deque(), collections.deque()
    try:
        while starts or loading or running:
            while starts and len(loading) < AHEAD:
                start = starts.popleft()
                # padding repeats the last row, which is loaded once
                wanted, where = _wanted(start, rows, n)
                futures = [pool.submit(load, int(row)) for row in wanted]
                loading.append((start, futures, where))
            if loading:
                start, futures, where = loading.popleft()
                items = [future.result() for future in futures]
                batch = {name: np.stack([item[name] for item in items])[where] for name in items[0]}
                running.append((start, step(_place(mesh, size, rows, batch))))
            # one batch runs while the next is stacked and sent
            while len(running) > (1 if loading or starts else 0):
                start, output = running.popleft()
                output = np.asarray(output)[: n - start]
                progress.update(len(output))
                yield output
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        progress.close()


def _wanted(start: int, rows: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to load for these positions of the batch at `start`, each once, and where they go."""
    return np.unique(np.minimum(start + rows, n - 1), return_inverse=True)


def _local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Sorted positions in a global batch that this process's devices hold."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    spans = {index[0].indices(batch_size)[:2] for index in indices.values()}
    return np.concatenate([np.arange(*span) for span in sorted(spans)])


def _place(mesh: Mesh, batch_size: int, rows: np.ndarray, batch: dict[str, np.ndarray]) -> Any:
    """This process's rows -> global arrays; holds for any order of devices in the mesh."""
    sharding = batch_sharding(mesh)

    def put(x: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))
            return x[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, shard)

    return {name: put(x) for name, x in batch.items()}
