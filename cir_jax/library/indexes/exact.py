"""Exact, in memory: the project's own ranking, in half the memory of float32."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cir_jax.library.indexes.base import Found, Piece, Read, Slots, nothing, ordered
from cir_jax.retrieval import ranking
from cir_jax.retrieval.ranking import HELD_BLOCK, Held


class Exact:
    """scoring: as `ranking.rank` takes it; none = the dot product."""

    name, approximate = "exact", False

    def __init__(self, **scoring: Any):
        self.stamp, self._scoring = "", scoring
        self._slots, self._held = Slots(), Held((), 0)

    @property
    def outgrown(self) -> bool:
        rows, width = len(self._slots.ids), self._held.width
        return 2 * len(self._slots) < rows or (rows > width and width < HELD_BLOCK)

    def rebuild(self, read: Read, at_most: int) -> None:
        ids = [np.int64([])]

        def vectors() -> Iterator[np.ndarray]:
            for some, rows in read():
                ids.append(some)
                yield rows

        self._held = Held((), 0)  # never two of them
        self._held = Held(vectors(), at_most)
        self._slots = Slots(np.concatenate(ids))

    def upsert(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        rows = self._slots.rows(ids)
        known, new = rows >= 0, rows < 0
        self._held.put(rows[known], vectors[known])
        self._held.extend([vectors[new]])
        self._slots.ids = np.concatenate([self._slots.ids, ids[new]])

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
        if not allowed.any():
            return nothing(len(queries), k)
        top = ranking.rank(queries, self._held, k=k, members=allowed[None], **self._scoring)
        return ordered(self._slots.ids[top.top], top.scores, k)

    def order(
        self, query: np.ndarray, only: np.ndarray | None = None, without: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """All that may be found by float32[1, dim], best first: int64[n] ids, float32[n] scores."""
        allowed = self._slots.allowed(only, without)
        if not allowed.any():
            return np.int64([]), np.float32([])
        scores = ranking.scores(query, self._held, allowed, **self._scoring)
        best = np.lexsort((self._slots.ids, -scores))[: int(allowed.sum())]
        return self._slots.ids[best], scores[best]

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[Piece]:
        for i, block in enumerate(self._held.blocks):
            ids = self._slots.ids[i * self._held.width : (i + 1) * self._held.width]
            there = np.flatnonzero(ids >= 0)
            yield ids[there], np.asarray(block)[there]

    def keep(self, stamp: str) -> None:
        self.stamp = stamp

    def alone(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def close(self) -> None:
        self._slots, self._held, self.stamp = Slots(), Held((), 0), ""
