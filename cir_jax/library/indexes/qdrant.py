"""Qdrant: a server of its own, for what one machine cannot hold, or many shall ask.

Vectors lie in one collection per store and encoder, in half precision, under their photos' numbers;
the server finds by its graph (HNSW), which may miss a photo, and scores exactly. The collection's
metadata has the place in the store's log that it is as of. A rebuild writes all anew over what is
there and then deletes the rest, so that others can go on searching; cut off, it is done again.
"""

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cir_jax.errors import DataError
from cir_jax.library.indexes.base import Found, Piece, Read, nothing, ordered
from cir_jax.retrieval.ranking import check_finite
from cir_jax.storage import faults
from cir_jax.storage.locks import locked

URL, KEY, DEFAULT_URL = "QDRANT_URL", "QDRANT_API_KEY", "http://localhost:6333"
"""Variables that say where the server is, and what it wants to see."""

STAMP, MADE = "cir_jax_stamp", "made"
SECONDS = 60
NUMBERS = 1 << 18
"""That are sent at once: a server refuses more than 32 MB, of some 20 bytes each."""

LISTED = 1 << 16
"""Ids that are sent as a filter; of more, what is found is filtered here."""

EF = 256
"""Candidates that the server's graph is searched with, at least."""


def connect() -> Any:
    """A client of $QDRANT_URL; ":memory:" = in this process, for trying it out."""
    from qdrant_client import QdrantClient

    url = os.environ.get(URL) or DEFAULT_URL
    if url == ":memory:":
        return QdrantClient(url)
    key = os.environ.get(KEY) or None
    return QdrantClient(url=url, api_key=key, timeout=SECONDS, check_compatibility=False)


class Qdrant:
    """client: of `connect`, closed with this. lock: a file that is locked while this process
    changes the collection. say: is told what is made anew.

    Raises DataError where the server does not answer, or refuses.
    """

    name, approximate, outgrown = "qdrant", True, False

    def __init__(self, client: Any, collection: str, lock: Path, say: Callable[[str], None]):
        self._client, self._collection, self._lock, self._say = client, collection, lock, say
        self._look()

    def _look(self) -> None:
        """What others have made of it."""
        self.stamp, self._there = "", False
        with self._asked():
            if self._client.collection_exists(self._collection):
                self._there = True
                config = self._client.get_collection(self._collection).config
                self.stamp = (getattr(config, "metadata", None) or {}).get(STAMP, "")

    @contextlib.contextmanager
    def _asked(self) -> Iterator[Any]:
        """The client's errors in words; gives its models."""
        from qdrant_client import models
        from qdrant_client.http.exceptions import ApiException

        try:
            yield models
        except (ApiException, OSError) as error:
            where = os.environ.get(URL) or DEFAULT_URL
            raise DataError(
                f"index 'qdrant': {where}: {faults.cause(error)}. Is a server there? "
                f"docker run -p 6333:6333 qdrant/qdrant starts one; ${URL} and ${KEY} say where "
                "it is and what it wants to see."
            ) from error

    def rebuild(self, read: Read, at_most: int) -> None:
        if at_most:
            self._say(f"{self._collection}: made of the store's vectors, in Qdrant.")
        token = uuid.uuid4().hex
        for ids, vectors in read():
            self._write(ids, vectors, {MADE: token})
        if self._there:
            with self._asked() as models:
                this = models.FieldCondition(key=MADE, match=models.MatchValue(value=token))
                rest = models.FilterSelector(filter=models.Filter(must_not=[this]))
                self._client.delete(self._collection, points_selector=rest)

    def upsert(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        self._write(ids, vectors, {})

    def _write(self, ids: np.ndarray, vectors: np.ndarray, payload: dict[str, str]) -> None:
        check_finite("gallery", vectors)
        if not len(ids):
            return
        with self._asked() as models:
            if not self._there:
                params = models.VectorParams(
                    size=vectors.shape[1],
                    distance=models.Distance.DOT,
                    datatype=models.Datatype.FLOAT16,
                )
                self._client.create_collection(self._collection, vectors_config=params)
                self._there = True
            step = max(1, NUMBERS // vectors.shape[1])
            for first in range(0, len(ids), step):
                some = slice(first, first + step)
                points = models.Batch(
                    ids=ids[some].tolist(),
                    vectors=vectors[some].tolist(),
                    payloads=[payload] * len(ids[some]),
                )
                self._client.upsert(self._collection, points=points, wait=True)

    def delete(self, ids: np.ndarray) -> None:
        if self._there and len(ids):
            with self._asked() as models:
                these = models.PointIdsList(points=np.asarray(ids).tolist())
                self._client.delete(self._collection, points_selector=these, wait=True)

    def search(
        self,
        queries: np.ndarray,
        k: int,
        only: np.ndarray | None = None,
        without: Sequence[int] = (),
    ) -> Found:
        check_finite("query", queries)
        count = len(self)
        if not count or (only is not None and not len(only)):
            return nothing(len(queries), k)
        if only is None or len(only) <= LISTED:
            return ordered(*self._best(queries, min(k, count), only, without), k)
        wanted = min(k, len(only))
        most = 4 * wanted * count // len(only)
        while True:  # about so many of all hold enough of these; if not, more
            ids, scores = self._best(queries, min(most, count), None, without)
            scores = np.where(np.isin(ids, only), scores, -np.inf)
            if most >= count or (np.isfinite(scores).sum(axis=1) >= wanted).all():
                return ordered(ids, scores, k)
            most *= 4

    def _best(
        self, queries: np.ndarray, k: int, only: np.ndarray | None, without: Sequence[int]
    ) -> Found:
        """What the server finds."""
        with self._asked() as models:
            listed = lambda ids: [models.HasIdCondition(has_id=np.int64(ids).tolist())]  # noqa: E731
            ranked = models.Filter(
                must=None if only is None else listed(only),
                must_not=listed(without) if len(without) else None,
            )
            asked = [
                models.QueryRequest(
                    query=query.tolist(),
                    filter=ranked,
                    limit=k,
                    params=models.SearchParams(hnsw_ef=max(EF, k)),
                )
                for query in np.float32(queries)
            ]
            answers = self._client.query_batch_points(self._collection, requests=asked)
        found = nothing(len(queries), k)
        for row, answer in enumerate(answers):
            for column, point in enumerate(answer.points):
                found.ids[row, column], found.scores[row, column] = point.id, point.score
        return found

    def __len__(self) -> int:
        if not self._there:
            return 0
        with self._asked():
            return self._client.count(self._collection, exact=True).count

    def __iter__(self) -> Iterator[Piece]:
        following = None
        while self._there:
            with self._asked():
                points, following = self._client.scroll(
                    self._collection, limit=1024, offset=following, with_vectors=True
                )
            if points:
                ids = np.int64([point.id for point in points])
                yield ids, np.float32([point.vector for point in points])
            if following is None:
                return

    def keep(self, stamp: str) -> None:
        if self._there:
            with self._asked():
                self._client.update_collection(self._collection, metadata={STAMP: stamp})
            self._look()
            if self.stamp != stamp:
                self._say(
                    f"{self._collection}: this Qdrant keeps no metadata (from version 1.16 on it "
                    "does): everything is sent again by each process."
                )
        self.stamp = stamp

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a store that is only read: others send the same
                stack.enter_context(locked(self._lock, wait=True))
                seen = self.stamp
                self._look()
                if self._there:  # an old server keeps no stamp; this process knows
                    self.stamp = self.stamp or seen
            yield

    def close(self) -> None:
        self._client.close()
