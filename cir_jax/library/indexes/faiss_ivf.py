"""FAISS: inverted lists of vectors in 8 bits per dimension, in a file that can be made again.

A search looks into the lists that are nearest to the query, takes more candidates than are asked
for, and ranks them by the store's own vectors: it may miss a photo, its scores are exact. How many
lists it looks into is measured when they are made: so many that RECALL of the ten best of TUNED
queries are found, each the sum of two photos, as composed queries lie between images.

The file: a line of JSON, FAISS's own format, SHA-256 of both. It appears whole or not at all; one
that is missing, damaged or of another store is made anew. What has changed in the store since it
was written is read from the store's log, and is written when it is a 64th of the whole.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cir_jax.errors import DataError
from cir_jax.library.indexes.base import Found, Piece, Read, nothing, ordered, recall, scan
from cir_jax.retrieval.features import unit
from cir_jax.retrieval.ranking import check_finite
from cir_jax.storage import faults
from cir_jax.storage.atomic import write_atomically
from cir_jax.storage.locks import locked

FORMAT = "cir_jax faiss 1"
SMALL = 8192
"""Up to so many vectors are one list in half precision: nothing is missed."""

SAMPLE = 40
"""Vectors per list that its centre is learnt from."""

LISTS = 8192
ROUNDS = 10
RECALL, TUNED = 0.99, 64
DEEPER = 4
"""Candidates per photo that is asked for."""


class Faiss:
    """path: of the file. exact: the store's vectors of some ids, float32[n, dim], zeros of those
    that are gone. say: is told what is made anew, and why.

    Raises ConfigError where FAISS is not installed.
    """

    name, approximate = "faiss", True

    def __init__(
        self,
        path: Path,
        exact: Callable[[np.ndarray], np.ndarray],
        say: Callable[[str], None],
    ):
        import faiss

        self._faiss, self._path, self._exact, self._say = faiss, path, exact, say
        self._forget("there was none")
        self._load()

    def _forget(self, why: str) -> None:
        self.stamp, self._why, self._seen = "", why, None
        self._index: Any = None
        self._made_of = self._unsaved = 0

    @property
    def outgrown(self) -> bool:
        return len(self) > max(2 * self._made_of, SMALL)

    @property
    def lists(self) -> tuple[int, int]:
        """How many there are, and how many of them a search looks into."""
        return (self._index.nlist, self._index.nprobe) if self._index is not None else (0, 0)

    def rebuild(self, read: Read, at_most: int) -> None:
        if self.stamp:
            self._why = (
                f"it has grown since it was made of {self._made_of} vectors"
                if self.outgrown
                else "it was of another store, or of one that is very different now"
            )
        if at_most:
            self._say(f"{self._path}: made of the store's vectors ({self._why}).")
        self._forget("it was not finished")
        sample, count = self._sampled(read, max(1, at_most // (SAMPLE * _lists(at_most))))
        if not count:
            return
        lists = min(_lists(count), max(1, len(sample) // SAMPLE))
        codes = "SQfp16" if lists == 1 else "SQ8"
        inner = self._faiss.METRIC_INNER_PRODUCT
        index = self._faiss.index_factory(sample.shape[1], f"IVF{lists},{codes}", inner)
        index.cp.niter, index.cp.min_points_per_centroid = ROUNDS, 1
        index.train(sample)
        for ids, vectors in read():
            check_finite("gallery", vectors)
            index.add_with_ids(np.float32(vectors), ids)
        self._index, self._made_of, self._unsaved = index, index.ntotal, index.ntotal
        if lists > 1:
            self._tune(read, sample)

    def _sampled(self, read: Read, stride: int) -> tuple[np.ndarray, int]:
        """float32[some, dim] from all over the gallery, and how many there are in all."""
        taken, count = [np.zeros((0, 0), np.float32)], 0
        for _, vectors in read():
            taken.append(np.float32(vectors[-count % stride :: stride]))
            count += len(vectors)
        return np.concatenate(taken[1:] or taken), count

    def _tune(self, read: Read, sample: np.ndarray) -> None:
        rng = np.random.default_rng(0)
        queries = sample[rng.choice(len(sample), (TUNED, 2))].sum(axis=1)
        queries = unit(queries) + unit(rng.standard_normal(queries.shape, np.float32))
        best = scan(read, queries, 10)
        while self._index.nprobe < self._index.nlist:
            if recall(self.search(queries, 10), best) >= RECALL:
                break
            self._index.nprobe = min(2 * self._index.nprobe, self._index.nlist)

    def upsert(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        check_finite("gallery", vectors)
        if self._index is None:
            stamp = self.stamp
            order = np.argsort(ids)
            self.stamp, self._why = "", "it was empty"
            self.rebuild(lambda: iter([(ids[order], vectors[order])]), len(ids))
            self.stamp = stamp
            return
        self.delete(ids)
        self._index.add_with_ids(np.float32(vectors), ids)
        self._unsaved += len(ids)

    def delete(self, ids: np.ndarray) -> None:
        if self._index is not None and len(ids):
            self._unsaved += self._index.remove_ids(self._faiss.IDSelectorBatch(ids))

    def search(
        self,
        queries: np.ndarray,
        k: int,
        only: np.ndarray | None = None,
        without: Sequence[int] = (),
    ) -> Found:
        check_finite("query", queries)
        if only is not None:
            only, without = np.setdiff1d(only, without), ()
        if not len(self) or (only is not None and not len(only)):
            return nothing(len(queries), k)
        index, share = self._index, 1 if only is None else min(1, len(only) / len(self))
        # of few photos, more lists: so that about as many are compared
        lists = min(index.nlist, int(np.ceil(index.nprobe / share)))
        deep = min(len(self), max(64, DEEPER * k))
        sel = self._selector(only, without)
        ids = self._candidates(queries, deep, lists, sel)
        few = ids[:, min(k, deep) - 1] < 0  # of these, the lists hold too few
        if few.any() and lists < index.nlist:
            ids[few] = self._candidates(queries[few], deep, index.nlist, sel)
        return self._ranked(queries, ids, k)

    def _candidates(self, queries: np.ndarray, deep: int, lists: int, sel: Any) -> np.ndarray:
        params = self._faiss.SearchParametersIVF(sel=sel, nprobe=lists)
        return self._index.search(np.float32(queries), deep, params=params)[1]

    def _selector(self, only: np.ndarray | None, without: Sequence[int]) -> Any:
        if only is not None:
            if only[-1] < 1 << 28:
                bits = np.zeros(only[-1] + 1, bool)
                bits[only[only >= 0]] = True
                return self._faiss.IDSelectorBitmap(np.packbits(bits, bitorder="little"))
            return self._faiss.IDSelectorBatch(only)
        if len(without):
            return self._faiss.IDSelectorNot(self._faiss.IDSelectorBatch(np.int64(without)))
        return None

    def _ranked(self, queries: np.ndarray, ids: np.ndarray, k: int) -> Found:
        """The best of these candidates, by the store's vectors."""
        known, place = np.unique(ids, return_inverse=True)
        rows = self._exact(known)
        if not rows.size:
            return nothing(len(queries), k)
        place = place.reshape(ids.shape)
        scores = np.stack([rows[p] @ query for p, query in zip(place, queries, strict=True)])
        there = (ids >= 0) & rows.any(axis=1)[place]  # what has gone since is none
        return ordered(ids, np.where(there, scores, -np.inf), k)

    def __len__(self) -> int:
        return self._index.ntotal if self._index is not None else 0

    def __iter__(self) -> Iterator[Piece]:
        for which in range(self._index.nlist if len(self) else 0):
            held = self._index.invlists
            ids = self._faiss.rev_swig_ptr(held.get_ids(which), held.list_size(which)).copy()
            rows = np.zeros((len(ids), self._index.d), np.float32)
            for i, row in enumerate(rows):
                self._index.reconstruct_from_offset(which, i, self._faiss.swig_ptr(row))
            yield ids, rows

    def keep(self, stamp: str) -> None:
        self.stamp = stamp
        if self._unsaved and 64 * self._unsaved >= len(self):
            try:
                for left in self._path.parent.glob(f".{self._path.name}.*"):
                    left.unlink(missing_ok=True)  # by a process that was killed as it wrote
                write_atomically(self._path, self._write)
            except (DataError, OSError) as error:
                self._say(f"{self._path}: not kept for the next time ({faults.cause(error)}).")
                return
            self._unsaved, self._seen = 0, _identity(self._path)

    def _write(self, file: BinaryIO) -> None:
        digest = hashlib.sha256()

        def write(data: bytes) -> int:
            digest.update(data)
            return file.write(data)

        header = {"format": FORMAT, "stamp": self.stamp, "made_of": self._made_of}
        if self._index is not None:
            header["nprobe"] = self._index.nprobe
        write(json.dumps(header).encode() + b"\n")
        if self._index is not None:
            self._faiss.write_index(self._index, self._faiss.PyCallbackIOWriter(write))
        file.write(digest.digest())

    def _load(self) -> None:
        seen = _identity(self._path)
        try:
            with self._path.open("rb") as file:
                _check(file)
                header = json.loads(file.readline())
                if header["format"] != FORMAT:
                    raise ValueError(f"its format is {header['format']!r}, not {FORMAT!r}")
                self._forget("")
                if "nprobe" in header:
                    reader = self._faiss.PyCallbackIOReader(file.read)
                    self._index = self._faiss.read_index(reader)
                    self._index.nprobe = header["nprobe"]
                self.stamp, self._made_of = header["stamp"], header["made_of"]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            self._forget(f"the file was damaged: {faults.cause(error)}")
        self._seen = seen

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # where nothing can be written, nobody writes
                lock = self._path.with_name(f"{self._path.name}.lock")
                stack.enter_context(locked(lock, wait=True))
            if self._seen != _identity(self._path):
                self._load()
            yield

    def close(self) -> None:
        self._forget("it was closed")


def _lists(count: int) -> int:
    return 1 if count <= SMALL else min(LISTS, round(2 * count**0.5))


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Of the file that is there now: a new one has another."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _check(file: BinaryIO) -> None:
    """Raises ValueError for a file that is not what was written; else it is at its beginning."""
    left = os.fstat(file.fileno()).st_size - hashlib.sha256().digest_size
    digest = hashlib.sha256()
    while left > 0 and (data := file.read(min(left, 1 << 20))):
        digest.update(data)
        left -= len(data)
    if left or file.read() != digest.digest():
        raise ValueError("its content is not what was written")
    file.seek(0)
