"""The vectors of a store, in memory, where they can be ranked."""

from collections.abc import Callable, Iterator
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
