"""What every index can do, and what several of them share.

The store is the truth: an index holds vectors under their photos' numbers, is as of a place in the
store's log (its `stamp`), and is brought from there to the end of it by `ladder.follow`.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

Piece = tuple[np.ndarray, np.ndarray]
"""int64[some] ids, all different, and float16 or float32[some, dim] vectors of unit norm."""

Read = Callable[[], Iterator[Piece]]
"""Gives all vectors, ids rising, from the beginning each time it is called."""


ROUNDING = 1e-5
"""Scores of one vector may differ by this, of two programs."""


class Found(NamedTuple):
    """ids: int64[batch, k], best first, equal scores by id; -1 where there are fewer than k.
    scores: float32[batch, k], exact whatever the index approximates; -inf there."""

    ids: np.ndarray
    scores: np.ndarray


class Index(Protocol):
    """Vectors by id, searched by their dot product with a query.

    name: as `--index` has it. approximate: whether a search may miss some of the best.
    stamp: the place in the log of what it holds; "" = it holds nothing that could be gone on from.
    outgrown: whether it has changed so much that it should be rebuilt.
    """

    name: str
    approximate: bool
    stamp: str

    @property
    def outgrown(self) -> bool: ...

    def rebuild(self, read: Read, at_most: int) -> None:
        """Holds what is read, and nothing else. at_most: vectors, as far as is known."""

    def upsert(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """Adds these; those of an id that is there take its place."""

    def delete(self, ids: np.ndarray) -> None:
        """Those that are not there are no error."""

    def search(
        self,
        queries: np.ndarray,
        k: int,
        only: np.ndarray | None = None,
        without: Sequence[int] = (),
    ) -> Found:
        """The k best for each of float32[batch, dim]. only: int64 ids that may be found, None =
        all; without: ids that may not."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Piece]:
        """What this process holds, as it holds it, which may be less precise than what came."""

    def keep(self, stamp: str) -> None:
        """What it holds now is as of that place; what outlives the process is kept."""

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """In it nobody else changes what outlives the process; what others did before is seen."""

    def close(self) -> None: ...


def ordered(ids: np.ndarray, scores: np.ndarray, k: int) -> Found:
    """The k best of [batch, any] candidates; those with score -inf are none."""
    batch, width = ids.shape
    order = np.lexsort((ids, -scores), axis=1)[:, :k]  # the last key is the first criterion
    ids, scores = (np.take_along_axis(x, order, axis=1) for x in (ids, scores))
    lacking = ((0, 0), (0, max(0, k - width)))
    scores = np.pad(scores.astype(np.float32), lacking, constant_values=-np.inf)
    ids = np.pad(ids.astype(np.int64), lacking, constant_values=-1)
    return Found(np.where(np.isfinite(scores), ids, -1), scores)


def scan(read: Read, queries: np.ndarray, k: int) -> Found:
    """The exact answer, by one look at all vectors, of which a piece at a time is in memory."""
    best = nothing(len(queries), k)
    for ids, vectors in read():
        scores = queries @ vectors.astype(np.float32).T
        ids = np.broadcast_to(ids, scores.shape)
        if scores.shape[1] > k:
            top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
            ids, scores = (np.take_along_axis(x, top, axis=1) for x in (ids, scores))
        both = (np.concatenate(x, axis=1) for x in zip(best, (ids, scores), strict=True))
        best = ordered(*both, k)
    return best


def recall(found: Found, best: Found) -> float:
    """Share of the best that were found; of equal ones, any counts."""
    last = best.scores.min(axis=1, where=best.ids >= 0, initial=np.inf, keepdims=True)
    right = (found.ids >= 0) & (found.scores >= last - ROUNDING)
    return float(right.sum() / max(1, (best.ids >= 0).sum()))


def nothing(batch: int, k: int) -> Found:
    return Found(np.full((batch, k), -1), np.full((batch, k), -np.inf, np.float32))


class Slots:
    """Which vector lies in which row of a table. ids: int64[rows], -1 = none."""

    def __init__(self, ids: np.ndarray | Sequence[int] = ()):
        self.ids = np.array(ids, np.int64)

    def __len__(self) -> int:
        return int(np.count_nonzero(self.ids >= 0))

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """int64: where these lie, -1 = nowhere."""
        if not len(self.ids):
            return np.full(len(ids), -1)
        order = np.argsort(self.ids, kind="stable")
        at = order[np.minimum(np.searchsorted(self.ids, ids, sorter=order), len(order) - 1)]
        return np.where(self.ids[at] == ids, at, -1)

    def free(self, ids: np.ndarray) -> None:
        rows = self.rows(np.asarray(ids, np.int64))
        self.ids[rows[rows >= 0]] = -1

    def allowed(self, only: np.ndarray | None, without: Sequence[int]) -> np.ndarray:
        """bool[rows]: which may be found, as `Index.search` says."""
        allowed = self.ids >= 0
        if only is not None:
            allowed &= np.isin(self.ids, only)
        if len(without):
            allowed &= ~np.isin(self.ids, without)
        return allowed
