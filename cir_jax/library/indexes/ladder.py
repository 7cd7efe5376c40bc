"""Which index a library is searched with, and how it is brought up to date."""

import numpy as np

from cir_jax.library.indexes.base import Index
from cir_jax.library.vectors import Vectors


def follow(index: Index, vectors: Vectors) -> None:
    """Brings the index to the end of the store's log; stopped anywhere, it is done again."""
    with index.alone():
        stamp, changed = vectors.changes(index.stamp)
        if changed is not None and stamp == index.stamp:
            return
        # what is written from here on is read now or later, and then again: that changes nothing
        if changed is None or index.outgrown or 2 * len(changed) > len(index):
            index.rebuild(vectors.read, vectors.at_most())
        else:
            for ids, rows in vectors.read(changed):
                index.upsert(ids, rows)
                changed = np.setdiff1d(changed, ids, assume_unique=True)
            index.delete(changed)
        index.keep(stamp)
