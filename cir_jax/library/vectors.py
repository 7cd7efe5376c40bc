"""The vectors of a store that an index is made of, as of a place in the store's log."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cir_jax.library.store import Store


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
