"""The vectors of a store, in memory, where they can be ranked."""

import threading
from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple

import numpy as np

from cir_jax.library.store import Store
from cir_jax.retrieval.ranking import Held


class Gallery(NamedTuple):
    """photos: int64[n], their numbers in the store, rising."""

    photos: np.ndarray
    held: Held

    @classmethod
    def read(
        cls,
        store: Store,
        encoder: int,
        made: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> "Gallery":
        """All of an encoder (0 = there is none): its unit vectors in float16 as they are stored,
        or what is `made` of the un-normalised ones, float32[some, dim] -> float32[some, any]."""
        numbers = [np.int64([])]

        def pieces() -> Iterator[np.ndarray]:
            for some, norms, units in store.vectors(encoder) if encoder else ():
                numbers.append(some)
                yield made(units.astype(np.float32) * norms[:, None]) if made else units

        held = Held(pieces(), store.count())
        return cls(np.concatenate(numbers), held)


class Galleries:
    """Those of a store that are in memory: each once, for all methods that rank by it."""

    def __init__(self, store: Store):
        self._store, self._lock = store, threading.Lock()
        self._read: dict[Hashable, Gallery] = {}
        self._version = store.version()

    def clear(self) -> None:
        with self._lock:
            self._read.clear()

    def refresh(self) -> None:
        """Forgets them where another process has changed something."""
        version = self._store.version()
        with self._lock:
            if version != self._version:
                self._read.clear()
                self._version = version

    def get(
        self,
        encoder: int,
        method: Hashable = None,
        made: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> Gallery:
        """The gallery of an encoder, or what a method has `made` of it; see `Gallery.read`."""
        with self._lock:
            if (encoder, method) not in self._read:
                self._read[encoder, method] = Gallery.read(self._store, encoder, made)
            return self._read[encoder, method]
