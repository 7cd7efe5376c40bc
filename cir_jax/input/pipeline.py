"""The Grain pipeline: sources -> global shuffle -> mixture -> this process's rows of each batch.

Batch b is a pure function of (seed, b): order and randomness come from indices alone, so a run
resumes at any batch, with any number of processes or workers, and sees the same data. (Grain's own
iterator state can be restored only with the number of workers that wrote it, and its IndexSampler
shuffles within a shard and loses records on several hosts.)
"""

import collections
import dataclasses
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import jax
import numpy as np
from absl import flags

from cir_jax.errors import ConfigError
from cir_jax.input.reading import Reading
from cir_jax.input.records import TrimText
from cir_jax.input.tables import Table
from cir_jax.sharding.largest import Largest

AHEAD = 2
"""Batches whose length is said before it is needed."""


class Source(Protocol):
    """Random access to what an epoch goes through, and the table behind it."""

    table: Table

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Part:
    """One component of a mixture: a source, its transform to an example, its share of the rows."""

    name: str
    source: Source
    transform: grain.transforms.RandomMap
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Batches of a training stage.

    batch_size: global rows; a process gets rows [i, i + 1) * batch_size / processes of each batch.
    group: consecutive records that stay together in a batch (a scene and its twin).
    trim: cuts what no text of the global batch needs.
    """

    parts: Sequence[Part]
    batch_size: int
    seed: int
    group: int = 1
    trim: TrimText | None = None
    reading: Reading = Reading()
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError("a training stage without data: set config.stage.<name>.data.tables.")
        if self.batch_size % (self.process_count * self.group):
            raise ConfigError(
                f"batch_size={self.batch_size} is not divisible by {self.process_count} processes "
                f"x groups of {self.group} records."
            )

    @property
    def epoch_examples(self) -> int:
        """Items of the largest part: what one epoch means."""
        return max(len(part.source) for part in self.parts)

    def dataset(self) -> grain.MapDataset:
        """Batch b of this process at index b, for any b >= 0."""
        parts = []
        for i, part in enumerate(self.parts):
            groups = grain.MapDataset.range(len(part.source) // self.group).seed(self.seed + i)
            read = ReadGroup(part.source, part.transform, self.group)
            parts.append(groups.shuffle().repeat().random_map(read))
        mixed = parts[0]
        if len(parts) > 1:
            mixed = grain.MapDataset.mix(parts, [part.weight for part in self.parts])
        local = mixed.batch(
            self.batch_size // self.process_count // self.group,
            drop_remainder=True,
            batch_fn=_stack_groups,
        )
        mine = local[self.process_index :: self.process_count]
        # of several processes none knows the texts of the others: `batches` cuts
        return mine.map(self.trim) if self.trim and self.process_count == 1 else mine

    def contents(self) -> dict[str, dict[str, Any]]:
        """What is in each table that is read (see `Table.contents`)."""
        return {repr(part.source.table): part.source.table.contents() for part in self.parts}

    def example(self) -> Mapping[str, np.ndarray]:
        """Batch 0 of this process."""
        return self.dataset()[0]

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Of a global batch, its texts as long as they can be. Reads one group of records."""
        few = dataclasses.replace(
            self, batch_size=self.group, trim=None, process_index=0, process_count=1
        )
        return {
            name: jax.ShapeDtypeStruct((self.batch_size, *x.shape[1:]), x.dtype)
            for name, x in few.example().items()
        }

    def batches(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Batches start..stop-1 of this process, read ahead in threads or worker processes."""
        data = self.dataset()[start:stop]
        reading = self.reading
        # each of the workers holds its share
        held = -(-reading.prefetch // max(reading.workers, 1))
        data = data.to_iter_dataset(
            grain.ReadOptions(
                num_threads=min(reading.threads, held),  # a thread has a place in what is held
                prefetch_buffer_size=held,
            )
        )
        if reading.workers:
            _mark_flags_parsed()
            data = data.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=reading.workers, per_worker_buffer_size=1),
                worker_init_fn=_leave_interrupts,
            )
        iterator = iter(data)
        try:
            if self.trim and self.process_count > 1:
                yield from trimmed_alike(iterator, self.trim)
            else:
                yield from iterator
        finally:
            if hasattr(iterator, "close"):
                iterator.close()  # its threads would live on

    def __repr__(self) -> str:
        parts = ", ".join(f"{p.name}={p.source!r}*{p.weight}" for p in self.parts)
        return (
            f"Pipeline(seed={self.seed}, batch_size={self.batch_size}, group={self.group}, {parts})"
        )


def trimmed_alike(batches: Iterator[dict[str, Any]], trim: TrimText) -> Iterator[dict[str, Any]]:
    """Each batch cut to what the longest text of all processes needs, so that all compile and run
    one program. A process says what it needs before its turn: nobody waits who reads in time."""
    agreed = Largest()
    ahead: collections.deque[dict[str, Any]] = collections.deque()
    for batch in batches:
        agreed.say(trim.needs(batch))
        ahead.append(batch)
        if len(ahead) > AHEAD:
            yield trim.cut(ahead.popleft(), agreed.hear())
    while ahead:
        yield trim.cut(ahead.popleft(), agreed.hear())


@dataclasses.dataclass(frozen=True)
class ReadGroup(grain.transforms.RandomMap):
    """Group index -> the examples of its consecutive records."""

    source: Source
    transform: grain.transforms.RandomMap
    group: int

    def random_map(self, element: int, rng: np.random.Generator) -> list[dict[str, Any]]:
        first = int(element) * self.group
        return [self.transform.random_map(self.source[first + i], rng) for i in range(self.group)]


def _stack_groups(groups: Sequence[list[dict[str, Any]]]) -> dict[str, np.ndarray]:
    rows = [row for group in groups for row in group]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _leave_interrupts(worker: int, workers: int) -> None:
    """A worker lives on when Ctrl-C reaches the whole group: the run wants a batch, and saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _mark_flags_parsed() -> None:
    # Grain reads an absl flag before it starts workers; in notebooks and tests nobody parsed them
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
