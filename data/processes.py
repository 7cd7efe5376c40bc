"""Processes that read, check and encode the records of a table, for the one that writes them.

Threads of one process take turns with what of an image PIL does in Python, and with making a
record of it. So where there are cores and records enough, the process that goes through a source
hands out what reads its entries, and gets back, in order, what it writes: the bytes of a shard do
not depend on who made them.

Of 1.0 ms of processor time per pair with a JPEG of 640 x 480 (2026-11-23, two cores that others
used, too), 0.3 ms stay with the process that writes; the others take the rest. On two cores both
ways took as long, 1.6 to 1.8 ms on the clock; hosts of more cores were not at hand.
"""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from cir_jax.errors import DataError
from cir_jax.input import images
from cir_jax.sharding.cores import cores
from data.source import parallel

LEAST_CORES, LEAST_RECORDS = 4, 5_000
"""With fewer, threads do as well as processes that have to be started."""
MOST = 16

Load = Callable[[], dict[str, Any]]


class Encoder:
    """Makes the bytes of a record, as they lie in a shard."""

    def __init__(self, features: tfds.features.FeaturesDict):
        self.features = features
        self._serializer = ExampleSerializer(features.get_serialized_info())

    def __call__(self, record: dict[str, Any]) -> bytes:
        example = self._serializer.get_tf_example(self.features.encode_example(record))
        # else its fields lie in another order in each process
        return example.SerializeToString(deterministic=True)


def count(records: int | None) -> int:
    """How many processes so many records are worth; 0 = none, threads do it."""
    available = cores()
    if available < LEAST_CORES or (records or 0) < LEAST_RECORDS:
        return 0
    return min(available - 1, MOST)  # one for who writes


def encoded(
    loads: Iterable[Load], features: tfds.features.FeaturesDict, processes: int
) -> Iterator[bytes]:
    """The records that `loads` give, encoded, in their order; made by so many processes, which end
    with the iterator, and with this process.

    What a load raises is raised in its place; DataError when a process is killed.
    """
    with concurrent.futures.ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("spawn"),  # threads of this one may hold locks
        _start,
        (features, images.max_megapixels()),
    ) as pool:
        made = parallel(_made, loads, pool)
        try:
            yield from made
        except BrokenProcessPool as error:
            raise DataError(
                "a process that reads images was killed, perhaps for want of memory. Do the same "
                "again: finished shards are kept."
            ) from error
        finally:
            made.close()


_encoder: Encoder


def _start(features: tfds.features.FeaturesDict, megapixels: float) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the writer hears it, too, and ends this one
    images.limit(megapixels)
    _encoder = Encoder(features)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    with contextlib.suppress(Exception):
        parent.join()  # also when it is killed
    os._exit(1)


def _made(load: Load) -> bytes:
    return _encoder(load())
