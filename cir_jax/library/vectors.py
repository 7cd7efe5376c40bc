"""The vectors of a store: what encodes them, and what an index is made of."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cir_jax.library.store import Store
from cir_jax.retrieval.encoders import Encoder


class Kept:
    """An encoder and its vectors in a store."""

    def __init__(self, store: Store, encoder: Encoder):
        self._store, self.encoder = store, encoder
        # photos are turned as EXIF says and scaled to 8 bits, which no other store's images are
        self.identity = f"{encoder.identity} upright"
        self._description = json.dumps(dict(encoder.description), sort_keys=True)
        self._number = 0

    @property
    def number(self) -> int:
        """In the store, where it is made if it can be; 0 = it is not there."""
        if not self._number:
            self._number = self._store.encoder(self.identity, self._description)
        return self._number


class Vectors(NamedTuple):
    """Those of an encoder, number 0 = there are none: of unit norm, in float16, as they are stored.
    made: what a method makes of un-normalised ones, float32[some, dim] -> float32[some, any]."""

    store: Store
    encoder: int
    made: Callable[[np.ndarray], np.ndarray] | None = None

    def at_most(self) -> int:
        return self.store.count()

    def changes(self, stamp: str) -> tuple[str, np.ndarray | None]:
        """As `Store.changes`."""
        return self.store.changes(self.encoder, stamp) if self.encoder else ("", None)

    def read(self, photos: Sequence[int] | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """int64[some] photos, rising, and their vectors; of these photos, or of all."""
        for some, norms, units in self.store.vectors(self.encoder, photos) if self.encoder else ():
            made = self.made
            yield some, made(units.astype(np.float32) * norms[:, None]) if made else units

    def of(self, photos: np.ndarray) -> np.ndarray:
        """float32[n, dim] of these photos, all different; zeros of those that are gone."""
        order = np.argsort(photos)
        found = np.zeros((len(photos), 0), np.float32)
        for some, rows in self.read(photos):
            if not found.size:
                found = np.zeros((len(photos), rows.shape[1]), np.float32)
            found[order[np.searchsorted(photos, some, sorter=order)]] = rows
        return found
