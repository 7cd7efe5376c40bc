"""Exact, over all devices of a mesh: what one accelerator's memory cannot hold, or several scan."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from cir_jax.library.indexes.base import Found, Piece, Read, Slots, ordered
from cir_jax.retrieval.sharded import Sharded


class OnMesh:
    """All processes of the mesh hold one together: each calls what the others call.

    scoring: as `ranking.rank` takes it; none = the dot product.
    """

    name, approximate = "sharded", False

    def __init__(self, mesh: Mesh, **scoring: Any):
        self.stamp, self._mesh, self._scoring = "", mesh, scoring
        self.close()

    @property
    def outgrown(self) -> bool:
        """What is free is looked at, too."""
        return 4 * len(self._slots) < len(self._slots.ids) - 4 * self._held.width

    def rebuild(self, read: Read, at_most: int) -> None:
        known, late = [np.int64([])], []

        def vectors() -> Iterator[np.ndarray]:
            room = at_most
            for ids, rows in read():
                known.append(ids[:room])
                if len(ids) > room:  # that came since they were counted
                    late.append((ids[room:], rows[room:]))
                yield rows[:room]
                room -= len(known[-1])

        self.close()  # never two of them
        self._held = Sharded(self._mesh, vectors(), at_most, **self._scoring)
        ids, filled = np.concatenate(known), self._held.filled
        self._slots = Slots(np.full(self._held.shards * self._held.rows, -1))
        place = np.arange(len(ids))
        self._slots.ids[place // filled * self._held.rows + place % filled] = ids
        for some, rows in late:
            self.upsert(some, rows)

    def upsert(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        rows = self._slots.rows(ids)
        if (new := int((rows < 0).sum())) > len(self._slots.ids) - len(self._slots):
            self._grow(new)
            rows = self._slots.rows(ids)
        # over the shards evenly: the lowest rows first
        free = np.flatnonzero(self._slots.ids < 0)
        rows[rows < 0] = free[np.argsort(free % self._held.rows, kind="stable")[:new]]
        self._held.put(*np.divmod(rows, self._held.rows), vectors)
        self._slots.ids[rows] = ids

    def _grow(self, count: int) -> None:
        """So that so many more have a place, and not for the next few alone."""
        held = self._held
        before = self._slots.ids.reshape(held.shards, held.rows)
        held.grow(max(-(-count // held.shards), held.rows // 2))
        more = ((0, 0), (0, held.rows - before.shape[1]))
        self._slots = Slots(np.pad(before, more, constant_values=-1).ravel())

    def delete(self, ids: np.ndarray) -> None:
        self._slots.free(ids)

    def search(
        self,
        queries: np.ndarray,
        k: int,
        only: np.ndarray | None = None,
        without: Sequence[int] = (),
    ) -> Found:
        allowed = self._slots.allowed(only, without)
        scores, shards, rows = self._held.search(queries, k, allowed)
        return ordered(self._slots.ids[shards.astype(np.int64) * self._held.rows + rows], scores, k)

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[Piece]:
        for shard, rows in self._held:
            ids = self._slots.ids[shard * len(rows) : (shard + 1) * len(rows)]
            there = np.flatnonzero(ids >= 0)
            yield ids[there], rows[there]

    def keep(self, stamp: str) -> None:
        self.stamp = stamp

    def alone(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def close(self) -> None:
        self._held, self.stamp = Sharded(self._mesh, (), 0, **self._scoring), ""
        self._slots = Slots(np.full(self._held.shards * self._held.rows, -1))
