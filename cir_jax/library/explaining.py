"""What the image alone and the text alone of a query would give, and how the ranks moved."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cir_jax.library.indexes.base import Index
from cir_jax.library.indexes.exact import Exact

DEPTH = 1000
"""Places that are told of an index that does not hold all vectors in memory."""


class Order(NamedTuple):
    """The photos that a query may find, best first: all, or the first `DEPTH`. photos: int64[n];
    scores: float32[n]."""

    photos: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, query: np.ndarray, index: Index, ranked: Mapping[str, Any]) -> "Order":
        """query: float32[1, dim]; ranked: which photos may be found, as `Index.search` takes it."""
        if isinstance(index, Exact):
            return cls(*index.order(query, **ranked))
        found = index.search(query, DEPTH, **ranked)
        there = found.ids[0] >= 0
        return cls(found.ids[0][there], found.scores[0][there])

    def ranks(self, photos: Sequence[int]) -> list[int]:
        """Of photos, 1 = the best; 0 = not among them."""
        places = [np.flatnonzero(self.photos == photo) for photo in photos]
        return [int(place[0]) + 1 if len(place) else 0 for place in places]


class Alone(NamedTuple):
    """What a part of a query would give. found: (number of a photo, score), best first; now: the
    ranks of these in the whole query; ranks: here, of what the whole query found."""

    found: list[tuple[int, float]]
    now: list[int]
    ranks: list[int]

    @classmethod
    def of(cls, part: Order, whole: Order, found: Sequence[int], k: int) -> "Alone":
        best = [int(photo) for photo in part.photos[:k]]
        scores = [float(score) for score in part.scores[:k]]
        return cls(list(zip(best, scores, strict=True)), whole.ranks(best), part.ranks(found))
