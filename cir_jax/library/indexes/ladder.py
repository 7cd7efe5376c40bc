"""Which index a library is searched with, how it is brought up to date, how much it misses."""

import hashlib
import importlib
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from cir_jax.errors import ConfigError, unknown
from cir_jax.library.indexes.base import Found, Index, recall, scan
from cir_jax.library.indexes.exact import Exact
from cir_jax.library.indexes.faiss_ivf import Faiss
from cir_jax.library.indexes.qdrant import Qdrant, connect
from cir_jax.library.indexes.sharded import OnMesh
from cir_jax.library.vectors import Vectors

NAMES = ("exact", "sharded", "faiss", "qdrant")
PACKAGES = {"faiss": ("faiss", "search"), "qdrant": ("qdrant_client", "qdrant")}
"""Index -> the package that it needs, and the extra that has it."""

BY_ANY_SCORE = ("exact", "sharded")
"""Those that rank by whatever a method ranks by; the others by the dot product."""

EXACT_UP_TO = 2_000_000
"""Photos that are scanned in memory where nothing is asked for."""


class Checked(NamedTuple):
    """name: of the index. recall: share of the k best by an exact scan that it finds. queries,
    photos: how many. milliseconds: per query, one at a time."""

    name: str
    recall: float
    k: int
    queries: int
    photos: int
    milliseconds: float


def check_name(name: str) -> None:
    """Raises ConfigError for what is no index, and for one that lacks its package; "" is one:
    whichever fits."""
    if name and name not in NAMES:
        raise ConfigError(unknown("index", name, NAMES))
    if name in PACKAGES:
        package, extra = PACKAGES[name]
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(
                f"index {name!r}: {error}. Install it: pip install 'cir_jax[{extra}]'."
            ) from error


def opened(
    name: str,
    vectors: Vectors,
    *,
    space: Callable[[], str],
    scoring: dict[str, Any],
    method: str,
    mesh: Mesh,
    say: Callable[[str], None],
) -> Index:
    """The index of this name, or which fits where it is "".

    space: names encoder and method, where that is to be kept. scoring: as `ranking.rank` takes it,
    for a method that does not rank by the dot product. mesh: of "sharded". say: is told what is
    made anew, and why.
    Raises ConfigError for an index that cannot rank as the method does, DataError for a server that
    does not answer.
    """
    if name and scoring and name not in BY_ANY_SCORE:
        raise ConfigError(
            f"index {name!r}: {method} ranks by a score of its own, which it does not know. "
            f"Take {' or '.join(BY_ANY_SCORE)}."
        )
    name = name or ("exact" if scoring else _fitting(vectors.at_most(), say))
    if name in ("faiss", "qdrant") and vectors.encoder:
        path = vectors.store.path
        what = hashlib.sha256(space().encode()).hexdigest()[:8]
        file = path.with_name(f"{path.name}.{what}.{name}")
        if name == "faiss":
            return Faiss(file, vectors.of, say)
        origin = vectors.store.origin(vectors.encoder)
        return Qdrant(connect(), f"cir_jax_{origin}_{what}", Path(f"{file}.lock"), say)
    if name == "sharded":
        return OnMesh(mesh, **scoring)
    return Exact(**scoring)


def _fitting(photos: int, say: Callable[[str], None]) -> str:
    if photos <= EXACT_UP_TO:
        return "exact"
    if importlib.util.find_spec("faiss"):
        return "faiss"
    say(f"{photos} photos are scanned in memory; pip install 'cir_jax[search]' takes less of both.")
    return "exact"


def follow(index: Index, vectors: Vectors) -> None:
    """Brings the index to the end of the store's log; stopped anywhere, it is done again."""
    with index.alone():
        stamp, changed = vectors.changes(index.stamp)
        if changed is not None and stamp == index.stamp:
            return
        # what is written from here on is read now or later, and then again: that changes nothing
        anew = changed is None or 2 * len(changed) > len(index)
        if not anew:
            for ids, rows in vectors.read(changed):
                index.upsert(ids, rows)
                changed = np.setdiff1d(changed, ids, assume_unique=True)
            index.delete(changed)
        if anew or index.outgrown:
            index.rebuild(vectors.read, vectors.at_most())
        index.keep(stamp)


def checked(index: Index, vectors: Vectors, queries: np.ndarray, k: int) -> Checked:
    """What the index finds of the k best for each of float32[batch, dim], one query at a time."""
    index.search(queries[:1], k)  # compiled
    began = time.perf_counter()
    found = [index.search(query[None], k) for query in queries]
    each = 1000 * (time.perf_counter() - began) / len(queries)
    best = scan(vectors.read, queries, k)
    share = recall(Found(*map(np.concatenate, zip(*found, strict=True))), best)
    return Checked(index.name, share, k, len(queries), len(index), each)
