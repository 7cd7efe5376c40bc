"""What the image alone and the text alone of a query would give, and how the ranks moved."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cir_jax.library.gallery import Gallery
from cir_jax.retrieval import ranking


class Order(NamedTuple):
    """All photos that a query may find, best first. photos: int64[n]; scores: float32[n]."""

    photos: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, query: np.ndarray, gallery: Gallery, ranked: np.ndarray, **scoring: Any) -> "Order":
        """float32[1, dim] and bool[n], which of the gallery may be found."""
        scores = ranking.scores(query, gallery.held, ranked, **scoring)
        best = np.argsort(-scores, kind="stable")[: int(ranked.sum())]  # as ties are ranked
        return cls(gallery.photos[best], scores[best])

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
