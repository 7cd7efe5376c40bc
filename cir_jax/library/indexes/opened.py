"""The indexes of a store that are open: each once, for all methods that rank by it."""

import threading
from collections.abc import Callable, Hashable

from cir_jax.library.indexes import ladder
from cir_jax.library.indexes.base import Index
from cir_jax.library.store import Store
from cir_jax.library.vectors import Vectors


class Opened:
    """For several threads, if one of them at a time searches."""

    def __init__(self, store: Store):
        self._store, self._lock = store, threading.Lock()
        self._open: dict[Hashable, Index] = {}
        self._fresh: set[Hashable] = set()
        self._version = store.version()

    def get(self, what: Hashable, vectors: Vectors, make: Callable[[], Index]) -> Index:
        """The index of what is told so, made where there is none; brought up to date with the
        store, where another process may have changed something."""
        with self._lock:
            version = self._store.version()
            if version != self._version:
                self._fresh.clear()
                self._version = version
            if what not in self._open:
                self._open[what] = make()
            if what not in self._fresh:
                ladder.follow(self._open[what], vectors)
                self._fresh.add(what)
            return self._open[what]

    def outdated(self) -> None:
        """This process has changed something."""
        with self._lock:
            self._fresh.clear()

    def close(self) -> None:
        with self._lock:
            for index in self._open.values():
                index.close()
            self._open.clear()
            self._fresh.clear()
